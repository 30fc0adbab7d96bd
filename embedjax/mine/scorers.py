"""Who scores the mined rows: the model that mined them, another embedding model, or a cross-encoder."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Float

from embedjax.config.errors import ConfigError
from embedjax.evaluate.encode import encode, fingerprint
from embedjax.evaluate.tasks.side import comparable
from embedjax.load import Model

Scorer = Callable[[Sequence[str], Sequence[Sequence[str]]], Float[np.ndarray, "n C"]]
"""(n anchors, C documents of each) -> scores."""

Named = tuple[str, Scorer]
"""A scorer and its name, which is another one for other weights: scores that were kept under it are its own."""


def teacher(model: Model, mesh: DeviceMesh | None = None, task: str | None = None) -> Named:
    """The similarities of an embedding model, with its prompt or adapter `task`; equal texts of a call are encoded once."""

    def scores(anchors, documents):
        flat = [text for row in documents for text in row]
        sides = {"query": anchors, "document": flat}
        queries, candidates = (_vectors(model, texts, side, task, mesh) for side, texts in sides.items())
        return np.einsum("ne,nce->nc", queries, candidates.reshape(len(anchors), -1, candidates.shape[-1]))

    weights = dict.fromkeys(fingerprint(model, side)[:12] for side in ("query", "document"))
    return f"{model.origin} ({', '.join(filter(None, (task, *weights)))})", scores


def _vectors(
    model: Model, texts: Sequence[str], column: str, task: str | None, mesh: DeviceMesh | None
) -> Float[np.ndarray, "n E"]:
    different = {text: k for k, text in enumerate(dict.fromkeys(texts))}
    vectors = comparable(encode(model, list(different), column=column, task=task, mesh=mesh), model.config.similarity)
    return vectors[[different[text] for text in texts]]


def cross_encoder(name: str) -> Named:
    """The logits or probabilities that a sentence-transformers CrossEncoder of one output gives pairs of texts.

    Raises ConfigError where sentence-transformers is not installed, or the model cannot be had.
    """
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise ConfigError(
            f"a cross-encoder runs in sentence-transformers, which cannot be used ({error}): pip install 'embedjax[reference]'"
        ) from None
    try:
        model = CrossEncoder(name, model_kwargs={"use_safetensors": True})
    except Exception as error:  # whatever the libraries below it raise for a model that is not there or is none
        raise ConfigError(f"the cross-encoder {name!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if model.num_labels != 1:
        raise ConfigError(f"the cross-encoder {name!r} gives {model.num_labels} numbers a pair; one score is expected")

    def scores(anchors, documents):
        pairs = [(anchor, text) for anchor, row in zip(anchors, documents, strict=True) for text in row]
        return np.asarray(model.predict(pairs, show_progress_bar=False), np.float32).reshape(len(anchors), -1)

    weights = hashlib.sha256()
    for tensor in model.state_dict().values():
        weights.update(tensor.detach().float().cpu().numpy().tobytes())
    return f"{name} ({weights.hexdigest()[:12]})", scores
