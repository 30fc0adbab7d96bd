"""CLIP from scratch: a small ViT and a small BERT learn to find glyphs by their Unicode names, and names by glyphs.

    pip install -e '.[glyphs]'
    embedjax train configs/quickstart_clip.py

Data: some 47,000 drawings of characters by the fonts inside matplotlib, each with a name such as "greek small letter omega
with tonos". Held-out names put known words together in ways that are new. Hardware: two CPU cores, 53 seconds in all. Score:
among 633 held-out drawings the right one is in the first ten for 29 % of the names (R@10; untrained 1 %, chance 2 %), and the
name for 27 % of the drawings. More steps give more. The run folder has a contact sheet, sheet-drawings.html, of what was found
for 24 names.
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
        name="quickstart_clip",
        steps=250,
        model=Model(
            towers={
                "image": ImageTower(
                    arch=Vit(image=40, patch=8, width=128, depth=3, heads=4, mlp=512, pool="mean"),
                    augment=Augment(area=(0.8, 1.0), ratio=(0.9, 1.1)),
                    dense=head,
                ),
                "text": Tower(
                    arch=Bert(vocab_size=2048, width=128, depth=1, heads=4, mlp=512, positions=24),
                    tokenizer="wordpiece",
                    max_length=12,
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
        optim=Optim(learning_rate=2e-3, schedule="cosine", warmup=50),
        checkpoint=Checkpoint(every=1000),
        evaluate=Evaluate(
            tasks=(
                Retrieval(held_out, {"query": "name", "document": "image"}, pictures=("document",), name="drawings"),
                Retrieval(held_out, {"query": "image", "document": "name"}, pictures=("query",), name="names"),
            ),
            baseline=True,
        ),
        export=Export(format="none"),
    )
