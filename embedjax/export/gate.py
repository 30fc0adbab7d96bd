"""The parity gate: the exported folder, read back, must give the vectors of the model it was written from."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from embedjax.config import ImageTower
from embedjax.config.errors import CheckFailed, ConfigError
from embedjax.data.image import decode
from embedjax.data.text import Texts
from embedjax.export.consumers import (
    CLASS_READERS,
    LATE_READERS,
    PICTURE_READERS,
    READERS,
    SCORES,
    Tried,
    by_embedjax,
    classifies,
    late_of,
    vectors,
    ways,
)
from embedjax.export.programs import Rounded, readers
from embedjax.load import Model

TOLERANCE = 1e-4
ROUNDED_TOLERANCE = 0.1
"""Of 1 - the lowest cosine, for programs with weights of int8: texts of random tokens are rounded worse than any real one."""
TEXTS = 256
LATE_TEXTS = 64
"""Those of late interaction, whose vectors are many: they are kept beside the model."""
PICTURES = 64
LONGEST = 8192
"""Tokens of the longest text that is tried where the tower takes any."""
FOLDER = "parity"
"""Where the texts, the pictures and their vectors lie: servers take any safetensors beside the model's for its weights."""


def sample_texts(texts: Texts, count: int = TEXTS, seed: int = 0) -> list[str]:
    """Texts of 1 token to beyond the tower's maximum, decoded from random ids of the tokenizer, so that any model has them."""
    rng = np.random.default_rng(seed)
    size, most = texts.tokenizer.get_vocab_size(), min(texts.max_length, LONGEST) + 8
    lengths = rng.integers(1, most, count)
    lengths[0], lengths[-1] = 1, most
    decoded = [texts.tokenizer.decode(rng.integers(0, size, n).tolist()) for n in lengths]
    return [text if text.strip() else "text" for text in decoded]


