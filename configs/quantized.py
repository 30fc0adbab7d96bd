"""Fine-tune a pretrained encoder on your own pairs of texts, for vectors that are cut and stored as bits.

    embedjax train configs/quantized.py --data.sets.0.source.path my_pairs.tsv --run-dir runs/small

The file is that of `finetune.py`. The loss is summed over three prefixes of the vectors, and over each as floats and as bits;
the gradient passes as if nothing were rounded. tests/benchmarks/quantized.py trains the same way, and tells what vectors
keep.
"""

from embedjax.config import Checkpoint, Config, Data, File, Model, MultipleNegatives, Optim, Quantized, Set, Tower


def config() -> Config:
    loss = MultipleNegatives(scale=20.0, matryoshka=(384, 256, 128), quantized=Quantized(weights=(1.0, 3.0)))
    return Config(
        name="quantized",
        steps=500,
        model=Model(towers={"text": Tower(init="sentence-transformers/all-MiniLM-L6-v2", max_length=64)}),
        data=Data(
            batch_size=64,
            buckets=((16, 16), (32, 32), (64, 64)),
            sets=(
                Set(source=File("pairs.tsv"), columns={"anchor": "anchor", "positive": "positive"}, loss=loss, name="pairs"),
            ),
        ),
        optim=Optim(learning_rate=2e-5, schedule="linear", warmup=0.1),
        checkpoint=Checkpoint(every=250),
    )
