"""Pictures made ready for training: how many a core decodes and augments, against Pillow in plain Python and torchvision, and
the share of a CLIP run's time that waits for them.

    python tests/benchmarks/pictures.py [--rounds 5] [--runs b32,glyphs] [--steps 12]

The photos are the three that scikit-learn and matplotlib carry, about 0.3 megapixels, as they are and enlarged to what a
camera takes. All sides cut out and scale to 224 x 224 (bicubic), mirror half, and run in one thread; embedjax leaves the
normalisation to the training step, where the others make normalised numbers, as torch's models want them. Rounds alternate
between the sides; the ratio is the median over rounds. `--runs` trains ViT-B/32 with CLIP's text tower in batches of 32 photos,
and the config of glyphs, for a few steps.
"""

import argparse
import dataclasses
import importlib.util
import io
import math
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import corpora
import numpy as np
import turns
from PIL import Image

from embedjax import config as c
from embedjax.data.image import Images, decode

SIDE = 224
PHOTOS = (("sklearn", "datasets/images"), ("matplotlib", "mpl-data/sample_data"))
AREAS = {"CLIP's crop": (0.9, 1.0), "ImageNet's": (0.08, 1.0)}
MEAN, STD = (np.array(values, np.float32) for values in (c.Pixels().mean, c.Pixels().std))


def photos(megapixels: float = 0) -> list[bytes]:
    """The JPEGs of installed packages, as they are or scaled to a size."""
    found = []
    for package, folder in PHOTOS:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found += sorted((pathlib.Path(spec.origin).parent / folder).glob("*.jpg"))
    if not found:
        raise SystemExit("this script reads the photos of scikit-learn and matplotlib, and finds neither")
    return [_scaled(path.read_bytes(), megapixels) for path in found]


def _scaled(data: bytes, megapixels: float) -> bytes:
    if not megapixels:
        return data
    picture, file = Image.open(io.BytesIO(data)), io.BytesIO()
    factor = math.sqrt(megapixels * 1e6 / (picture.width * picture.height))
    size = round(picture.width * factor), round(picture.height * factor)
    picture.resize(size, Image.Resampling.LANCZOS).save(file, "jpeg", quality=90)
    return file.getvalue()


# ---- the sides: `(area) -> (pictures -> anything)`


def ours(area: tuple[float, float]) -> Callable[[Sequence[bytes]], object]:
    images = Images(SIDE, augment=c.Augment(area=area, flip=0.5))
    return lambda datas: images.vary([decode(data, least=images.least) for data in datas], [(0, n) for n in range(len(datas))])


