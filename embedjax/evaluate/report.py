"""What a person reads at the end of a run: trained, untrained and BM25 side by side, and a few queries with what was found."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh as DeviceMesh

from embedjax.evaluate.bm25 import Words, bm25_rank
from embedjax.evaluate.tasks import RetrievalData, TaskData
from embedjax.load import Model

SHOWN = ("recall@1", "recall@10", "mrr@10", "ndcg@10")
EXAMPLES, BEST = 3, 3


def lines(
    model: Model,
    tasks: Sequence[TaskData],
    evaluations: Sequence[Mapping[str, float]],
    folder: Path,
    mesh: DeviceMesh | None = None,
) -> Iterator[str]:
    """A table a retrieval task, three of its queries with their best documents, and the commands to try next.

    `evaluations` are the run's: the first of step 0 is the untrained model's, the last the trained one's. Of several processes
    all have to call it, for all of the mesh encodes the examples; the lines are made as one of them reads them.
    """
    shown = [(task, list(examples(model, task, mesh))) for task in tasks if isinstance(task, RetrievalData)]
    return _told(shown, evaluations, folder)


def _told(
    shown: Sequence[tuple[RetrievalData, list[str]]], evaluations: Sequence[Mapping[str, float]], folder: Path
) -> Iterator[str]:
    for task, found in shown:
        yield from table(task, evaluations)
        yield from found
    yield f"\nThe model is in {folder}. Next:"
    yield f'  embedjax search {folder} --corpus DIR "what you look for"   # functions of your own code, or lines of any text'
    yield f"  embedjax encode {folder} texts.txt vectors.npy"
    yield "  embedjax train my_config.py                                # your own pairs: see configs/ for examples"


def table(task: RetrievalData, evaluations: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """One row a system. Of BM25's two ways to take words the better one is shown, and named."""
    rows: dict[str, Mapping[str, float]] = {}
    untrained = [row for row in evaluations if row["step"] == 0]
    if evaluations:
        rows["trained"] = evaluations[-1]
    name = task.task.name
    if untrained and f"{name}/{SHOWN[0]}" in untrained[0]:  # not for a task that was added later
        rows["untrained"] = untrained[0]
    system, scores = best_bm25(task)
    rows[system] = {f"{name}/{metric}": value for metric, value in scores.items()}
    yield f"\n{name}: {len(task.queries.texts)} held-out queries, {len(task.documents.texts)} documents"
    yield f"{'':<26}" + "".join(f"{metric:>11}" for metric in SHOWN)
    for system, row in rows.items():
        yield f"{system:<26}" + "".join(f"{row[f'{name}/{metric}']:>11.3f}" for metric in SHOWN)


def best_bm25(task: RetrievalData) -> tuple[str, dict[str, float]]:
    """BM25 on the same queries and documents, by whole words or with identifiers taken apart, whichever ranks better."""
    ways: dict[str, Words] = {"BM25": "plain", "BM25 (split identifiers)": "identifiers"}
    found = {
        name: task.measure(bm25_rank(task.queries.texts, task.documents.texts, task.depth(), words=words))
        for name, words in ways.items()
    }
    return max(found.items(), key=lambda item: item[1]["ndcg@10"])


def examples(model: Model, task: RetrievalData, mesh: DeviceMesh | None = None) -> Iterator[str]:
    """Evenly spaced queries with their three best documents, the right ones marked. No other query is encoded."""
    queries = np.linspace(0, len(task.queries.texts) - 1, EXAMPLES + 2).astype(int)[1:-1]
    for query, ranked in zip(queries, task.some(queries).rank(model, mesh, BEST), strict=True):
        yield f"\n? {_line(task.queries.texts[query], 110)}"
        for place, document in enumerate(ranked[ranked >= 0], 1):
            mark = "*" if task.judgements[query].get(int(document), 0) > 0 else " "
            yield f"  {place}{mark} {_line(task.documents.texts[document], 110)}"


def _line(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
