"""Pictures: what is decoded and how it is cut; whatever is wrong with a file is one ValueError, and nothing hangs."""

import dataclasses
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from embedjax.config import Augment, Pixels
from embedjax.config.errors import ConfigError
from embedjax.data import image
from embedjax.data.image import Images, decode, fit, hash_pictures, read, vary


def picture(width=60, height=40, mode="RGB", seed=0):
    """Waves and noise, so that every pixel tells where it was."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([x * 255 / width, y * 255 / height, 127 + 100 * np.sin(x / 5)], -1)
    noise = np.random.default_rng(seed).normal(0, 8, waves.shape)
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8)).convert(mode)


def encoded(kind="PNG", size=(60, 40), mode="RGB", **options):
    out = io.BytesIO()
    picture(*size, mode=mode).save(out, kind, **options)
    return out.getvalue()


KINDS = {
    "png": encoded(),
    "palette png": encoded(mode="P"),
    "grey png": encoded(mode="L"),
    "transparent png": encoded(mode="RGBA"),
    "jpeg": encoded("JPEG", quality=90),
    "progressive jpeg": encoded("JPEG", progressive=True),
    "cmyk jpeg": encoded("JPEG", mode="CMYK"),
    "webp": encoded("WEBP"),
    "gif": encoded("GIF", mode="P"),
    "bmp": encoded("BMP"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_becomes_rgb(kind):
    found = decode(KINDS[kind])
    assert found.mode == "RGB" and found.size == (60, 40)
    if kind in ("png", "bmp"):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(picture()))


def test_a_palette_with_many_transparencies_keeps_its_colours():
    paletted = picture(mode="P")
    out = io.BytesIO()
    paletted.save(out, "PNG", transparency=bytes(range(0, 256, 2)))
    np.testing.assert_array_equal(np.asarray(decode(out.getvalue())), np.asarray(paletted.convert("RGB")))


def test_a_photo_taken_upside_down_is_turned():
    exif = Image.Exif()
    exif[274] = 6  # the camera lay on its side
    out = io.BytesIO()
    picture().save(out, "JPEG", exif=exif)
    assert decode(out.getvalue()).size == (40, 60)


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size():
    data = encoded("JPEG", size=(1600, 1200))
    assert decode(data, least=140).size == (200, 150)
    assert decode(data, least=150).size == (200, 150)
    assert decode(data, least=151).size == (400, 300)
    assert decode(data).size == (1600, 1200)


def png_of(width, height):
    """A PNG of a few bytes that claims any size."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# Above twice Pillow's own limit Pillow refuses, above it once it warns; the last one is ours.
@pytest.mark.parametrize("size", [(60_000, 60_000), (10_000, 10_000), (5001, 5000)])
def test_a_bomb_is_refused_unread(size):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"limit|bomb|exceeds"):
        decode(png_of(*size))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "cannot identify"), (b"no picture", "cannot identify"), (KINDS["png"][:200], "cannot be decoded"),
     (KINDS["jpeg"][:400], "cannot be decoded"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify")],
)  # fmt: skip
def test_what_is_no_picture(data, reason):
    with pytest.raises(ValueError, match=reason) as error:
        decode(data)
    assert "\n" not in str(error.value)


def mutated(rng, data):
    """A picture with bytes changed, cut out, doubled, or its end cut off."""
    data = bytearray(data)
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    match int(rng.integers(5)):
        case 0:
            data[at : at + length] = rng.bytes(min(length, len(data) - at))
        case 1:
            del data[at : at + length]
        case 2:
            data[at:at] = data[at : at + length]
        case 3:
            del data[at:]
        case 4:
            data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_pictures_are_told_or_decoded_never_worse(count):
    rng, kinds = np.random.default_rng(0), list(KINDS.values())
    told = 0
    for i in range(count):
        start = time.perf_counter()
        try:
            found = decode(mutated(rng, kinds[i % len(kinds)]), least=16)
            assert found.mode == "RGB" and found.width * found.height <= image.LARGEST
            assert Images(16).encode([found])["pixels"].shape == (1, 16, 16, 3)
        except ValueError:
            told += 1
        assert time.perf_counter() - start < 5
    assert count // 4 < told < count


