"""The same training in sentence-transformers and in embedjax: eight losses from the real MiniLM, on the same rows.

    python tests/benchmarks/parity.py [--cases cosent,nli] [--steps 50] [--dropout --seeds 3]

Without dropout both sides compute the same numbers: the table shows how far the losses of the steps lie apart, and the score
on held-out data. With `--dropout` each draws its own masks, and the mean score over seeds is compared, beside the standard
error of the difference. Both sides: batches of the same rows in the same order, AdamW with the same learning rate, warm-up,
linear decay and clipping. The torch side is sentence-transformers' own model and loss in a plain loop; both are scored by
`embedjax evaluate`. Needs $EMBEDJAX_DATA and the reference extra.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import corpora
import numpy as np

from embedjax import config as c

BATCH, RATE, WARMUP = 32, 2e-5, 0.1
LABELS = ("entailment", "neutral", "contradiction")


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss on both sides, the rows it trains on and the task that scores it."""

    columns: tuple[str, ...]
    rows: Callable[[], list[tuple]]
    loss: c.Loss
    torch_loss: Callable[[Any, Any], Any]
    """`(model, losses module) -> loss module`."""
    task: Callable[[pathlib.Path], c.Task]
    labels: tuple[str, ...] = ()
    length: int = 32
    batch: int = BATCH


def sts_task(folder: pathlib.Path) -> c.Task:
    file = corpora.write(folder / "dev.jsonl", ("a", "b", "score"), corpora.stsb("dev"))
    return c.Sts(c.File(str(file)), {"a": "a", "b": "b", "score": "score"}, name="dev")


def triplet_task(folder: pathlib.Path) -> c.Task:
    file = corpora.write(folder / "dev.jsonl", ("a", "p", "n"), corpora.snli_triplets("test"))
    return c.TripletAccuracy(c.File(str(file)), {"anchor": "a", "positive": "p", "negative": "n"}, name="dev")


def knn_task(folder: pathlib.Path) -> c.Task:
    train = corpora.write(folder / "train.jsonl", ("text", "label"), corpora.trec("train"))
    test = corpora.write(folder / "dev.jsonl", ("text", "label"), corpora.trec("test"))
    return c.KnnClassification(c.File(str(test)), train=c.File(str(train)), name="dev")


def caption_task(folder: pathlib.Path) -> c.Task:
    file = corpora.write(folder / "dev.jsonl", ("query", "document"), corpora.caption_pairs("val", 1))
    return c.Retrieval(c.File(str(file)), {"query": "query", "document": "document"}, name="dev")


def scifact_task(folder: pathlib.Path) -> c.Task:
    documents, claims, relevant = corpora.scifact()
    corpora.write(folder / "corpus.jsonl", ("_id", "text"), documents.items())
    corpora.write(folder / "queries.jsonl", ("_id", "text"), claims.items())
    corpora.write(folder / "judged.jsonl", ("query", "document"), relevant["test"])
    file = lambda name: c.File(str(folder / f"{name}.jsonl"))
    return c.Retrieval(
        file("judged"),
        {"query_id": "query", "document_id": "document"},
        file("queries"),
        file("corpus"),
        corpus_columns={"id": "_id", "text": "text"},
        name="dev",
    )


def scifact_pairs() -> list[tuple]:
    documents, claims, relevant = corpora.scifact()
    return [(claims[query], documents[document]) for query, document in relevant["train"]]


def thresholded() -> list[tuple]:
    """STS-B pairs as alike (above 3 of 5) or not."""
    return [(a, b, int(score > 0.6)) for a, b, score in corpora.stsb("train")]


def questions() -> list[tuple]:
    return list(corpora.trec("train"))


