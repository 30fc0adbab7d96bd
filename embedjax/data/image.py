"""Encoded pictures -> squares of pixels: checked, decoded, cut and scaled, on the host. Imports no jax.

A picture may be anything a stranger uploaded: its header is read before its pixels, and whatever is wrong with it is one
ValueError, so that it counts as a bad row like any other.
"""

import dataclasses
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt8, UInt32
from PIL import Image, ImageOps

from embedjax.config.errors import ConfigError
from embedjax.config.image import Augment, Pixels

LARGEST = 25_000_000
"""Pixels of a picture beyond which it is refused unread: a few kilobytes may claim any size."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded. Pillow's rarer formats are not worth their risk."""

ENDINGS = ("jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp")
"""The same by file name."""

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# A random crop that does not fit is drawn again so often, then the middle is taken (as Szegedy et al. 2015 is usually coded).
TRIES = 10


@dataclasses.dataclass(frozen=True)
class Images:
    """How pictures become the inputs of one tower."""

    size: int
    """Side of the square, S."""
    pixels: Pixels = Pixels()
    augment: Augment = Augment()

    @property
    def least(self) -> int:
        """The shorter side a picture needs in training, so that the smallest random crop is not scaled up."""
        return math.ceil((self.pixels.shorter or self.size) / math.sqrt(self.augment.area[0]))

    def encode(self, pictures: Iterable[Image.Image]) -> dict[str, UInt8[np.ndarray, "N S S 3"]]:
        """{"pixels"}: the plain fit of each picture; of several none is held but the one at work."""
        return {"pixels": self._stack(fit(picture, self.size, self.pixels) for picture in pictures)}

    def vary(
        self, pictures: Sequence[Image.Image], seeds: Sequence[tuple[int, ...]]
    ) -> dict[str, UInt8[np.ndarray, "N S S 3"]]:
        """{"pixels"}: a random cut of each picture, a function of its seed alone."""
        pairs = zip(pictures, seeds, strict=True)
        return {"pixels": self._stack(vary(picture, self.size, self.pixels, self.augment, seed) for picture, seed in pairs)}

    def _stack(self, squares: Iterable[np.ndarray]) -> np.ndarray:
        found = list(squares)
        return np.stack(found) if found else np.zeros((0, self.size, self.size, 3), np.uint8)


def read(value: object, root: str = "") -> bytes:
    """The encoded picture that a source's value stands for: bytes, a path (relative to `root`), Hugging Face's
    {"bytes", "path"}, or what has a method `read`, as open files have. Raises ValueError."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    elif callable(reader := getattr(value, "read", None)):
        value = reader()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str) and value:
        path = os.path.join(root, value)
        try:
            with open(path, "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:  # ValueError for a name with a zero byte
            raise ValueError(f"picture {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    raise ValueError("picture is missing" if value in (None, "") else f"picture is {type(value).__name__}, not bytes or a path")


def decode(data: bytes, *, least: int = 0) -> Image.Image:
    """The picture in RGB and upright, its pixels read.

    With `least` a JPEG may come at a half, quarter or eighth of its size, as long as its shorter side keeps that many pixels:
    its decoder then does a part of the work. Raises ValueError for what is no picture, is damaged or larger than LARGEST.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > LARGEST:
                raise ValueError(f"picture of {width} x {height} pixels is above the limit of {LARGEST / 1e6:.0f} million")
            if least and picture.format in ("JPEG", "MPO"):  # MPO: a JPEG with more pictures behind it, as some phones write
                factor = least / min(width, height)
                if factor <= 0.5:
                    picture.draft("RGB", (math.ceil(width * factor), math.ceil(height * factor)))
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")  # the same colours, without Pillow's warning
            return upright.convert("RGB")
    except ValueError as error:
        raise ValueError(_line(error)) from None
    except Exception as error:  # decoders raise whatever they meet: OSError, SyntaxError, struct.error, MemoryError, ...
        raise ValueError(f"picture cannot be decoded: {_line(error)}") from None


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) as the header of an encoded picture says. Raises ValueError for what is no picture."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.size
    except Exception as error:  # as `decode`
        raise ValueError(f"picture cannot be decoded: {_line(error)}") from None


def fit(picture: Image.Image, size: int, pixels: Pixels) -> UInt8[np.ndarray, "S S 3"]:
    """The picture as evaluation and serving see it: what Hugging Face's processors of CLIP, SigLIP, ViT and ResNet do."""
    how = FILTERS[pixels.interpolation]
    if pixels.fit == "squash":
        return np.asarray(picture.resize((size, size), how))
    shorter, (width, height) = pixels.shorter or size, picture.size
    scale = lambda side: shorter if side == min(width, height) else int(shorter * side / min(width, height))
    scaled = picture.resize((scale(width), scale(height)), how)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))  # beyond the border is black


def vary(
    picture: Image.Image, size: int, pixels: Pixels, augment: Augment, seed: tuple[int, ...]
) -> UInt8[np.ndarray, "S S 3"]:
    """The picture as a training step sees it: a random rectangle of it (Szegedy et al. 2015, section 6), mirrored or not."""
    draw = np.random.default_rng(seed)
    mirrored = draw.random() < augment.flip
    if augment.area == (1.0, 1.0):
        square = fit(picture, size, pixels)
    else:
        box = _rectangle(draw, *picture.size, augment)
        # Pixels far above the result's are averaged first, cheaply: three per result pixel are left for the filter.
        square = np.asarray(picture.resize((size, size), FILTERS[pixels.interpolation], box=box, reducing_gap=3.0))
    return np.ascontiguousarray(square[:, ::-1]) if mirrored else square


def _rectangle(draw: np.random.Generator, width: int, height: int, augment: Augment) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random rectangle: its area uniform, the logarithm of its ratio uniform."""
    for _ in range(TRIES):
        area = draw.uniform(*augment.area) * width * height
        ratio = math.exp(draw.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * augment.ratio[1])))
    h = min(height, max(1, round(width / augment.ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def hash_pictures(datas: Iterable[bytes]) -> UInt32[np.ndarray, "N 2"]:
    """blake2b-64 of each encoded picture, low word first, as `columns.hash_texts` does with texts."""
    digests = b"".join(hashlib.blake2b(data, digest_size=8).digest() for data in datas)
    return np.frombuffer(digests, "<u4").reshape(-1, 2).astype(np.uint32)


def check(images: Images) -> None:
    """Raises ConfigError where the scaled picture is smaller than what is cut out of it."""
    if 0 < images.pixels.shorter < images.size:
        raise ConfigError(f"Pixels.shorter is {images.pixels.shorter}; it must be at least the picture's side, {images.size}")


def _line(error: Exception) -> str:
    """The first line of a message, without the object in memory that Pillow names."""
    return re.sub(r" <_io\.\w+ object at \w+>", "", str(error).strip().partition("\n")[0]) or type(error).__name__