@pytest.mark.parametrize(("size", "shorter"), [((60, 40), 0), ((40, 60), 0), ((32, 32), 0), ((61, 37), 40), ((20, 300), 0)])
def test_the_fit_scales_the_shorter_side_and_cuts_the_middle(size, shorter):
    made = picture(*size)
    found = fit(made, 32, Pixels(shorter=shorter))
    scale = (shorter or 32) / min(size)
    whole = made.resize(
        tuple(int(scale * side) if side != min(size) else shorter or 32 for side in size), image.FILTERS["bicubic"]
    )
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    np.testing.assert_array_equal(found, np.asarray(whole)[top : top + 32, left : left + 32])
    assert fit(made, 32, Pixels(fit="squash")).shape == (32, 32, 3)


def test_a_cut_is_a_function_of_its_seed_and_lies_in_the_picture():
    # Red is the place in x, green that in y: the means of a cut tell where it lies.
    y, x = np.mgrid[:200, :200]
    made = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    augment = Augment(area=(0.2, 0.5), flip=0.5)
    cuts = [vary(made, 32, Pixels(interpolation="bilinear"), augment, (0, n)) for n in range(400)]
    again = [vary(made, 32, Pixels(interpolation="bilinear"), augment, (0, n)) for n in range(400)]
    np.testing.assert_array_equal(cuts, again)
    means = np.array(cuts, float).mean((1, 2))[:, :2]
    assert np.all(np.abs(means.mean(0) - 99.5) < 6) and np.all(means.std(0) > 15)
    mirrored = np.mean([cut[0, 0, 0] > cut[0, -1, 0] for cut in cuts])
    assert 0.4 < mirrored < 0.6
    spans = np.array([[np.ptp(cut[..., c].astype(float)) for c in (0, 1)] for cut in cuts])
    areas = spans.prod(1) / 200**2
    assert areas.min() > 0.15 and areas.max() < 0.55 and abs(areas.mean() - 0.35) < 0.03
    ratios = np.log(spans[:, 0] / spans[:, 1])
    assert abs(ratios.mean()) < 0.05 and ratios.min() > np.log(0.7) and ratios.max() < np.log(1.45)


def test_without_variation_training_sees_what_evaluation_sees():
    made = [picture(seed=n) for n in range(3)]
    images = Images(32)
    np.testing.assert_array_equal(images.vary(made, [(0, n) for n in range(3)])["pixels"], images.encode(made)["pixels"])


def test_a_narrow_picture_is_cut_in_its_middle():
    augment = Augment(area=(0.9, 1.0))
    found = vary(picture(400, 20), 16, Pixels(), augment, (0,))
    middle = picture(400, 20).crop((186, 0, 213, 20)).resize((16, 16), image.FILTERS["bicubic"])
    assert np.abs(found.astype(float) - np.asarray(middle)).mean() < 3


def test_how_large_a_picture_must_be_decoded():
    assert Images(224).least == 224
    assert Images(224, Pixels(shorter=256)).least == 256
    assert Images(224, augment=Augment(area=(0.25, 1.0))).least == 448
    with pytest.raises(ConfigError, match="at least the picture's side, 224"):
        image.check(Images(224, Pixels(shorter=200)))


def test_where_pictures_are_read_from(tmp_path):
    (tmp_path / "a.png").write_bytes(KINDS["png"])
    ways = [KINDS["png"], "a.png", {"bytes": KINDS["png"], "path": None}, {"bytes": None, "path": "a.png"}]
    assert {read(way, str(tmp_path)) for way in ways} == {KINDS["png"]}
    assert read(str(tmp_path / "a.png")) == KINDS["png"]
    for value, reason in ((None, "missing"), ("", "missing"), (3, "int"), ("b.png", "b.png.*No such file"), ("a\0b", "null")):
        with pytest.raises(ValueError, match=reason):
            read(value, str(tmp_path))


def test_hashes_tell_pictures_apart():
    found = hash_pictures([KINDS["png"], KINDS["jpeg"], KINDS["png"]])
    assert found.shape == (3, 2) and found.dtype == np.uint32
    assert (found[0] == found[2]).all() and (found[0] != found[1]).any()


@pytest.mark.parametrize(
    "fields", [{"area": (0.0, 1.0)}, {"area": (0.5, 0.2)}, {"ratio": (2.0, 1.0)}, {"flip": 1.5}, {"grey": -0.1}]
)
def test_variations_that_cannot_be(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        dataclasses.replace(Augment(), **fields)
