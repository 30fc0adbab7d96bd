"""ColBERTv2: BERT-base with a vector a token, taught by a cross-encoder's scores of 64 passages a query.

    embedjax mine MODEL corpus.jsonl pairs.jsonl train.parquet --num-negatives 63 --range-max 500 \\
        --cross-encoder cross-encoder/ms-marco-MiniLM-L6-v2
    embedjax plan configs/colbertv2.py --topology h100:8
    embedjax train configs/colbertv2.py --data.sets.0.source.path train.parquet --run-dir runs/colbertv2

Data: rows as the first command writes them, `anchor`, `positive`, 63 negatives (`negative`, `negative_2`, ...) and the
cross-encoder's 64 scores (`score`, `score_2`, ...); the paper's are MS MARCO's queries, with passages that an earlier ColBERT
retrieved, while `mine` takes a MODEL of one vector a text. Recipe: Santhanam et al. 2022, section 3.2, and its code: the
divergence from the cross-encoder's softmax over the 64 passages, and beside it the softmax over the batch; 32 rows a batch,
400,000 steps at 1e-5, 20,000 of them warm-up, gradients of at most 2; queries of 32 tokens filled with [MASK] that is not
attended to, passages of 180 (`--model.towers.text.late.document-length 300`), 128 numbers a token. Its softmax over the batch
leaves out a query's own 63 negatives, which are in ours. Hardware: a node of GPUs or a slice of TPUs; in bfloat16, layers
recomputed in the backward pass, the batch embedded in chunks. What fits `embedjax plan` tells. Not trained here: no score.
"""

from embedjax.config import (
    Checkpoint,
    Config,
    Data,
    Export,
    File,
    KlDistillation,
    Late,
    Model,
    MultipleNegatives,
    Optim,
    Set,
    Sum,
    Tower,
)

WAYS = 64


def config() -> Config:
    numbered = lambda name, count: [name, *(f"{name}_{k}" for k in range(2, count + 1))]
    columns = ["anchor", "positive", *numbered("negative", WAYS - 1), *numbered("score", WAYS)]
    return Config(
        name="colbertv2",
        steps=400_000,
        model=Model(
            towers={
                "text": Tower(
                    init="google-bert/bert-base-uncased",
                    late=Late(query_length=32, document_length=180),
                    compute="bfloat16",
                    remat=True,
                )
            }
        ),
        data=Data(
            batch_size=32,
            sets=(
                Set(
                    source=File("train.parquet"),
                    columns={name: name for name in columns},
                    loss=Sum(losses=(KlDistillation(), MultipleNegatives())),
                    name="passages",
                ),
            ),
        ),
        optim=Optim(learning_rate=1e-5, schedule="linear", warmup=20_000, weight_decay=0.0, clip_norm=2.0, cached=4),
        checkpoint=Checkpoint(every=10_000),
        export=Export(format="pylate"),
    )
