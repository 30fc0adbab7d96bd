"""Search by one vector a text or picture: over whole vectors, prefixes and codes of them, or in stages of these."""

import dataclasses
from pathlib import Path
from typing import get_args

import numpy as np
from jax.sharding import Mesh as DeviceMesh

from embedjax.config import Precision
from embedjax.config.errors import ConfigError, nearest
from embedjax.evaluate.encode import encode, side_of
from embedjax.evaluate.funnel import Stage, check, funnel
from embedjax.evaluate.tasks.side import comparable
from embedjax.load import Model
from embedjax.search.corpus import Corpus, Gallery, Progress
from embedjax.search.kept import corpus_codes, prefix_of


@dataclasses.dataclass(frozen=True)
class Compared:
    """What is kept of the corpus's vectors and compared in the end: the first `dim` numbers (0: all) in a precision; and which
    stages find, in fewer numbers or bits, what is compared so. Queries stay floats."""

    dim: int = 0
    precision: Precision = "float32"
    funnel: tuple[Stage, ...] = ()

    def stages(self, width: int) -> tuple[Stage, ...]:
        """All stages, over vectors of `width` numbers."""
        return (*self.funnel, Stage(self.dim or width, self.precision))


def stages_of(text: str) -> tuple[Stage, ...]:
    """The stages that DIM:PRECISION:SHORTLIST says, several with commas between them. Raises ConfigError."""
    found = []
    for part in filter(None, text.split(",")):
        dim, _, rest = part.strip().partition(":")
        precision, _, shortlist = rest.partition(":")
        if not (dim.isdecimal() and shortlist.isdecimal() and int(dim) and int(shortlist)):
            raise ConfigError(
                f"--funnel has the stage {part.strip()!r}; it must be DIM:PRECISION:SHORTLIST, such as 64:int8:200"
            )
        if precision not in get_args(Precision):
            hint = nearest(precision, get_args(Precision))
            raise ConfigError(f"--funnel has the stage {part.strip()!r}; there is no precision {precision!r} ({hint})")
        found.append(Stage(int(dim), precision, int(shortlist)))  # pyright: ignore[reportArgumentType]
    return tuple(found)


def nearest_vectors(
    model: Model,
    corpus: Corpus | Gallery,
    query: str | Path,
    k: int,
    compared: Compared,
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[tuple[float, int]]:
    """(score, row) of the k best texts or pictures, best first. Raises ConfigError for stages that do not go together."""
    side = side_of(model.config, "query", isinstance(query, Path))
    stages = compared.stages(model.embedders[model.config.tower_of(side)].width)
    check(stages, model.embedders[model.config.tower_of(side)].width, k)
    # The query before the corpus: it may be wrong.
    wanted = comparable(encode(model, [query], column=side, task=task, mesh=mesh), model.config.similarity)
    documents, lost = corpus_codes(model, corpus, stages, task=task, mesh=mesh, cache=cache, progress=progress)
    # What cannot be decoded has codes too, and may stand in the way of what is looked for.
    stages = [dataclasses.replace(stage, shortlist=stage.shortlist and stage.shortlist + len(lost)) for stage in stages]
    scores, rows = funnel(wanted, documents, stages, k + len(lost), prefix=prefix_of(model, side), mesh=mesh)
    found = zip(scores[0].tolist(), rows[0].tolist(), strict=True)
    passed = set(lost.tolist())
    return [(score, row) for score, row in found if row not in passed and np.isfinite(score)][:k]
