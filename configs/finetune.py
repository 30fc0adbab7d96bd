"""Fine-tune a pretrained encoder on your own pairs of texts.

    embedjax train configs/finetune.py --data.sets.0.source.path my_pairs.tsv --run-dir runs/mine

The file has a header with the columns `anchor` and `positive` (and `negative`, if you name it in `columns` below): TSV, CSV,
JSONL or Parquet. `init` is any BERT, RoBERTa, DistilBERT, MPNet or ModernBERT folder or hub id; a sentence-transformers folder
brings its pooling, lengths and prompts along.
"""

from embedjax.config import Checkpoint, Config, Data, File, Model, MultipleNegatives, Optim, Set, Tower


def config() -> Config:
    return Config(
        name="finetune",
        steps=500,
        model=Model(towers={"text": Tower(init="sentence-transformers/all-MiniLM-L6-v2", max_length=64)}),
        data=Data(
            batch_size=64,
            buckets=((16, 16), (32, 32), (64, 64)),
            sets=(
                Set(
                    source=File("pairs.tsv"),
                    columns={"anchor": "anchor", "positive": "positive"},
                    loss=MultipleNegatives(scale=20.0),
                    name="pairs",
                ),
            ),
        ),
        optim=Optim(learning_rate=2e-5, schedule="linear", warmup=0.1),
        checkpoint=Checkpoint(every=250),
    )
