"""SigLIP from random weights on image-text pairs, for a pod or many GPUs: ViT-B/16 and its larger and smaller kin.

    embedjax plan configs/siglip.py --topology v5e:16x16
    embedjax train configs/siglip.py --data.sets.0.source.path 'gs://bucket/train-{00000..09999}.tar' --run-dir runs/siglip

`configs/siglip.py` is ViT-B/16; `:b32`, `:l14`, `:l16` and `:so400m` behind the file's name are the others. Data:
webdataset shards, a picture and a .txt a sample. Recipe: the sigmoid loss with t' = ln 10 and b = -10 (Zhai et al. 2023,
section 3), Adam with b2 0.95 instead of 0.999 (section 4, on stability), and of SigLIP 2 (Tschannen et al. 2025, section 2)
rate 1e-3, decay 1e-4, gradients clipped to norm 1, batch 32k, 20,000 steps of warm-up, cosine, 40B pairs seen, 64 tokens.
Their decay is not multiplied by the rate, ours is: 1e-4 / 1e-3. Pictures of 224 pixels, squashed and otherwise as they are.
Hardware: a pod; `embedjax plan` tells what fits, and with which `--optim.cached` and `--mesh.fsdp`. Not trained here: no
score.
"""

from embedjax.config import (
    VITS,
    Checkpoint,
    Config,
    Data,
    Dense,
    Evaluate,
    Export,
    ImageTower,
    Model,
    Optim,
    Pixels,
    Retrieval,
    Set,
    Siglip,
    SiglipText,
    Tar,
    Tower,
)

PIXELS = Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fit="squash")
LARGE = SiglipText(width=1024, depth=24, heads=16, mlp=4096)


def config() -> Config:
    """ViT-B/16."""
    return recipe("siglip_b16", "B/16", SiglipText())


def b32() -> Config:
    return recipe("siglip_b32", "B/32", SiglipText())


def l14() -> Config:
    return recipe("siglip_l14", "L/14", LARGE, cached=8)


def l16() -> Config:
    return recipe("siglip_l16", "L/16", LARGE, cached=8)


def so400m() -> Config:
    """ViT-So400m/14, whose text tower has its width and depth too."""
    return recipe("siglip_so400m", "So400m/14", SiglipText(width=1152, depth=27, heads=16, mlp=4304), cached=8)


def recipe(name: str, size: str, text: SiglipText, *, cached: int = 1) -> Config:
    held_out = Tar("pairs/test.tar")
    return Config(
        name=name,
        steps=1_220_000,
        model=Model(
            towers={
                "image": ImageTower(arch=VITS[f"siglip-{size}"], pixels=PIXELS, compute="bfloat16", remat=True),
                "text": Tower(
                    arch=text,
                    tokenizer="google/siglip-base-patch16-224",
                    pooling="lasttoken",
                    max_length=64,
                    dense=(Dense(text.width, activation="identity"),),
                    compute="bfloat16",
                    remat=True,
                ),
            },
            columns={"anchor": "text", "positive": "image"},
        ),
        data=Data(
            batch_size=32_768,
            sets=(
                Set(
                    source=Tar("pairs/train-{00000..09999}.tar"),
                    columns={"anchor": "txt", "positive": "image"},
                    loss=Siglip(),
                    name="pairs",
                ),
            ),
            threads=32,
            prefetch=4,
        ),
        optim=Optim(
            learning_rate=1e-3, schedule="cosine", warmup=20_000, weight_decay=0.1, b2=0.95, clip_norm=1.0, cached=cached
        ),
        checkpoint=Checkpoint(every=2000),
        evaluate=Evaluate(
            every=10_000,
            tasks=(
                Retrieval(held_out, {"query": "txt", "document": "image"}, pictures=("document",), name="text_to_image"),
                Retrieval(held_out, {"query": "image", "document": "txt"}, pictures=("query",), name="image_to_text"),
            ),
        ),
        export=Export(format="none"),
    )
