"""Pictures and texts from random weights, on data that every machine has: glyphs of fonts and their Unicode names.

    pip install -e '.[glyphs]'
    embedjax train configs/glyphs.py

Trains a small ViT and a small BERT with CLIP's loss on some 47,000 drawings by the fonts inside matplotlib, each with a name
such as "greek small letter omega with tonos". Held-out names put known words together in ways that are new; each is looked for
among the drawings of all held-out characters in one font, and each drawing among the names (`success@1`, `success@10`).
"""

from embedjax.config import (
    Augment,
    Bert,
    Checkpoint,
    Config,
    Data,
    Dense,
    Evaluate,
    Export,
    Glyphs,
    ImageTower,
    Model,
    MultipleNegatives,
    Optim,
    Retrieval,
    Set,
    Tower,
    Vit,
)


def config() -> Config:
    head = (Dense(128, bias=False, activation="identity"),)
    held_out = Glyphs("test", font="DejaVuSans")
    return Config(
        name="glyphs",
        steps=1000,
        model=Model(
            towers={
                "image": ImageTower(
                    arch=Vit(image=48, patch=8, width=128, depth=3, heads=4, mlp=512, pool="mean"),
                    augment=Augment(area=(0.8, 1.0), ratio=(0.9, 1.1)),
                    dense=head,
                ),
                "text": Tower(
                    arch=Bert(vocab_size=2048, width=128, depth=2, heads=4, mlp=512, positions=24),
                    tokenizer="wordpiece",
                    max_length=16,
                    dense=head,
                ),
            },
            columns={"anchor": "text", "positive": "image"},
        ),
        data=Data(
            batch_size=128,
            sets=(
                Set(
                    source=Glyphs("train"),
                    columns={"anchor": "name", "positive": "image"},
                    loss=MultipleNegatives(
                        directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True
                    ),
                    name="glyphs",
                ),
            ),
        ),
        optim=Optim(learning_rate=1e-3, schedule="cosine", warmup=50),
        checkpoint=Checkpoint(every=1000),
        evaluate=Evaluate(
            tasks=(
                Retrieval(held_out, {"query": "name", "document": "image"}, pictures=("document",), name="drawings"),
                Retrieval(held_out, {"query": "image", "document": "name"}, pictures=("query",), name="names"),
            ),
        ),
        export=Export(format="none"),
    )
