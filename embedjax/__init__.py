"""Train embedding models in JAX and export them for serving.

    from embedjax import encode_texts, load_model
    model = load_model("runs/quickstart/export")          # a run, an exported or Hugging Face folder, or a hub id
    vectors = encode_texts(model, ["a text", "another"])  # numpy [2, E]; encode_images(model, paths) for pictures

Names are imported on first use, so that `embedjax.config` and `embedjax.data` do not load jax. They differ from the names of
the modules, which Python would put in their place.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedjax.config import Config as Config
    from embedjax.evaluate.encode import encode as encode_texts
    from embedjax.evaluate.encode import encode_images as encode_images
    from embedjax.evaluate.kept import encode_codes as encode_codes
    from embedjax.evaluate.tasks import evaluate as evaluate_model
    from embedjax.export import export as export_model
    from embedjax.load import Model as Model
    from embedjax.load import load as load_model
    from embedjax.train import train as train_model

__all__ = [
    "Config",
    "Model",
    "encode_codes",
    "encode_images",
    "encode_texts",
    "evaluate_model",
    "export_model",
    "load_model",
    "train_model",
]

_PLACES = {
    "Config": ("embedjax.config", "Config"),
    "Model": ("embedjax.load", "Model"),
    "encode_codes": ("embedjax.evaluate.kept", "encode_codes"),
    "encode_images": ("embedjax.evaluate.encode", "encode_images"),
    "encode_texts": ("embedjax.evaluate.encode", "encode"),
    "evaluate_model": ("embedjax.evaluate.tasks", "evaluate"),
    "export_model": ("embedjax.export", "export"),
    "load_model": ("embedjax.load", "load"),
    "train_model": ("embedjax.train", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'embedjax' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)
