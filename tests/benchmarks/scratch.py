"""A small tower from nothing: masked language modelling on Wikipedia, then caption pairs, against pairs alone, scored on STS-B.

    python tests/benchmarks/scratch.py [--mlm-steps 400] [--steps 100]

Needs $EMBEDJAX_DATA. Short runs: they show a direction, not what either path reaches.
"""

import argparse
import dataclasses
import itertools
import pathlib
import tempfile

import corpora

from embedjax import config as c

ARTICLES, WORDS = 20_000, 60


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mlm-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    from embedjax.train import train

    arch = c.Bert(vocab_size=8192, width=256, depth=4, heads=4, mlp=1024, positions=64, dropout=0.1, attention_dropout=0.1)
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        articles = (" ".join(text.split()[:WORDS]) for text in itertools.islice(corpora.wikipedia(), ARTICLES))
        text = c.File(str(corpora.write(work / "text.jsonl", ("text",), ((article,) for article in articles))))
        pairs = c.File(str(corpora.write(work / "pairs.jsonl", ("anchor", "positive"), corpora.caption_pairs("train", 0))))
        scored = c.File(str(corpora.write(work / "dev.jsonl", ("sentence1", "sentence2", "score"), corpora.stsb("dev"))))
        mlm = c.Config(
            name="mlm",
            steps=arguments.mlm_steps,
            model=c.Model({"text": c.Tower(arch, tokenizer="wordpiece", max_length=64)}),
            data=c.Data(batch_size=32, sets=(c.Set(text, {"anchor": "text"}, c.MaskedLanguage()),)),
            optim=c.Optim(learning_rate=5e-4),
            evaluate=c.Evaluate(tasks=(c.Sts(scored, name="dev"),), baseline=True),
        )
        trained = train(mlm, work / "mlm")
        assert trained.exported is not None
        tokenizer = str(trained.exported)
        found = {"pre-trained": trained.scores["dev/spearman"]}
        for which, tower in {
            "pairs alone": c.Tower(arch, tokenizer=tokenizer, max_length=32),
            "pre-trained, then pairs": c.Tower(init=tokenizer, max_length=32),
        }.items():
            sets = (c.Set(pairs, {"anchor": "anchor", "positive": "positive"}),)
            config = dataclasses.replace(
                mlm,
                name="pairs",
                steps=arguments.steps,
                model=c.Model({"text": tower}),
                data=c.Data(batch_size=64, sets=sets),
                optim=c.Optim(learning_rate=2e-4),
                evaluate=c.Evaluate(tasks=(c.Sts(scored, name="dev"),)),
                export=c.Export("none"),
            )
            found[which] = train(config, work / which.replace(" ", "-")).scores["dev/spearman"]
    print("\nSTS-B dev, Spearman")
    for which, value in found.items():
        print(f"{which:<26}{value:>8.4f}")


if __name__ == "__main__":
    corpora.with_allocator()
    main()
