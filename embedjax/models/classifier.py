"""Class heads: what a run's labelled sets have learned on top of the embedding, kept beside an exported model.

`classifier.json` lists the heads by the name of their set; `classifier.safetensors` holds "NAME.weight" [classes, features] and
"NAME.bias" [classes], as torch's Linear has them. Features are the embedding u of a text, or (u, v, |u - v|) of a pair, as the
model gives them: of length 1 if it normalises. Readers of the model that do not know of heads pass over both files.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float, Int

from embedjax.config.errors import ConfigError
from embedjax.models.jsonfile import get, read_json
from embedjax.models.weights import load_tensors

STEM = "classifier"
"""Of the two files, in a folder of this name: servers take any safetensors beside the model's for its weights."""


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear layer from the embedding of a text, or of a pair, to a score for each of its labels."""

    labels: tuple[str, ...]
    """Names of the classes, or their numbers where they have none."""
    pair: bool
    """Whether it reads two texts."""
    criterion: Literal["softmax", "sigmoid"]
    """One label a row, or each a yes or no."""
    kernel: Float[np.ndarray, "F C"]
    bias: Float[np.ndarray, " C"]
    adapter: str = ""
    """The adapter whose embeddings it reads; empty for a model without, or as the model takes one when none is named."""

    def scores(self, *vectors: Float[np.ndarray, "B E"]) -> Float[np.ndarray, "B C"]:
        """The scores of texts, or pairs, from their embeddings or prefixes of these. Raises ConfigError for embeddings that the
        head cannot read."""
        if len(vectors) != 1 + self.pair:
            raise ConfigError(f"the class head reads {'pairs of texts' if self.pair else 'single texts'}")
        widest = len(self.kernel) // (3 if self.pair else 1)
        if (width := vectors[0].shape[1]) > widest:
            raise ConfigError(f"the class head reads embeddings of at most {widest} numbers; these have {width}")
        return np.asarray(scores(jnp.asarray(self.kernel), jnp.asarray(self.bias), *map(jnp.asarray, vectors)))

    def predict(self, *vectors: Float[np.ndarray, "B E"]) -> Int[np.ndarray, "B *C"]:
        """The number of each row's class; with criterion "sigmoid" 0 or 1 for every class."""
        scores_BC = self.scores(*vectors)
        return scores_BC.argmax(1) if self.criterion == "softmax" else (scores_BC > 0).astype(np.int64)


def features(u_BE: Float[Array, "B E"], v_BE: Float[Array, "B E"] | None = None) -> Float[Array, "B F"]:
    """What a head reads: u of a text alone; (u, v, |u - v|) of a pair (Reimers & Gurevych 2019, section 3)."""
    return u_BE if v_BE is None else jnp.concatenate([u_BE, v_BE, jnp.abs(u_BE - v_BE)], -1)


def scores(kernel: Float[Array, "F C"], bias: Float[Array, " C"], *vectors: Float[Array, "B E"]) -> Float[Array, "B C"]:
    """A head's scores of one embedding a row or two; of prefixes, by the rows of the kernel that are theirs (Kusupati et al.
    2022, the efficient variant)."""
    parts = 1 if len(vectors) == 1 else 3
    kept = kernel.reshape(parts, -1, len(bias))[:, : vectors[0].shape[1]]
    # Accelerators multiply float32 in less by default.
    product_BC = jnp.matmul(features(*vectors), kept.reshape(-1, len(bias)), precision=jax.lax.Precision.HIGHEST)
    return product_BC + bias[None]


def write_heads(folder: Path, heads: Mapping[str, Head]) -> None:
    """The two files of a model's heads; none without heads."""
    if not heads:
        return
    place = folder / STEM
    place.mkdir(exist_ok=True)
    told = {
        name: {"labels": list(head.labels), "features": "pair" if head.pair else "text", "criterion": head.criterion}
        for name, head in heads.items()
    }
    (place / f"{STEM}.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tensors = {f"{name}.weight": np.ascontiguousarray(head.kernel.T) for name, head in heads.items()}
    tensors |= {f"{name}.bias": np.ascontiguousarray(head.bias) for name, head in heads.items()}
    safetensors.numpy.save_file(tensors, place / f"{STEM}.safetensors", metadata={"format": "pt"})


def read_heads(folder: Path) -> dict[str, Head]:
    """The heads beside a model, {} if there are none. Raises ConfigError for files that are damaged or disagree."""
    file = folder / STEM / f"{STEM}.json"
    if not file.exists():
        return {}
    told, tensors = read_json(file), load_tensors(folder / STEM, STEM)
    return {name: _head(name, entry, tensors, file) for name, entry in told.items()}


def _head(name: str, entry: object, tensors: Mapping[str, np.ndarray], file: Path) -> Head:
    if not isinstance(entry, dict):
        raise ConfigError(f"{file}: {name!r} is {type(entry).__name__}; expected an object")
    labels = tuple(map(str, get(entry, "labels", list, [], file=file)))
    kind, criterion = (get(entry, key, str, "", file=file) for key in ("features", "criterion"))
    if kind not in ("text", "pair") or criterion not in ("softmax", "sigmoid"):
        raise ConfigError(
            f"{file}: {name!r} has features {kind!r} and criterion {criterion!r}; they are text or pair, and softmax or sigmoid"
        )
    weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
    if weight is None or bias is None or weight.ndim != 2 or weight.shape[:1] != bias.shape or bias.shape != (len(labels),):
        raise ConfigError(f"{file.with_suffix('.safetensors')} holds no head {name!r} of {len(labels)} classes")
    return Head(labels, kind == "pair", cast(Literal["softmax", "sigmoid"], criterion), weight.T, bias)
