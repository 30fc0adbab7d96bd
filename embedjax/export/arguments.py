"""The arguments of `embedjax export`."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import tyro

from embedjax.config import overrides
from embedjax.config.errors import ConfigError
from embedjax.evaluate.arguments import numbers


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a folder that others load, and compares it with the model; or checks a folder written before, or saves ranges in
    it."""

    model: tyro.conf.Positional[str]
    """The model; with --check, and with --calibrate but no second folder, the exported folder."""
    folder: tyro.conf.Positional[str] = ""
    """Where to write; must not exist or be empty."""
    format: Literal["sentence-transformers", "hf", "open-clip", "pylate", "classifier"] = "sentence-transformers"
    """sentence-transformers: encoder, pooling and head, read by sentence-transformers, text-embeddings-inference and vLLM, late
    interaction by sentence-transformers' MultiVectorEncoder; hf: the bare encoder, or CLIPModel and SiglipModel; open-clip:
    what open_clip loads; pylate: late interaction, read by PyLate and by MultiVectorEncoder; classifier: a model and its class
    head, read by transformers' AutoModelForSequenceClassification. Towers of queries and documents become FOLDER/query and
    FOLDER/document, of which sentence-transformers' Router makes one model."""
    adapter: str = ""
    """Name of the adapter to merge into the kernels, of a run that has several."""
    head: str = ""
    """Name of the class head of a classifier, of a model that has several."""
    dim: int = 0
    """Late interaction: write the model of the first so many numbers of its tokens' vectors (default: all)."""
    program: tuple[Literal["stablehlo", "onnx"], ...] = ()
    """Programs to write beside a folder of sentence-transformers: stablehlo runs wherever jax does, onnx in onnxruntime and
    text-embeddings-inference."""
    weights: Literal["float32", "int8"] = "float32"
    """What the weights of these programs are: float32, or int8 by output channel, a quarter of the size."""
    check: bool = False
    """Read an exported folder in every consumer that is installed and compare with the vectors it was exported with."""
    calibrate: tuple[str, ...] = ()
    """Rows like those that will be stored, 10,000 or more, of which the ranges of int8 and uint8 are taken and saved with the
    model: FILE, or for a model of two towers query=FILE document=FILE, or text=FILE image=FOLDER."""
    column: str = ""
    """Column of the texts or pictures of --calibrate (default: "text" or "image", or the only one)."""
    dims: str = ""
    """Prefixes of the vectors that have ranges of their own, such as 256,128,64, besides the whole vectors."""

    @property
    def prefixes(self) -> tuple[int, ...]:
        """`dims` as numbers. Raises ConfigError."""
        return numbers(self.dims)


def parse(arguments: Sequence[str]) -> Arguments:
    """The command line, read. Raises ConfigError for options that do not go together."""
    made = overrides.parse(Arguments, arguments, prog="embedjax export")
    if (made.column or made.prefixes) and not made.calibrate:
        raise ConfigError("--column and --dims are of --calibrate FILE")
    if made.dim and not made.folder:
        raise ConfigError("--dim is of a folder that is written: embedjax export MODEL FOLDER --dim N")
    if made.check and made.calibrate:
        raise ConfigError("--check and --calibrate are two commands")
    if not (made.check or made.calibrate or made.folder):
        raise ConfigError("export needs a folder to write: embedjax export MODEL FOLDER (or export FOLDER --check)")
    return made
