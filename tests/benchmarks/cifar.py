"""CLIP on ten classes of photos, some minutes of training from random weights: zero-shot accuracy on held-out photos.

    python tests/benchmarks/cifar.py [--steps 600] [--no-restart]

A small ViT and a small text tower learn 9,000 photos of 32 x 32 and captions made of their classes' names, with and without
Matryoshka; rows of equal captions are no negatives of each other. 1,000 other photos are each given the class whose caption is
nearest, by vectors of five sizes. The first steps are taken again with a stop half way. Needs $EMBEDJAX_DATA.
"""

import argparse
import pathlib
import random
import tempfile

import corpora

from embedjax import config as c

HELD_OUT, DIMS = 1000, (128, 64, 32, 16, 8)
TEMPLATE = "a photo of a {}"
LOSSES = {"plain": (), "matryoshka": DIMS}


def prepare(work: pathlib.Path) -> tuple[c.File, c.File]:
    """Training and test rows, as many of each class."""
    rows = [(file, name, TEMPLATE.format(name)) for file, name in corpora.cifar(work)]
    random.Random(0).shuffle(rows)
    rows.sort(key=lambda row: row[1])
    each = HELD_OUT // 10
    test = [row for n, row in enumerate(rows) if n % 1000 < each]
    train = [row for n, row in enumerate(rows) if n % 1000 >= each]
    write = lambda name, some: c.File(str(corpora.write(work / f"{name}.jsonl", ("image", "label", "caption"), some)))
    return write("train", train), write("test", test)


def experiment(train: c.File, test: c.File, dims: tuple[int, ...], steps: int) -> c.Config:
    head = (c.Dense(DIMS[0], bias=False, activation="identity"),)
    image = c.ImageTower(
        c.Vit(image=32, patch=4, width=128, depth=4, heads=4, mlp=512, pool="mean", patch_dropout=0.5),
        augment=c.Augment(area=(0.5, 1.0), flip=0.5),
        dense=head,
    )
    arch = c.Bert(vocab_size=256, width=64, depth=1, heads=2, mlp=128, positions=16, dropout=0.0, attention_dropout=0.0)
    text = c.Tower(arch, tokenizer="wordpiece", max_length=12, dense=head)
    loss = c.MultipleNegatives(
        directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True, matryoshka=dims
    )
    return c.Config(
        name="cifar",
        steps=steps,
        model=c.Model({"image": image, "text": text}, {"anchor": "text", "positive": "image"}),
        data=c.Data(batch_size=128, sets=(c.Set(train, {"anchor": "caption", "positive": "image"}, loss),)),
        optim=c.Optim(learning_rate=1e-3, schedule="cosine", weight_decay=0.05),
        evaluate=c.Evaluate(tasks=(c.ZeroShot(test, templates=(TEMPLATE,), name="class", dims=DIMS[1:]),), baseline=not dims),
        export=c.Export("none"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--restart", action=argparse.BooleanOptionalAction, default=True, help="take the first steps again, with a stop"
    )
    arguments = parser.parse_args()
    from again import check

    from embedjax.runs import evaluations
    from embedjax.train import train

    scores, told = {}, ""
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        files = prepare(work)
        for which, dims in LOSSES.items():
            config = experiment(*files, dims, arguments.steps)
            scores[which] = train(config, work / which).scores
            if not dims:
                scores = {"untrained": evaluations(work / which)[0], **scores}
            if arguments.restart and not told:
                told = check(config, work)
    print(f"\nzero-shot accuracy on {HELD_OUT} held-out photos of ten classes, by numbers of a vector; chance 0.100\n")
    print("| loss |" + "".join(f" {d} |" for d in DIMS) + "\n" + "|---" * (1 + len(DIMS)) + "|")
    for which, found in scores.items():
        row = [found["class/top1" if d == DIMS[0] else f"class@{d}/top1"] for d in DIMS]
        print(f"| {which} |" + "".join(f" {value:.3f} |" for value in row))
    print(f"\n{told}")


if __name__ == "__main__":
    corpora.with_allocator()
    main()
