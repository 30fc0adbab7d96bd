"""Who reads an exported folder: each gives the vectors of the same texts and pictures, to be compared with the model's."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from embedjax.config import ROLES, ImageArchitecture, ImageTower
from embedjax.config.errors import ConfigError
from embedjax.data.image import decode
from embedjax.evaluate.encode import encode
from embedjax.evaluate.late import encode_tokens
from embedjax.evaluate.tasks.side import unit
from embedjax.load import Model, load, make_images
from embedjax.models import layout, open_clip, pictures, sequence_classification

SIDES = ("texts", "pictures")
"""How the vectors of a model of both are asked for."""
SCORES = "scores"
"""How those of a classifier are: logits [N, C] of its head."""
BATCH = 32


class Tried(NamedTuple):
    """What a folder is asked for vectors of."""

    texts: list[str]
    pictures: list[bytes]
    """Encoded without loss."""

    @property
    def decoded(self) -> list[Image.Image]:
        """The pictures."""
        return [decode(encoded) for encoded in self.pictures]


Vectors = Mapping[str, np.ndarray]
"""Vectors by the way they were asked for: see `ways`."""


def ways(model: Model) -> list[str]:
    """How the vectors of a model are asked for: "query" and "document" of two towers of texts, "texts" and "pictures" of one
    each; of a single tower "vectors", and the two roles that it has a prompt for."""
    names = model.config.routes.values()
    if model.config.late:
        return list(ROLES)
    if len(names) > 1:
        return list(ROLES if all(name in model.texts for name in names) else SIDES)
    prompts = model.config.towers[model.config.routes["text"]].prompts or {}
    return ["vectors", *(role for role in ROLES if role in prompts)]


def vectors(model: Model, tried: Tried, ways: Collection[str]) -> dict[str, np.ndarray]:
    """The vectors of a model, and the scores of its head. Raises ConfigError for one that is not asked in such ways."""
    # Accelerators multiply in less than float32 by default, and other readers may be on a CPU.
    with jax.default_matmul_precision("highest"):
        found = {way: _encoded(model, tried, way) for way in ways if way != SCORES}
    if SCORES in ways:
        if len(model.heads) != 1 or "vectors" not in found:
            raise ConfigError(f"{model.origin} has {len(model.heads)} class heads; the scores of one are compared")
        found[SCORES] = next(iter(model.heads.values())).scores(found["vectors"])
    return found


def _encoded(model: Model, tried: Tried, way: str) -> np.ndarray:
    reads = {role: name in model.texts for role, name in model.config.routes.items()}
    column = "text" if way == "vectors" else way
    if model.config.late:
        return encode_tokens(model, tried.texts, column=column).vectors
    if way in SIDES:
        column = next((role for role, texts in reads.items() if texts == (way == "texts")), way)
    if column in SIDES:
        raise ConfigError(f"{model.origin} has no tower of {way}")
    of_pictures = way == "pictures" or not any(reads.values())
    return encode(model, tried.pictures if of_pictures else tried.texts, column=column)


def difference(wanted: Vectors, found: Vectors) -> float:
    """The largest difference of a component; infinity for vectors of other shapes."""
    if {name: x.shape for name, x in wanted.items()} != {name: x.shape for name, x in found.items()}:
        return float("inf")
    return float(np.max([np.abs(wanted[name] - found[name]).max() for name in wanted]))


def by_embedjax(folder: Path, tried: Tried, wanted: Vectors) -> float:
    """Its own reader."""
    return difference(wanted, vectors(load(folder), tried, wanted))


def by_sentence_transformers(folder: Path, tried: Tried, wanted: Vectors) -> float | str:
    """sentence-transformers' `encode`, with the prompts of queries and documents where there are such."""
    if not (folder / "modules.json").exists():
        return "does not read this format"
    if not _installed("sentence_transformers"):
        return "not installed"
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if late_of(folder):
        return _by_multi_vector_encoder(folder, tried, wanted)
    model = SentenceTransformer(str(folder), device="cpu")
    if tried.pictures:
        by_query = model.encode_query if "query" in model.prompts else model.encode
        shown = _shown(folder, tried)
        items = {way: tried.texts if way == "texts" else shown for way in wanted}
        asks = {way: by_query if way == "texts" else model.encode for way in wanted}
        return difference(wanted, {way: asks[way](items[way], show_progress_bar=False) for way in wanted})
    by_prompt = lambda role: functools.partial(model.encode, prompt_name=role)  # as older versions know it
    by_tower = lambda role: getattr(model, f"encode_{role}")
    by_role = by_prompt if "vectors" in wanted else by_tower
    asks = {way: model.encode if way == "vectors" else by_role(way) for way in wanted}
    return difference(wanted, {way: ask(tried.texts, show_progress_bar=False) for way, ask in asks.items()})


def by_transformers(folder: Path, tried: Tried, wanted: Vectors) -> float | str:
    """transformers' AutoModel and AutoProcessor, of towers of pictures."""
    if not (folder / "config.json").exists():
        return "does not read this format"
    if not (_installed("torch") and _installed("transformers")):
        return "not installed"
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    shown, prepare = _shown(folder, tried), lambda images: processor(images, return_tensors="pt")
    asks: dict[str, tuple[Sequence[Any], Callable[[Sequence[Any]], Any]]]
    if set(wanted) == set(SIDES):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenize = lambda texts: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        see, read = (lambda batch, side=side: getattr(model, f"get_{side}_features")(**batch) for side in ("image", "text"))
        asks = {"texts": (tried.texts, lambda x: read(tokenize(x))), "pictures": (shown, lambda x: see(prepare(x)))}
    else:
        arch = pictures.required(folder, "image").parts["image"].arch
        assert isinstance(arch, ImageArchitecture)
        output, pooling = pictures.output_of(arch)
        mean = lambda x: x.mean(1) if x.ndim == 3 else x.mean((2, 3))
        pool = {"cls": lambda x: x[:, 0], "mean": mean, None: lambda x: x}[pooling]
        asks = {"vectors": (shown, lambda x: pool(model(**prepare(x))[output]))}
    with torch.no_grad():
        return difference(wanted, {way: unit(_batched(*ask)) for way, ask in asks.items()})


