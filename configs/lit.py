"""LiT: a text tower learns to read a pretrained image tower that stays as it is; for a pod, or a node with GPUs.

    embedjax train configs/lit.py --data.sets.0.source.path 'pairs/train-{00000..00999}.tar' --run-dir runs/lit

`configs/lit.py` begins its text tower from BERT, `configs/lit.py:clip_text` has CLIP's from random weights. The image tower
is any ViT, CLIP or SigLIP folder or hub id, or an image tower that you trained (`--model.towers.image.init RUN`); it has no
optimiser state and no gradient. Vectors are as wide as the image tower's: set the text tower's `dense` for another width
than 768. Recipe: Zhai et al. 2022 (rate 1e-3, decay 1e-4, which ours multiplies by the rate: 0.1, batch 16,384, 10,000
steps of warm-up, cosine; some 1,000M pairs seen as in figure 1, left), and its published configs (pictures mirrored, 16
tokens, gradients clipped to norm 1, scale 10 at first). `--optim.freeze --model.towers.image.freeze-layers 10` unlocks its
last two layers. Not trained here: no score.
"""

from embedjax.config import (
    Augment,
    Checkpoint,
    ClipText,
    Config,
    Data,
    Dense,
    Evaluate,
    Export,
    ImageTower,
    Model,
    MultipleNegatives,
    Optim,
    Retrieval,
    Set,
    Tar,
    Tower,
)

IMAGE = "google/vit-base-patch16-224-in21k"


def config() -> Config:
    """BERT-base as the text tower."""
    return recipe("lit", Tower(init="google-bert/bert-base-uncased", pooling="cls", **_head()))


def clip_text() -> Config:
    """CLIP's text tower from random weights."""
    text = Tower(arch=ClipText(), tokenizer="openai/clip-vit-base-patch32", pooling="lasttoken", **_head())
    return recipe("lit_clip_text", text)


def _head() -> dict:
    return {"dense": (Dense(768, activation="identity"),), "max_length": 16, "compute": "bfloat16", "remat": True}


def recipe(name: str, text: Tower) -> Config:
    held_out = Tar("pairs/test.tar")
    return Config(
        name=name,
        steps=60_000,
        model=Model(
            towers={"image": ImageTower(init=IMAGE, augment=Augment(flip=0.5), compute="bfloat16"), "text": text},
            columns={"anchor": "text", "positive": "image"},
        ),
        data=Data(
            batch_size=16_384,
            sets=(
                Set(
                    source=Tar("pairs/train-{00000..00999}.tar"),
                    columns={"anchor": "txt", "positive": "image"},
                    loss=MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", scale=10.0, learn_scale=True),
                    name="pairs",
                ),
            ),
            threads=32,
            prefetch=4,
        ),
        optim=Optim(
            learning_rate=1e-3,
            schedule="cosine",
            warmup=10_000,
            weight_decay=0.1,
            clip_norm=1.0,
            freeze=("^towers/image/",),
        ),
        checkpoint=Checkpoint(every=1000),
        evaluate=Evaluate(
            every=5000,
            tasks=(
                Retrieval(held_out, {"query": "txt", "document": "image"}, pictures=("document",), name="text_to_image"),
                Retrieval(held_out, {"query": "image", "document": "txt"}, pictures=("query",), name="image_to_text"),
            ),
        ),
        export=Export(format="none"),
    )
