"""Search by late interaction: over the tokens of all texts, or of the candidates of a first stage, and what matched."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jax.sharding import Mesh as DeviceMesh
from jaxtyping import Int

from embedjax.config import Precision
from embedjax.config.errors import ConfigError
from embedjax.evaluate.bm25 import bm25_rank
from embedjax.evaluate.encode import encode, side_of
from embedjax.evaluate.late import encode_tokens, maxsim_topk
from embedjax.evaluate.matches import Match, matches
from embedjax.evaluate.pool import check_factor, groups, means
from embedjax.evaluate.retrieval import topk
from embedjax.evaluate.stages import by_ranking, by_tokens
from embedjax.evaluate.tasks.first import single
from embedjax.evaluate.tasks.side import comparable
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.load import Model
from embedjax.search.corpus import Corpus, Progress
from embedjax.search.kept import corpus_tokens, corpus_vectors


@dataclasses.dataclass(frozen=True)
class How:
    """How a search by late interaction goes about it: what is kept of the corpus's vectors, and which texts are scored.

    `first` is "" for all of them, "tokens" for those of the tokens nearest to the query's, "bm25" for the best by their words,
    or a model of one vector a text for its nearest; then the tokens of the candidates alone are encoded. `candidates` says how
    many, of "tokens" tokens for each of the query's. Raises ConfigError for what does not go together.
    """

    pool: int = 1
    precision: Precision = "float32"
    first: Literal["", "bm25", "tokens"] | Model = ""
    candidates: int = 100

    def __post_init__(self):
        check_factor(self.pool)
        if self.candidates < 1:
            raise ConfigError(f"{self.candidates} candidates were asked for; it must be at least 1")
        if self.first not in ("", "tokens") and (self.pool > 1 or self.precision != "float32"):
            raise ConfigError(
                "pool and precision are about vectors that are kept; after this first stage the candidates' are made anew"
            )
        if isinstance(self.first, Model):
            single(self.first)


def nearest(
    model: Model,
    corpus: Corpus,
    query: str,
    k: int,
    how: How,
    *,
    task: str | None = None,
    mesh: DeviceMesh | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[tuple[float, int, Match]]:
    """(score, row, what matched) of the k best texts, best first; fewer where there are no more candidates."""
    # The query before the corpus: it may be wrong.
    asked = encode_tokens(model, [query], column=side_of(model.config, "query", False), task=task, mesh=mesh)
    side = side_of(model.config, "document", False)
    rows: Int[np.ndarray, " n"] = np.arange(len(corpus.texts))
    if how.first in ("", "tokens"):
        kept = {"pool": how.pool, "precision": how.precision}
        tokens = corpus_tokens(model, corpus, task=task, mesh=mesh, cache=cache, progress=progress, **kept)
        if how.first:
            (rows,) = by_tokens(asked, tokens, how.candidates, mesh=mesh)
            tokens = tokens.take(rows)
    else:
        rows = _candidates(corpus, query, how, mesh=mesh, cache=cache, progress=progress)
        some = [corpus.texts[row] for row in rows]
        tokens = encode_tokens(model, some, column=side, task=task, mesh=mesh)
    scores, at = maxsim_topk(asked, tokens, k, mesh=mesh)
    found = rows[at[0]]
    shown = tokens.take(at[0])
    texts = [corpus.texts[row] for row in found]
    grouped = None
    if how.pool > 1:
        shown, grouped = _pooled_again(model, texts, shown, how.pool, column=side, task=task, mesh=mesh)
    told = matches(model, query, asked, texts, shown, column=side, task=task, groups=grouped)
    return list(zip(scores[0].tolist(), found.tolist(), told, strict=True))


def _candidates(
    corpus: Corpus, query: str, how: How, *, mesh: DeviceMesh | None, cache: Path | None, progress: Progress | None
) -> Int[np.ndarray, " n"]:
    """The rows of the first stage's candidates, in their order."""
    if isinstance(how.first, Model):
        column = side_of(how.first.config, "query", False)
        wanted = comparable(encode(how.first, [query], column=column, mesh=mesh), how.first.config.similarity)
        vectors = corpus_vectors(how.first, corpus, mesh=mesh, cache=cache, progress=progress)
        return by_ranking(topk(wanted, vectors, how.candidates, mesh=mesh)[1])[0]
    return by_ranking(bm25_rank([query], corpus.texts, how.candidates, words=corpus.words))[0]


def _pooled_again(
    model: Model, texts: Sequence[str], like: TokenVectors, pool: int, **options
) -> tuple[TokenVectors, list[Int[np.ndarray, " L"]]]:
    """The pooled vectors of a few texts, kept as `like` keeps them, and the group of each token, which nothing keeps: the same
    clustering of the same tokens finds it again."""
    whole = encode_tokens(model, texts, **options)
    found = [groups(whole.of(n), pool) for n in range(len(texts))]
    made = TokenVectors.joined([means(whole.of(n), group) for n, group in enumerate(found)], whole.width)
    return (made if like.precision == "float32" else made.quantized(like.precision, like.ranges)), found
