"""What a person reads at the end of a run: trained, untrained and BM25 side by side (of pictures chance instead of BM25), a few
queries with what was found, and of pictures a contact sheet."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Int

from embedjax.evaluate import scores, sheet
from embedjax.evaluate.bm25 import Words, bm25_rank
from embedjax.evaluate.tasks import RetrievalData, TaskData
from embedjax.load import Model

SHOWN = {name: name for name in ("recall@1", "recall@10", "mrr@10", "ndcg@10")}
OF_PICTURES = {"success@1": "R@1", "success@5": "R@5", "success@10": "R@10", "mrr@10": "mrr@10"}
EXAMPLES, BEST = 3, 3
ON_A_SHEET, BEST_PICTURES = 24, 8


class Example(NamedTuple):
    """A query by its number, and the documents found for it, best first."""

    query: int
    ranked: Int[np.ndarray, " k"]


def lines(
    model: Model,
    tasks: Sequence[TaskData],
    evaluations: Sequence[Mapping[str, float]],
    folder: Path,
    mesh: DeviceMesh | None = None,
    sheets: Path | None = None,
    beside: Mapping[str, Mapping[str, float]] | None = None,
) -> Iterator[str]:
    """A table a retrieval task, three of its queries with their best documents, and the commands to try next. Where texts find
    pictures, a contact sheet is written into the folder `sheets`.

    `evaluations` are the run's: the first of step 0 is the untrained model's, the last the trained one's; `beside` are the
    scores of others, by what they are called. Of several processes all have to call it, for all of the mesh encodes the
    examples; lines and sheets are made as one of them reads the lines.
    """
    shown = [(task, examples(model, task, mesh)) for task in tasks if isinstance(task, RetrievalData)]
    return _told(shown, evaluations, beside or {}, folder, sheets)


def _told(
    shown: Sequence[tuple[RetrievalData, Sequence[Example]]],
    evaluations: Sequence[Mapping[str, float]],
    beside: Mapping[str, Mapping[str, float]],
    folder: Path,
    sheets: Path | None,
) -> Iterator[str]:
    for task, found in shown:
        yield from table(task, evaluations, beside)
        for at in _spread(len(found), EXAMPLES):
            yield from told(task, found[at])
        if found and task.documents.pictures and sheets is not None:
            yield f"\nfor {len(found)} queries the pictures themselves: {write_sheet(task, found, sheets)}"
    yield f"\nThe model is in {folder}. Next:"
    where, what = "--corpus DIR", "functions of your own code, or lines of any text"
    if any(task.task.pictures for task, _ in shown):
        where, what = "--images DIR", "your own pictures"
    yield f'  embedjax search {folder} {where} "what you look for"   # {what}'
    yield f"  embedjax encode {folder} texts.txt vectors.npy"
    yield "  embedjax train my_config.py                                # your own pairs: see configs/ for examples"


def table(
    task: RetrievalData, evaluations: Sequence[Mapping[str, float]], beside: Mapping[str, Mapping[str, float]]
) -> Iterator[str]:
    """One row a system. Of BM25's two ways to take words the better one is shown, and named."""
    rows: dict[str, Mapping[str, float]] = {}
    metrics = OF_PICTURES if task.task.pictures else SHOWN
    untrained = [row for row in evaluations if row["step"] == 0]
    if evaluations:
        rows["trained"] = evaluations[-1]
    name = task.task.name
    rows |= {other: row for other, row in beside.items() if f"{name}/{next(iter(metrics))}" in row}
    if untrained and f"{name}/{next(iter(metrics))}" in untrained[0]:  # not for a task that was added later
        rows["untrained"] = untrained[0]
    system, known = "chance", scores.by_chance(task.judgements, len(task.documents.texts))
    if not task.task.pictures:
        system, known = best_bm25(task)
    rows[system] = {f"{name}/{metric}": value for metric, value in known.items()}
    yield f"\n{name}: {len(task.queries.texts)} held-out queries, {len(task.documents.texts)} documents"
    yield f"{'':<26}" + "".join(f"{shown:>11}" for shown in metrics.values())
    for system, row in rows.items():
        yield f"{system:<26}" + "".join(f"{row[f'{name}/{metric}']:>11.3f}" for metric in metrics)


def best_bm25(task: RetrievalData) -> tuple[str, dict[str, float]]:
    """BM25 on the same queries and documents, by whole words or with identifiers taken apart, whichever ranks better."""
    ways: dict[str, Words] = {"BM25": "plain", "BM25 (split identifiers)": "identifiers"}
    found = {
        name: task.measure(bm25_rank(task.queries.texts, task.documents.texts, task.depth(), words=words))
        for name, words in ways.items()
    }
    return max(found.items(), key=lambda item: item[1]["ndcg@10"])


def examples(model: Model, task: RetrievalData, mesh: DeviceMesh | None = None) -> list[Example]:
    """Evenly spaced queries with their best documents: three, or as many as a sheet of pictures shows; none where queries are
    pictures. No other query is encoded."""
    if task.queries.pictures:
        return []
    count, best = (ON_A_SHEET, BEST_PICTURES) if task.documents.pictures else (EXAMPLES, BEST)
    queries = _spread(len(task.queries.texts), count)
    ranked = task.some(queries).rank(model, mesh, best)
    return [Example(int(query), row[row >= 0]) for query, row in zip(queries, ranked, strict=True)]


def told(task: RetrievalData, found: Example) -> Iterator[str]:
    """A query and its three best documents, the right ones marked; of a picture what it is known as."""
    yield f"\n? {_line(task.queries.texts[found.query], 110)}"
    for place, document in enumerate(found.ranked[:BEST], 1):
        text = caption(task, int(document)) if task.documents.pictures else task.documents.texts[document]
        yield f"  {place}{'*' if _right(task, found.query, int(document)) else ' '} {_line(text, 110)}"


def write_sheet(task: RetrievalData, found: Sequence[Example], folder: Path) -> Path:
    """The contact sheet sheet-NAME.html of a task in a folder; returns the file."""
    rows = []
    for query, ranked in found:
        pictures = [
            sheet.Found(task.documents.texts[document], caption(task, document), _right(task, query, document))
            for document in map(int, ranked)
        ]
        rows.append((task.queries.texts[query], pictures))
    name = re.sub(r"[^\w.-]+", "-", task.task.name)
    file = folder / f"sheet-{name}.html"
    file.write_text(sheet.page(f"{task.task.name}: {len(rows)} of {len(task.queries.texts)} queries", rows), encoding="utf-8")
    return file


def caption(task: RetrievalData, document: int) -> str:
    """The first query that a picture is right for; a picture that is right for none has none."""
    names = (text for text, judged in zip(task.queries.texts, task.judgements, strict=True) if judged.get(document, 0) > 0)
    return next(names, "")


def _right(task: RetrievalData, query: int, document: int) -> bool:
    return task.judgements[query].get(document, 0) > 0


def _spread(count: int, wanted: int) -> Int[np.ndarray, " n"]:
    """`wanted` places of `count`, evenly spaced and the ends left out; all where there are no more."""
    return np.arange(count) if count <= wanted else np.linspace(0, count - 1, wanted + 2).astype(int)[1:-1]


def _line(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
