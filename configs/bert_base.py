"""BERT-base from random weights on very large batches of query-document pairs, for a pod or many GPUs.

    embedjax plan configs/bert_base.py --topology v5e:16x16
    embedjax train configs/bert_base.py --data.sets.0.source.path 'pairs/*.parquet' --run-dir runs/bert_base

Data: your own pairs, JSONL or Parquet with the columns `query` and `document`; 64 tokens a query, 256 a document. Hardware: a
v5e-256 (16 GB a chip) holds 32,768 pairs a batch as it stands, more with more chunks (`--optim.cached`). The tokenizer is
BERT's own; with `--model.towers.text.init` an encoder's weights are the start instead of random ones.
"""

from embedjax.config import Bert, Checkpoint, Config, Data, File, Model, MultipleNegatives, Optim, Set, Tower


def config() -> Config:
    return Config(
        name="bert_base",
        steps=10_000,
        model=Model(
            towers={
                "text": Tower(
                    arch=Bert(),
                    tokenizer="google-bert/bert-base-uncased",
                    max_length=256,
                    compute="bfloat16",
                )
            }
        ),
        data=Data(
            batch_size=32_768,
            buckets=((64, 256),),
            sets=(
                Set(
                    source=File("pairs.parquet"),
                    columns={"anchor": "query", "positive": "document"},
                    loss=MultipleNegatives(scale=50.0),
                    name="pairs",
                ),
            ),
        ),
        optim=Optim(learning_rate=2e-4, schedule="cosine", warmup=1000),
        checkpoint=Checkpoint(every=500),
    )
