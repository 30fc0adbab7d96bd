"""`embedjax search`: the texts or pictures nearest to a text or picture, with the corpus encoded once and kept in the user's
cache.

A corpus is a file of texts (.txt, .jsonl, .csv, .tsv, .parquet), a folder, whose Python functions are its texts, or pictures: a
folder of them, a table of their paths or bytes, or tar archives.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from jax.sharding import Mesh as DeviceMesh
from rich.console import Console
from rich.text import Text

from embedjax.config.errors import ConfigError
from embedjax.evaluate import heat
from embedjax.evaluate.encode import side_of
from embedjax.evaluate.matches import Match
from embedjax.load import Model
from embedjax.search.corpus import Corpus, Gallery, Progress, open_corpus, open_gallery
from embedjax.search.tokens import How, nearest
from embedjax.search.vectors import Compared, nearest_vectors, stages_of

__all__ = [
    "Compared",
    "Corpus",
    "Gallery",
    "Hit",
    "How",
    "open_corpus",
    "open_gallery",
    "page",
    "search",
    "show",
    "stages_of",
]

LINES_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Hit:
    """A text or picture found: rank from 1, similarity, where it stands, and by late interaction which tokens matched."""

    rank: int
    score: float
    text: str
    place: str
    match: Match | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def title(self) -> str:
        return f"{self.rank}  {self.score:.3f}  {self.place}"


def search(
    model: Model,
    corpus: Corpus | Gallery,
    query: str | Path,
    k: int = 5,
    *,
    how: How | Compared | None = None,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Hit]:
    """The min(k, N) texts or pictures nearest to the query, a text or the Path of a picture, as the model compares; fewer where
    a first stage found fewer. `how` is a How for models of late interaction, for others a Compared. `task` names the prompt,
    adapter or both to encode with; `cache` is a folder that keeps the corpus's vectors."""
    if isinstance(query, str) and not query.strip():
        raise ConfigError("the query is empty")
    if k < 1:
        raise ConfigError(f"{k} results were asked for; it must be at least 1")
    side_of(model.config, "query", isinstance(query, Path))  # these raise where no tower takes what is asked for,
    side_of(model.config, "document", corpus.pictures)  # or searched
    options = {"task": task, "mesh": mesh, "cache": cache, "progress": progress}
    if model.config.late:
        if isinstance(how, Compared):
            raise ConfigError(f"a funnel (Compared) is for models of one vector a text; {model.origin} compares tokens")
        assert isinstance(corpus, Corpus) and isinstance(query, str), "a model of late interaction has towers of texts alone"
        best = nearest(model, corpus, query, k, how or How(), **options)
        return [Hit(n, score, *corpus.shown(row), match) for n, (score, row, match) in enumerate(best, 1)]
    if isinstance(how, How):
        raise ConfigError(f"pool and a first stage are for late interaction; {model.origin} has one vector a text")
    found = nearest_vectors(model, corpus, query, k, how or Compared(), **options)
    return [Hit(rank, score, *corpus.shown(row)) for rank, (score, row) in enumerate(found, 1)]


def show(hits: Sequence[Hit], out: TextIO | None = None) -> None:
    """Prints the hits: in colour and cut to the width on a terminal, as `rank score place` and indented text elsewhere. By late
    interaction a line tells what the query's tokens took; on a terminal the text is coloured by it."""
    stream: TextIO = out or sys.stdout
    console = Console(file=stream) if stream.isatty() else None
    width = shutil.get_terminal_size().columns
    for hit in hits:
        if console:
            console.print(Text(hit.title, style="bold"), overflow="ellipsis", no_wrap=True)
            for line in heat.lines(hit.match or hit.text, LINES_SHOWN, width - 5):
                console.print(Text("    ") + line)
            if hit.match:
                console.print(Text(f"    ~ {heat.line(hit.match)}"[: width - 1], style="dim"))
        else:
            lines = [f"    {line}" for line in hit.text.splitlines() if line.strip()][:LINES_SHOWN]
            matched = [f"    ~ {heat.line(hit.match)}"] if hit.match else []
            print(hit.title, *lines, *matched, sep="\n", file=stream)


def page(query: str, hits: Sequence[Hit]) -> str:
    """The heat map of a search as an HTML page. Raises ConfigError where nothing was found by late interaction."""
    shown = [heat.Shown(hit.title, hit.match) for hit in hits if hit.match]
    if len(shown) < len(hits):
        raise ConfigError("a heat map shows which tokens matched; this model has one vector a text")
    return heat.page(query, shown)
