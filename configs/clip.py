"""CLIP from random weights on image-text pairs, for a pod or many GPUs: ViT-B/32, B/16 and L/14 as OpenAI trained them.

    embedjax plan configs/clip.py:l14 --topology v5e:16x16
    embedjax train configs/clip.py --data.sets.0.source.path 'gs://bucket/pairs/train-{00000..09999}.tar' --run-dir runs/clip

`configs/clip.py` is ViT-B/32, `configs/clip.py:b16` and `configs/clip.py:l14` the larger ones, `configs/clip.py:rn50`
ResNet-50, `configs/clip.py:distilled` a ViT-B/16 that a pretrained ViT-L/14 teaches. Data: webdataset shards, a picture and
a .txt a sample; 400M pairs are what the steps are for. Recipe: Radford et al. 2021, tables 18 to 20 (batch 32,768, 32
epochs, Adam with b2 0.98 and eps 1e-6, decay 0.2, 2,000 steps of warm-up, cosine; rate 5e-4, for L/14 4e-4; 224 pixels, 77
tokens with both ends). Its random square crop is here one of 90 % to all of the picture's area, as open_clip has it.
Hardware: a pod; layers are recomputed in the backward pass, and the batch of L/14 is embedded in chunks. What fits, and
with which `--optim.cached` and `--mesh.fsdp`, `embedjax plan` tells. Not trained here: no score.
"""

from embedjax.config import (
    RESNETS,
    VITS,
    Augment,
    Checkpoint,
    ClipText,
    Config,
    ContrastiveDistillation,
    Data,
    Dense,
    Evaluate,
    Export,
    ImageTower,
    Loss,
    Model,
    MultipleNegatives,
    Optim,
    Retrieval,
    Set,
    Sum,
    Tar,
    Tower,
    VectorDistillation,
)

TOKENIZER = "openai/clip-vit-base-patch32"
SYMMETRIC = MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True)
CROPS = Augment(area=(0.9, 1.0))


def config() -> Config:
    """ViT-B/32."""
    return recipe("clip_b32", pair("B/32", ClipText(), 512))


def b16() -> Config:
    return recipe("clip_b16", pair("B/16", ClipText(), 512))


def l14() -> Config:
    return recipe("clip_l14", pair("L/14", ClipText(width=768, heads=12, mlp=3072), 768), rate=4e-4, cached=8)


def rn50() -> Config:
    """ResNet-50 in CLIP's form, whose pooling has its own projection, with Adam's usual b2 and eps. It is normalised by the
    whole batch, which is therefore not embedded in chunks."""
    text = pair("B/32", ClipText(), 1024)["text"]
    image = ImageTower(arch=RESNETS["RN50"], augment=CROPS, compute="bfloat16", remat=True)
    return recipe("clip_rn50", {"image": image, "text": text}, b2=0.999, eps=1e-8)


def distilled() -> Config:
    """CLIP-KD (Yang et al. 2024) with the weights of its code: the teacher's relations (1) and vectors (2,000), which the
    student's are as wide as."""
    teacher = "openai/clip-vit-large-patch14"
    frozen = {
        "teacher_image": ImageTower(init=teacher, compute="bfloat16"),
        "teacher_text": Tower(init=teacher, compute="bfloat16"),
    }
    names = {"teacher": "teacher_text", "document_teacher": "teacher_image"}
    loss = Sum(
        losses=(
            SYMMETRIC,
            ContrastiveDistillation(scale=1 / 0.07, learn_scale=True, teacher_scale=100.0, **names),
            VectorDistillation(**names),
        ),
        weights=(1.0, 1.0, 2000.0),
    )
    student = pair("B/16", ClipText(), 768, tokenizer=teacher)
    return recipe("clip_distilled", {**student, **frozen}, loss, freeze=("^towers/teacher_",))


def pair(size: str, text: ClipText, width: int, tokenizer: str = TOKENIZER) -> dict[str, ImageTower | Tower]:
    """Image and text tower with vectors of `width` numbers."""
    shared = {"dense": (Dense(width, bias=False, activation="identity"),), "compute": "bfloat16", "remat": True}
    return {
        "image": ImageTower(arch=VITS[f"clip-{size}"], augment=CROPS, **shared),
        "text": Tower(arch=text, tokenizer=tokenizer, pooling="lasttoken", max_length=77, **shared),
    }


def recipe(
    name: str,
    towers: dict[str, ImageTower | Tower],
    loss: Loss = SYMMETRIC,
    *,
    rate: float = 5e-4,
    b2: float = 0.98,
    eps: float = 1e-6,
    cached: int = 1,
    freeze: tuple[str, ...] = (),
) -> Config:
    held_out = Tar("pairs/test.tar")
    return Config(
        name=name,
        steps=390_000,
        model=Model(towers, {"anchor": "text", "positive": "image"}),
        data=Data(
            batch_size=32_768,
            sets=(
                Set(
                    source=Tar("pairs/train-{00000..09999}.tar"),
                    columns={"anchor": "txt", "positive": "image"},
                    loss=loss,
                    name="pairs",
                ),
            ),
            threads=32,
            prefetch=4,
        ),
        optim=Optim(
            learning_rate=rate,
            schedule="cosine",
            warmup=2000,
            weight_decay=0.2,
            b1=0.9,
            b2=b2,
            eps=eps,
            clip_norm=0.0,
            cached=cached,
            freeze=freeze,
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
