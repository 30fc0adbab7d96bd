"""Classification by fine-tuning the real MiniLM, in embedjax and in transformers, on the same rows; clusters before and after.

    python tests/benchmarks/classes.py [--sets trec,banking77] [--epochs 2] [--clusters 50]

Both sides: batches of 32 in the same order, AdamW at 1e-4 with warm-up and linear decay, dropout 0.1, the head on one vector a
text (transformers: its own sequence classifier; embedjax: the mean of the tokens). `--clusters` trains with the supervised
contrastive loss on half of the 20 newsgroups' messages and gives the v-measure of k-means on the other half.
Needs $EMBEDJAX_DATA and the reference extra.
"""

import argparse
import json
import pathlib
import random
import tempfile
from collections.abc import Sequence

import corpora

from embedjax import config as c

BATCH, RATE, LENGTH = 32, 1e-4, 32
SETS = {"trec": corpora.trec, "banking77": corpora.banking77}

Rows = list[tuple[str, str]]


def in_order(rows: Rows, epochs: int, seed: int) -> Rows:
    """The rows of all batches of a run, each epoch shuffled anew."""
    rng, found = random.Random(seed), []
    for _ in range(epochs):
        found += rng.sample(rows, len(rows) // BATCH * BATCH)
    return found


def ours(train_rows: Rows, test_rows: Rows, labels: tuple[str, ...], work: pathlib.Path) -> float:
    from embedjax.train import train

    file = c.File(str(corpora.write(work / "train.jsonl", ("text", "label"), train_rows)))
    test = c.File(str(corpora.write(work / "test.jsonl", ("text", "label"), test_rows)))
    sets = (c.Set(file, {"anchor": "text", "label": "label"}, c.Classify(), labels=labels),)
    config = c.Config(
        name="classes",
        steps=len(train_rows) // BATCH,
        model=c.Model({"text": c.Tower(init=str(corpora.minilm()), max_length=LENGTH, normalize=False)}),
        data=c.Data(batch_size=BATCH, sets=sets, shuffle=False),
        optim=c.Optim(learning_rate=RATE),
        evaluate=c.Evaluate(tasks=(c.HeadAccuracy(test, name="test"),)),
        export=c.Export("none"),
    )
    return train(config, work / "run").scores["test/accuracy"]


def theirs(train_rows: Rows, test_rows: Rows, labels: tuple[str, ...]) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from embedjax import optim

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(corpora.minilm())
    model = AutoModelForSequenceClassification.from_pretrained(corpora.minilm(), num_labels=len(labels))
    steps = len(train_rows) // BATCH
    schedule = optim.schedule(c.Optim(learning_rate=RATE), steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    tokens = lambda texts: tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    model.train()
    for step in range(steps):
        batch = train_rows[step * BATCH : (step + 1) * BATCH]
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        optimizer.zero_grad()
        target = torch.tensor([labels.index(label) for _, label in batch])
        model(**tokens([text for text, _ in batch]), labels=target).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for at in range(0, len(test_rows), 64):
            part = test_rows[at : at + 64]
            guess = model(**tokens([text for text, _ in part])).logits.argmax(-1).tolist()
            right += sum(labels[found] == label for found, (_, label) in zip(guess, part, strict=True))
    return right / len(test_rows)


def clusters(steps: int, work: pathlib.Path) -> Sequence[dict]:
    """The evaluations before and after training."""
    from embedjax.runs import evaluations
    from embedjax.train import train

    rows = corpora.newsgroups()
    files = [c.File(str(corpora.write(work / f"half-{half}.jsonl", ("text", "label"), rows[half::2]))) for half in (0, 1)]
    labels = tuple(sorted({label for _, label in rows}))
    sets = (c.Set(files[0], {"anchor": "text", "label": "label"}, c.SupCon(), labels=labels),)
    config = c.Config(
        name="clusters",
        steps=steps,
        model=c.Model({"text": c.Tower(init=str(corpora.minilm()), max_length=96)}),
        data=c.Data(batch_size=40, sets=sets),
        optim=c.Optim(learning_rate=5e-5),
        evaluate=c.Evaluate(tasks=(c.Clustering(files[1], name="held-out"),), baseline=True),
        export=c.Export("none"),
    )
    train(config, work / "run")
    return evaluations(work / "run")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--clusters", type=int, default=0, metavar="STEPS")
    arguments = parser.parse_args()
    for name in filter(None, arguments.sets.split(",")):
        train_rows, test_rows = SETS[name]("train"), SETS[name]("test")
        labels = tuple(sorted({label for _, label in train_rows}))
        train_rows = in_order(train_rows, arguments.epochs, 0)
        with tempfile.TemporaryDirectory() as work:
            found = ours(train_rows, test_rows, labels, pathlib.Path(work))
        other = theirs(train_rows, test_rows, labels)
        print(f"{name:<10} test accuracy: embedjax {found:.4f}, transformers {other:.4f}", flush=True)
    if arguments.clusters:
        with tempfile.TemporaryDirectory() as work:
            for row in clusters(arguments.clusters, pathlib.Path(work)):
                print("newsgroups", json.dumps(row), flush=True)


if __name__ == "__main__":
    corpora.with_allocator()
    main()