PAIR, SCORED, LABELLED = ("anchor", "positive"), ("anchor", "positive", "score"), ("anchor", "positive", "label")
TREC = tuple(sorted({"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}))

CASES = {
    "cosent": Case(SCORED, lambda: list(corpora.stsb("train")), c.CoSent(), lambda m, losses: losses.CoSENTLoss(m), sts_task),
    "cosine": Case(
        SCORED,
        lambda: list(corpora.stsb("train")),
        c.CosineRegression(),
        lambda m, losses: losses.CosineSimilarityLoss(m),
        sts_task,
    ),
    "nli": Case(
        LABELLED,
        lambda: list(corpora.snli("dev")),
        c.ClassifyPair(),
        lambda m, losses: losses.SoftmaxLoss(m, 384, 3),
        sts_task,
        LABELS,
    ),
    "mnrl-negatives": Case(
        ("anchor", "positive", "negative"),
        lambda: list(corpora.snli_triplets("dev")),
        c.MultipleNegatives(mask_duplicates=False),
        lambda m, losses: losses.MultipleNegativesRankingLoss(m),
        triplet_task,
    ),
    "contrastive": Case(LABELLED, thresholded, c.Contrastive(), lambda m, losses: losses.ContrastiveLoss(m), sts_task),
    "online-contrastive": Case(
        LABELLED, thresholded, c.OnlineContrastive(), lambda m, losses: losses.OnlineContrastiveLoss(m), sts_task
    ),
    "batch-hard": Case(
        ("anchor", "label"), questions, c.BatchHard(), lambda m, losses: losses.BatchHardTripletLoss(m), knn_task, TREC
    ),
    "mnrl-captions": Case(
        PAIR,
        lambda: list(corpora.caption_pairs("train", 0)),
        c.MultipleNegatives(mask_duplicates=False),
        lambda m, losses: losses.MultipleNegativesRankingLoss(m),
        caption_task,
    ),
    "mnrl-scifact": Case(
        PAIR,
        scifact_pairs,
        c.MultipleNegatives(mask_duplicates=False),
        lambda m, losses: losses.MultipleNegativesRankingLoss(m),
        scifact_task,
        length=128,
        batch=16,
    ),
}


def experiment(case: Case, file: pathlib.Path, steps: int, seed: int, dropout: bool) -> c.Config:
    """The embedjax side: the rows of `file` in their order."""
    from embedjax.models.folders import read_tower

    arch = read_tower(corpora.minilm()).arch
    assert arch is not None
    if not dropout:
        arch = dataclasses.replace(arch, dropout=0.0, attention_dropout=0.0)
    sets = (c.Set(c.File(str(file)), {name: name for name in case.columns}, case.loss, labels=case.labels),)
    return c.Config(
        name="parity",
        seed=seed,
        steps=steps,
        model=c.Model({"text": c.Tower(arch, init=str(corpora.minilm()), max_length=case.length)}),
        data=c.Data(batch_size=case.batch, sets=sets, shuffle=False),
        optim=c.Optim(learning_rate=RATE, warmup=WARMUP),
        export=c.Export("none"),
        log_every=1,
    )


def train_ours(config: c.Config, folder: pathlib.Path) -> list[float]:
    """The loss of every step."""
    from embedjax.train import train

    train(config, folder)
    return [row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def train_theirs(case: Case, config: c.Config, rows: Sequence[tuple], folder: pathlib.Path, heads: dict | None) -> list[float]:
    """The same in sentence-transformers; the trained model is saved in `folder`. A new head starts from our weights."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    from embedjax import optim

    torch.manual_seed(config.seed)
    arch = config.model.towers["text"].arch
    assert arch is not None
    rates = {"hidden_dropout_prob": arch.dropout, "attention_probs_dropout_prob": arch.attention_dropout}
    model = SentenceTransformer(str(corpora.minilm()), device="cpu", config_kwargs=rates)
    model.max_seq_length = case.length
    loss = case.torch_loss(model, losses)
    if heads:
        loss.classifier.weight.data = torch.from_numpy(np.asarray(heads["kernel"]).T.copy())
        loss.classifier.bias.data = torch.from_numpy(np.asarray(heads["bias"]).copy())
    plain = lambda name: name.endswith("bias") or "LayerNorm" in name
    groups = [
        {
            "params": [p for n, p in loss.named_parameters() if plain(n) is bare],
            "weight_decay": 0.0 if bare else config.optim.weight_decay,
        }
        for bare in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, eps=config.optim.eps)
    schedule = optim.schedule(config.optim, config.steps)
    texts = [name for name in case.columns if name not in ("score", "label")]
    model.train()
    found = []
    for step in range(config.steps):
        batch = rows[step * case.batch : (step + 1) * case.batch]
        features = [model.preprocess([row[case.columns.index(name)] for row in batch]) for name in texts]
        target = None
        if len(texts) < len(case.columns):
            values = [row[-1] for row in batch]
            target = torch.tensor([case.labels.index(value) for value in values] if case.labels else values)
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        optimizer.zero_grad()
        value = loss(features, target)
        value.backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), config.optim.clip_norm)
        optimizer.step()
        found.append(value.item())
    model.save_pretrained(str(folder))
    return found


def compare(case: Case, steps: int, seeds: Sequence[int], dropout: bool, work: pathlib.Path) -> dict[str, float]:
    """Mean scores, the standard error of their difference, and the largest relative difference of a step's loss."""
    from embedjax.evaluate import tasks
    from embedjax.load import load

    prepared = tasks.prepare([case.task(work)])
    score = lambda name: tasks.evaluate(load(name), prepared)[case.task(work).main_metric]
    apart, ours, theirs = [], [], []
    for seed in seeds:
        rows = case.rows()
        random.Random(seed).shuffle(rows)
        rows = (rows * (1 + steps * case.batch // len(rows)))[: steps * case.batch]
        folder = work / f"seed-{seed}"
        folder.mkdir()
        config = experiment(case, corpora.write(folder / "rows.jsonl", case.columns, rows), steps, seed, dropout)
        a = train_ours(config, folder / "run")
        b = train_theirs(
            case, config, rows, folder / "theirs", first_heads(config, folder) if case.columns is LABELLED else None
        )
        apart.append(max(abs(x - y) / max(abs(y), 1e-3) for x, y in zip(a, b, strict=True)))
        ours.append(score(folder / "run"))
        theirs.append(score(folder / "theirs"))
    between = [a - b for a, b in zip(ours, theirs, strict=True)]
    return {
        "before": score(corpora.minilm()),
        "ours": statistics.mean(ours),
        "theirs": statistics.mean(theirs),
        "apart": max(apart),
        "error": statistics.stdev(between) / len(between) ** 0.5 if len(between) > 1 else float("nan"),
    }


def first_heads(config: c.Config, folder: pathlib.Path) -> dict | None:
    """What the loss itself trains, as the run began."""
    from embedjax import build

    made = build.build(build.resolve(config), folder / "first")
    return made.init()[0].params.get("loss", {}).get("train")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dropout", action="store_true")
    arguments = parser.parse_args()
    last = "standard error" if arguments.dropout else "losses apart"
    print(f"{'case':<20}{'before':>9}{'theirs':>9}{'ours':>9}{last:>16}", flush=True)
    for name in arguments.cases.split(","):
        with tempfile.TemporaryDirectory() as work:
            found = compare(CASES[name], arguments.steps, range(arguments.seeds), arguments.dropout, pathlib.Path(work))
        apart = f"{found['error']:.4f}" if arguments.dropout else f"{found['apart']:.1e}"
        print(f"{name:<20}{found['before']:>9.4f}{found['theirs']:>9.4f}{found['ours']:>9.4f}{apart:>16}", flush=True)


if __name__ == "__main__":
    corpora.with_allocator()
    main()
