r"""A text classifier: a pretrained encoder and a class head, trained together.

    embedjax train configs/classify.py --data.sets.0.source.path train.tsv --data.sets.0.loss.classes 77 \
        --evaluate.tasks.0.source.path test.tsv --run-dir runs/classify

Data: TSV, CSV, JSONL or Parquet with the columns text and label; labels are the numbers 0, 1, ... as here, or names, which then
stand in the set's `labels` in the order of their numbers. Texts with several labels each hold them as a list (JSONL, Parquet),
name them in `labels` and set the loss's `criterion` to "sigmoid". `--optim.freeze '^towers/'` trains the head alone, on vectors
that stay what they are. The head is exported with the model (classifier.json and classifier.safetensors), and

    embedjax evaluate runs/classify/export --task head --data test.tsv

gives its accuracy again. With `Tower(..., pooling="cls", dense=(Dense(384),), normalize=False)`, 384 being the encoder's width,
`--export.format classifier` writes encoder and head as one model of transformers' AutoModelForSequenceClassification.
"""

from embedjax.config import Classify, Config, Data, Evaluate, File, HeadAccuracy, Model, Optim, Set, Tower


def config() -> Config:
    return Config(
        name="classify",
        steps=1000,
        model=Model(towers={"text": Tower(init="sentence-transformers/all-MiniLM-L6-v2", max_length=64, normalize=False)}),
        data=Data(
            batch_size=32,
            sets=(
                Set(
                    source=File("train.tsv"),
                    columns={"anchor": "text", "label": "label"},
                    loss=Classify(classes=2),
                    name="classes",
                ),
            ),
        ),
        optim=Optim(learning_rate=1e-4, warmup=0.1),
        evaluate=Evaluate(tasks=(HeadAccuracy(source=File("test.tsv"), name="head"),)),
    )