def by_text_classification(folder: Path, tried: Tried, wanted: Vectors) -> float | str:
    """The logits of transformers' AutoModelForSequenceClassification and AutoTokenizer."""
    if not (_installed("torch") and _installed("transformers")):
        return "not installed"
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokenize = lambda texts: tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = _batched(tried.texts, lambda batch: model(**tokenize(batch)).logits)
    return difference({SCORES: wanted[SCORES]}, {SCORES: found})


def by_open_clip(folder: Path, tried: Tried, wanted: Vectors) -> float | str:
    """open_clip, of texts without its cleaning and of pictures that are cut: it changes quotes and the like, and cuts a pixel
    further where what is left over is odd."""
    if not (folder / open_clip.CONFIG).exists():
        return "does not read this format"
    if not all(map(_installed, ("open_clip", "torchvision", "torch"))):
        return "not installed"
    import torch

    reader: Any = importlib.import_module("open_clip")
    model, _, prepare = reader.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = reader.get_tokenizer(f"local-dir:{folder}")
    tokenizer.clean_fn = str
    see = lambda batch: model.eval().encode_image(torch.stack([prepare(square) for square in batch]))
    asks = {
        "texts": (tried.texts, lambda batch: model.encode_text(tokenizer(batch))),
        "pictures": (_squares(_seeing(folder), tried), see),
    }
    with torch.no_grad():
        return difference(wanted, {way: unit(_batched(*ask)) for way, ask in asks.items()})


def _shown(folder: Path, tried: Tried) -> list[Image.Image]:
    """The pictures; with torchvision, whose filters round otherwise than Pillow's, as squares that need no more scaling."""
    tower = _seeing(folder)
    assert tower.pixels is not None
    return tried.decoded if tower.pixels.shorter or not _installed("torchvision") else _squares(tower, tried)


def _squares(tower: ImageTower, tried: Tried) -> list[Image.Image]:
    return [Image.fromarray(square) for square in make_images(tower).encode(tried.decoded)["pixels"]]


def _seeing(folder: Path) -> ImageTower:
    return next(tower for tower in load(folder).config.towers.values() if isinstance(tower, ImageTower))


def by_pylate(folder: Path, tried: Tried, wanted: Vectors) -> float | str:
    """PyLate's `encode` of queries and documents: the vectors of their tokens."""
    if late_of(folder) != "pylate":
        return "does not read this format"
    if not _installed("pylate"):
        return "not installed"
    from pylate.models import ColBERT  # pyright: ignore[reportMissingImports]

    model = ColBERT(str(folder), device="cpu")
    named = lambda way: way if way in model.prompts else None  # it asks for the default prompt alone by itself
    ask = lambda way: model.encode(tried.texts, named(way), is_query=way == "query", show_progress_bar=False)
    return difference(wanted, {way: np.concatenate(ask(way)) for way in wanted})


def _by_multi_vector_encoder(folder: Path, tried: Tried, wanted: Vectors) -> float | str:
    """sentence-transformers' vectors of the tokens of queries and documents, of its own folders and of PyLate's."""
    package: Any = importlib.import_module("sentence_transformers")
    if not hasattr(package, "MultiVectorEncoder"):
        return f"version {package.__version__} has no late interaction"
    model = package.MultiVectorEncoder(str(folder), device="cpu")
    asks = {"query": model.encode_query, "document": model.encode_document}
    ask = lambda way: asks[way](tried.texts, convert_to_numpy=True, show_progress_bar=False)
    return difference(wanted, {way: np.concatenate(ask(way)) for way in wanted})


def late_of(folder: Path) -> str:
    """Who keeps late interaction as a folder does, as `Layout.late` has it; empty for one vector a text."""
    return layout.layout(folder).late if (folder / "modules.json").exists() and not layout.routes(folder) else ""


def classifies(folder: Path) -> bool:
    """Whether a folder's model is a classifier."""
    return sequence_classification.head_name(folder) is not None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _batched(items: Sequence[Any], ask: Callable[[Sequence[Any]], Any]) -> np.ndarray:
    """What torch gives of items, a batch at a time."""
    found = [ask(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    return np.concatenate([getattr(x, "pooler_output", x).numpy() for x in found])


Reader = Callable[[Path, Tried, Vectors], float | str]
"""A folder, what it is asked for and the vectors that are right -> the largest difference, or why it was not asked."""
READERS: dict[str, Reader] = {"embedjax": by_embedjax, "sentence-transformers": by_sentence_transformers}
PICTURE_READERS: dict[str, Reader] = {"transformers": by_transformers, "open_clip": by_open_clip}
"""Those that are asked besides where there are pictures."""
CLASS_READERS: dict[str, Reader] = {"transformers": by_text_classification}
"""Those that are asked besides for the scores of a classifier."""
LATE_READERS: dict[str, Reader] = {"pylate": by_pylate}
"""Those that are asked besides for late interaction."""
