"""A tower as one StableHLO program of `jax.export`, for CPUs, GPUs and TPUs, with weights, tokenizer and loader beside it.

FOLDER/stablehlo stands on its own: `program.jaxexport` is called as (weights, ids, mask), or (weights, pixels), of any batch
and length. Weights are arguments and lie in safetensors: a program that held them would compile them into every shape, while
these are on the device once. `program.json` tells the rest; `load.py` is the loader.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import save_file

from embedjax.config import ImageTower, Tower
from embedjax.config.errors import ConfigError
from embedjax.data.text import Texts
from embedjax.export import loader
from embedjax.models.embedder import build_embedder
from embedjax.models.ops import PLATFORM

PLACE = "stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
MULTIPLE = 16
"""Lengths that the tokenizer pads to: each is compiled once."""
KINDS = {np.dtype(np.float32): jnp.float32, np.dtype(np.int8): jnp.int8}


def write(folder: Path, tower: Tower | ImageTower, params: Mapping[str, np.ndarray], weights: str, texts: Texts | None) -> None:
    """Writes FOLDER/stablehlo of a resolved tower, its parameters given by path and layer ("encoder/blocks/0/...",
    "dense/0/..."), and of what tokenizes for a tower of texts. `weights` is what is said of them."""
    place = folder / PLACE
    place.mkdir(parents=True)
    (place / "program.jaxexport").write_bytes(_program(tower, params))
    save_file(dict(params), place / "weights.safetensors")
    about: dict[str, Any] = {"jax": jax.__version__, "platforms": PLATFORMS, "weights": weights, "width": tower.width}
    about["outputs"] = {"vectors": {"dtype": "float32", "shape": ["batch", tower.width], "length_1": bool(tower.normalize)}}
    if isinstance(tower, Tower):
        assert texts is not None
        _write_tokenizer(place / "tokenizer.json", texts)
        shape = ["batch", "length"]
        about["inputs"] = {"ids": {"dtype": "int32", "shape": shape}, "mask": {"dtype": "bool", "shape": shape}}
        prompts = dict(tower.prompts or {})
        about |= {"max_length": tower.max_length, "pad_id": texts.pad_id, "padding_counts": texts.fills}
        about |= {"prompts": prompts, "default_prompt": prompts.get(tower.default_prompt or "", "")}
    else:
        assert tower.pixels is not None and tower.arch is not None
        about["inputs"] = {"pixels": {"dtype": "uint8", "shape": ["batch", tower.arch.image, tower.arch.image, 3]}}
        cut = {"fit": tower.pixels.fit, "shorter": tower.pixels.shorter, "interpolation": tower.pixels.interpolation}
        about["pictures"] = cut
    (place / "program.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(loader.__file__, place / "load.py")


def _program(tower: Tower | ImageTower, params: Mapping[str, np.ndarray]) -> bytearray:
    """The serialised program."""
    embedder: Any = build_embedder(tower)
    names = ("ids", "mask") if isinstance(tower, Tower) else ("pixels",)

    def vectors(weights: dict[str, jax.Array], *inputs: jax.Array) -> jax.Array:
        return embedder.apply(nested(weights), dict(zip(names, inputs, strict=True))).pooled

    shapes = {path: jax.ShapeDtypeStruct(value.shape, KINDS[value.dtype]) for path, value in params.items()}
    if isinstance(tower, Tower):
        fixed = tower.arch is not None and tower.arch.fills
        batch, *length = export.symbolic_shape(
            "batch" if fixed else "batch, length", constraints=() if fixed else (f"length <= {tower.max_length}",)
        )
        shape = (batch, *(length or [tower.max_length]))
        inputs = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_)]
    else:
        (batch,), side = export.symbolic_shape("batch"), tower.arch.image if tower.arch else 0
        inputs = [jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)]
    # One form for all platforms: layers unrolled and attention by plain products, as a CPU likes it and XLA fuses elsewhere.
    token = PLATFORM.set("cpu")
    try:
        return export.export(jax.jit(vectors), platforms=PLATFORMS)(shapes, *inputs).serialize()
    finally:
        PLATFORM.reset(token)


def nested(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Parameters by path and layer -> the tree that towers take, layers stacked: what XLA takes apart again at no cost."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    encoder = tree["encoder"]
    if "blocks" in encoder:
        layers = [encoder["blocks"][str(n)] for n in range(len(encoder["blocks"]))]
        encoder["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return tree


def _write_tokenizer(file: Path, texts: Texts) -> None:
    """A tokenizer.json that truncates and pads by itself."""
    copy = type(texts.tokenizer).from_str(texts.tokenizer.to_str())
    assert texts.pad_id is not None
    token = copy.id_to_token(texts.pad_id) or "[PAD]"
    copy.enable_truncation(texts.max_length)
    if texts.fills:
        copy.enable_padding(pad_id=texts.pad_id, pad_token=token, length=texts.max_length)
    else:
        copy.enable_padding(pad_id=texts.pad_id, pad_token=token, pad_to_multiple_of=MULTIPLE)
    copy.save(str(file))


def read(folder: Path) -> loader.Program:
    """The program of a folder. Raises ConfigError when it is damaged or there is none."""
    try:
        return loader.Program(folder / PLACE)
    except Exception as error:  # jax, json and numpy each have their own
        raise ConfigError(
            f"{folder / PLACE} holds no program that can be read: {' '.join(str(error).split())[:200]}"
        ) from error
