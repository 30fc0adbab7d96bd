"""The parity gate: the exported folder, read back, must give the vectors of the model it was written from."""

import functools
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from embedjax.config import ROLES
from embedjax.config.errors import CheckFailed, ConfigError
from embedjax.data.text import Texts
from embedjax.evaluate.encode import encode
from embedjax.load import Model, load

TOLERANCE = 1e-4
TEXTS = 256
LONGEST = 8192
"""Tokens of the longest text that is tried where the tower takes any."""


def sample_texts(texts: Texts, count: int = TEXTS, seed: int = 0) -> list[str]:
    """Texts of 1 token to beyond the tower's maximum, decoded from random ids of the tokenizer, so that any model has them."""
    rng = np.random.default_rng(seed)
    size, most = texts.tokenizer.get_vocab_size(), min(texts.max_length, LONGEST) + 8
    lengths = rng.integers(1, most, count)
    lengths[0], lengths[-1] = 1, most
    decoded = [texts.tokenizer.decode(rng.integers(0, size, n).tolist()) for n in lengths]
    return [text if text.strip() else "text" for text in decoded]


def write(model: Model, folder: Path, texts: Sequence[str] = ()) -> float:
    """Compares the folder with the model on at least 256 texts, by every tower and with the prompts of queries and documents,
    and leaves texts and vectors in it as its reference.

    Raises CheckFailed when a component differs by more than 1e-4. Returns the largest difference.
    """
    chosen = list(texts[: TEXTS // 2])
    longest = max((model.texts[name] for name in model.config.routes.values()), key=lambda texts: texts.max_length)
    chosen += sample_texts(longest, TEXTS - len(chosen))
    wanted = _vectors(model, chosen, _ways(model))
    difference = _embedjax(folder, chosen, wanted)
    save_file(wanted, folder / "parity.safetensors")
    record = {"texts": chosen, "max_difference": difference, "tolerance": TOLERANCE}
    (folder / "parity.json").write_text(json.dumps(record, indent=1, ensure_ascii=False))
    judge(folder, {"embedjax": difference})
    return difference


def check(folder: Path) -> dict[str, float | str]:
    """Largest difference of each consumer from the vectors the folder was exported with; for one that was not asked, why.

    Raises ConfigError when the folder carries no reference. `judge` tells whether the differences are small enough.
    """
    try:
        record = json.loads((folder / "parity.json").read_text())
        wanted = load_file(folder / "parity.safetensors")
        texts = record["texts"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{folder}: no parity.json and parity.safetensors to check against ({error})") from error
    return {name: reader(folder, texts, wanted) for name, reader in CONSUMERS.items()}


def judge(folder: Path, found: Mapping[str, float | str]) -> None:
    """Raises CheckFailed when a consumer's vectors differ by more than 1e-4, or are not numbers."""
    for consumer, difference in found.items():
        if not isinstance(difference, str) and not difference <= TOLERANCE:
            told = f"vectors read by {consumer} differ by {difference:.1e}; at most {TOLERANCE:.0e} is allowed"
            raise CheckFailed(f"{folder}: {told}")


def _ways(model: Model) -> list[str]:
    """How the vectors of a model are asked for: "query" and "document" of two towers; of one "vectors", and the two that it has
    a prompt for."""
    if len(model.config.routes) > 1:
        return list(ROLES)
    prompts = model.config.towers[model.config.routes["text"]].prompts or {}
    return ["vectors", *(role for role in ROLES if role in prompts)]


def _vectors(model: Model, texts: list[str], ways: Iterable[str]) -> dict[str, np.ndarray]:
    # Accelerators multiply in less than float32 by default, and other readers may be on a CPU.
    with jax.default_matmul_precision("highest"):
        return {way: encode(model, texts, column="text" if way == "vectors" else way) for way in ways}


def _difference(wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    if {name: x.shape for name, x in wanted.items()} != {name: x.shape for name, x in found.items()}:
        return float("inf")
    return float(np.max([np.abs(wanted[name] - found[name]).max() for name in wanted]))


def _embedjax(folder: Path, texts: list[str], wanted: Mapping[str, np.ndarray]) -> float:
    return _difference(wanted, _vectors(load(folder), texts, wanted))


def _sentence_transformers(folder: Path, texts: list[str], wanted: Mapping[str, np.ndarray]) -> float | str:
    if not (folder / "modules.json").exists():
        return "does not read this format"
    if importlib.util.find_spec("sentence_transformers") is None:
        return "not installed"
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = SentenceTransformer(str(folder), device="cpu")
    by_prompt = lambda role: functools.partial(model.encode, prompt_name=role)  # as older versions know it
    by_tower = lambda role: getattr(model, f"encode_{role}")
    by_role = by_prompt if "vectors" in wanted else by_tower
    ways = {way: model.encode if way == "vectors" else by_role(way) for way in wanted}
    return _difference(wanted, {way: ask(texts, show_progress_bar=False) for way, ask in ways.items()})


CONSUMERS = {"embedjax": _embedjax, "sentence-transformers": _sentence_transformers}