def pillow(area: tuple[float, float]) -> Callable[[Sequence[bytes]], object]:
    """RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, as they are usually written."""
    draw = random.Random(0)

    def one(data: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        picture = picture.crop(_box(draw, *picture.size, area)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        if draw.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        numbers = np.asarray(picture).transpose(2, 0, 1).astype(np.float32) / 255
        return (numbers - MEAN[:, None, None]) / STD[:, None, None]

    return lambda datas: np.stack([one(data) for data in datas])


def _box(draw: random.Random, width: int, height: int, area: tuple[float, float]) -> tuple[int, int, int, int]:
    for _ in range(10):
        size = draw.uniform(*area) * width * height
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


def torchvision(area: tuple[float, float]) -> Callable[[Sequence[bytes]], object]:
    import torch
    from torchvision import transforms as t

    torch.set_num_threads(1)
    how = t.InterpolationMode.BICUBIC
    steps = [t.RandomResizedCrop(SIDE, scale=area, interpolation=how), t.RandomHorizontalFlip(), t.ToTensor()]
    made = t.Compose([*steps, t.Normalize(MEAN.tolist(), STD.tolist())])
    return lambda datas: torch.stack([made(Image.open(io.BytesIO(data)).convert("RGB")) for data in datas])


SIDES = {"embedjax": ours, "Pillow": pillow, "torchvision": torchvision}


def rates(datas: Sequence[bytes], area: tuple[float, float], rounds: int) -> dict[str, list[float]]:
    """Pictures a second of a core, whatever else it does, of each side that is installed, by round."""
    makers = {name: make for name, make in SIDES.items() if name != "torchvision" or importlib.util.find_spec(name)}
    sides = {name: make(area) for name, make in makers.items()}
    batch, found = [*datas] * max(1, 48 // len(datas)), {name: [] for name in sides}
    for n in range(rounds + 1):
        for name, side in sides.items():
            start = time.process_time()
            side(batch)
            if n:  # the first round warms up
                found[name].append(len(batch) / (time.process_time() - start))
    return found


def pipeline(rounds: int) -> None:
    print("| photos | crop | embedjax, pictures/s a core | the others | ratio (range) |\n|---|---|---|---|---|")
    for told, megapixels in (("0.3 megapixels", 0), ("4 megapixels", 4)):
        datas = photos(megapixels)
        for crop, area in AREAS.items():
            found = rates(datas, area, rounds)
            mine = found.pop("embedjax")
            for name, theirs in found.items():
                ratio = turns.spread([a / b for a, b in zip(mine, theirs, strict=True)])
                print(
                    f"| {told} | {crop} | {statistics.median(mine):.0f} | {name} {statistics.median(theirs):.0f} | {ratio} |",
                    flush=True,
                )


# ---- runs


def b32(work: pathlib.Path, steps: int) -> c.Config:
    """ViT-B/32 and CLIP's text tower on photos, 32 pairs a batch, in float32."""
    datas = photos()
    for n, data in enumerate(datas):
        (work / f"{n}.jpg").write_bytes(data)
    rows = [(f"photo number {n} of many", f"{n % len(datas)}.jpg") for n in range(320)]
    file = c.File(str(corpora.write(work / "captions.jsonl", ("caption", "file"), rows)))
    head = (c.Dense(512, bias=False, activation="identity"),)
    # A tokenizer of its own, for CLIP's is in no package; its texts end in [SEP].
    arch = c.ClipText(pad_id=0, eos_id=3)
    towers = {
        "image": c.ImageTower(c.VITS["clip-B/32"], augment=c.Augment(area=(0.9, 1.0)), dense=head),
        "text": c.Tower(arch, tokenizer="wordpiece", pooling="lasttoken", max_length=77, dense=head),
    }
    loss = c.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True)
    return c.Config(
        name="b32",
        steps=steps,
        model=c.Model(towers, {"anchor": "text", "positive": "image"}),
        data=c.Data(batch_size=32, sets=(c.Set(file, {"anchor": "caption", "positive": "file"}, loss),)),
        export=c.Export("none"),
    )


def glyphs(work: pathlib.Path, steps: int) -> c.Config:
    """The config of glyphs, not evaluated."""
    from embedjax.config.load import from_file

    found = from_file(pathlib.Path(__file__).parents[2] / "configs" / "glyphs.py")
    return dataclasses.replace(found, steps=steps * 10, evaluate=c.Evaluate())


RUNS = {"b32": b32, "glyphs": glyphs}


def waits(names: Sequence[str], steps: int) -> None:
    from embedjax.metrics.writers import read_rows
    from embedjax.train import train

    found = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            work = pathlib.Path(folder)
            config = dataclasses.replace(RUNS[name](work, steps), log_every=1)
            train(config, work / "run")
            found.append((name, config.data.batch_size, read_rows(work / "run" / "metrics.jsonl")[-1]))
    print("\n| run | pairs a batch | pairs/s | time waiting for data |\n|---|---|---|---|")
    for name, size, row in found:
        print(f"| {name} | {size} | {row['pairs_per_second']:.1f} | {row['data_wait']:.2%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", default=",".join(RUNS), help=f"of {', '.join(RUNS)}; empty for none")
    parser.add_argument("--steps", type=int, default=12, help="of the run of b32; glyphs takes ten times as many")
    arguments = parser.parse_args()
    if arguments.rounds:
        pipeline(arguments.rounds)
    if arguments.runs:
        waits(arguments.runs.split(","), arguments.steps)


if __name__ == "__main__":
    corpora.with_allocator()
    main()