def sample_pictures(size: int, count: int = PICTURES, seed: int = 0) -> list[Image.Image]:
    """Pictures of many shapes around a side of `size`: waves and noise of every colour."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        height, width = rng.integers(max(2, size * 3 // 4), size * 2, 2)
        y, x = np.mgrid[:height, :width] / size
        turn, phase = rng.uniform(-9, 9, (2, 3, 1, 1)), rng.uniform(0, 6, (3, 1, 1))
        waves = np.sin(turn[0] * y + turn[1] * x + phase) * 90 + 128 + rng.normal(0, 20, (3, height, width))
        made.append(Image.fromarray(np.clip(waves, 0, 255).astype(np.uint8).transpose(1, 2, 0)))
    return made


def _kept(encoded: bytes, size: int) -> Image.Image:
    """A picture as it is kept: no larger than a reader has to scale it from."""
    picture = decode(encoded)
    picture.thumbnail((size * 2, size * 2), Image.Resampling.BICUBIC)
    return picture


def write(model: Model, folder: Path, texts: Sequence[str] = (), pictures: Sequence[bytes] = ()) -> float:
    """Compares the folder with the model on at least 256 texts, by every tower and with the prompts of queries and documents,
    and on 64 pictures, and leaves texts, pictures and vectors in it as its reference; of a classifier the scores too. Where
    fewer are given, and to a half of the texts always, they are made of random tokens and numbers. Programs in the folder are
    asked too.

    Raises CheckFailed when a component differs by more than 1e-4, or a cosine by more than 0.1 where weights are int8. Returns
    the largest difference, but for those.
    """
    tried = Tried(_texts(model, texts), _pictures(model, pictures))
    wanted = vectors(model, tried, [*ways(model), *([SCORES] if classifies(folder) else [])])
    difference = by_embedjax(folder, tried, wanted)
    (folder / FOLDER).mkdir(exist_ok=True)
    save_file(wanted, folder / FOLDER / "parity.safetensors")
    found: dict[str, float | str] = {"embedjax": difference} | {
        name: ask(tried, wanted) for name, ask in readers(folder).items()
    }
    exact = [value for value in found.values() if not isinstance(value, str | Rounded)]
    record = {"texts": tried.texts, "pictures": len(tried.pictures), "max_difference": max(exact), "tolerance": TOLERANCE}
    (folder / FOLDER / "parity.json").write_text(json.dumps(record, indent=1, ensure_ascii=False))
    for n, encoded in enumerate(tried.pictures):
        _place(folder, n).write_bytes(encoded)
    judge(folder, found)
    return max(exact)


def _texts(model: Model, given: Sequence[str]) -> list[str]:
    routes = [model.texts[name] for name in model.config.routes.values() if name in model.texts]
    if not routes:
        return []
    count = LATE_TEXTS if model.config.late else TEXTS
    chosen = list(given[: count // 2])
    chosen += sample_texts(max(routes, key=lambda texts: texts.max_length), count - len(chosen))
    late = [tower.late for tower in model.config.texts.values() if tower.late]
    for marker in {marker for each in late for marker in (each.query_marker, each.document_marker)} - {""}:
        # Readers differ in whether a marker that is written out in a text is one, in which case of letters.
        chosen = [re.sub(re.escape(marker.strip()), " ", text, flags=re.IGNORECASE) for text in chosen]
    return [text if text.strip() else "text" for text in chosen]


def _pictures(model: Model, given: Sequence[bytes]) -> list[bytes]:
    towers = [model.config.towers[name] for name in model.config.routes.values()]
    sizes = [tower.arch.image for tower in towers if isinstance(tower, ImageTower) and tower.arch]
    if not sizes:
        return []
    chosen = [_kept(encoded, sizes[0]) for encoded in given[:PICTURES]]
    chosen += sample_pictures(sizes[0], PICTURES - len(chosen))
    return [_png(picture) for picture in chosen]


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def _place(folder: Path, n: int) -> Path:
    return folder / FOLDER / f"{n:02}.png"


def check(folder: Path) -> dict[str, float | str]:
    """Largest difference of each consumer from the vectors the folder was exported with; for one that was not asked, why.

    Raises ConfigError when the folder carries no reference. `judge` tells whether the differences are small enough.
    """
    try:
        record = json.loads((folder / FOLDER / "parity.json").read_text())
        wanted = load_file(folder / FOLDER / "parity.safetensors")
        tried = Tried(record["texts"], [_place(folder, n).read_bytes() for n in range(record.get("pictures", 0))])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: no parity.json and parity.safetensors to check against ({error})") from error
    asked = READERS | (PICTURE_READERS if tried.pictures else {}) | (LATE_READERS if late_of(folder) else {})
    asked |= CLASS_READERS if classifies(folder) else {}
    found = {name: reader(folder, tried, wanted) for name, reader in asked.items()}
    return found | {name: ask(tried, wanted) for name, ask in readers(folder).items()}


def told(found: float | str) -> str:
    """What was found of a consumer, as a person reads it."""
    if isinstance(found, Rounded):
        return f"int8 weights, lowest cosine {1 - found:.4f}"
    return found if isinstance(found, str) else f"largest difference {found:.1e}"


def judge(folder: Path, found: Mapping[str, float | str]) -> None:
    """Raises CheckFailed when a consumer's vectors differ by more than 1e-4, or are not numbers; those of weights of int8 when
    a cosine is below 0.9."""
    for consumer, difference in found.items():
        if isinstance(difference, Rounded) and not difference <= ROUNDED_TOLERANCE:
            least = f"at least {1 - ROUNDED_TOLERANCE:.1f} is allowed"
            raise CheckFailed(f"{folder}: vectors read by {consumer} have {told(difference)} to the model's; {least}")
        if not isinstance(difference, str | Rounded) and not difference <= TOLERANCE:
            allowed = f"at most {TOLERANCE:.0e} is allowed"
            raise CheckFailed(f"{folder}: vectors read by {consumer} differ by {difference:.1e}; {allowed}")
