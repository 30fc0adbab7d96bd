"""Inference pairs as SBERT trained on them: does one sentence follow from the other, contradict it, or neither?

    embedjax train configs/nli.py --data.sets.0.source.path train.tsv --evaluate.tasks.0.source.path test.tsv --run-dir runs/nli

Data: TSV, CSV, JSONL or Parquet with the columns premise, hypothesis and label; the names of the labels are below. The head
over (u, v, |u - v|) is exported with the model (classifier.json and classifier.safetensors); `head/accuracy` is its accuracy on
test.tsv. For search, the in-batch loss on triplets of premise, entailment and contradiction (configs/finetune.py) is the
stronger use of the same data.
"""

from embedjax.config import ClassifyPair, Config, Data, Evaluate, File, HeadAccuracy, Model, Optim, Set, Tower


def config() -> Config:
    return Config(
        name="nli",
        steps=10_000,
        model=Model(towers={"text": Tower(init="sentence-transformers/all-MiniLM-L6-v2", max_length=64, normalize=False)}),
        data=Data(
            batch_size=64,
            sets=(
                Set(
                    source=File("train.tsv"),
                    columns={"anchor": "premise", "positive": "hypothesis", "label": "label"},
                    loss=ClassifyPair(),
                    labels=("entailment", "neutral", "contradiction"),
                    name="nli",
                ),
            ),
        ),
        optim=Optim(learning_rate=2e-5, warmup=0.1),
        evaluate=Evaluate(
            tasks=(
                HeadAccuracy(
                    source=File("test.tsv"), columns={"text": "premise", "other": "hypothesis", "label": "label"}, name="head"
                ),
            )
        ),
    )
