"""Which tokens of a document each token of a query took: late interaction, told to a person. Makes no pages; `heat.py` does."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from embedjax.data.text import Piece
from embedjax.evaluate.encode import asked
from embedjax.evaluate.token_vectors import TokenVectors
from embedjax.load import Model


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """A query and a document by their tokens; only those that are compared.

    `similarity` is that of each with each. Tokens that were pooled have one `group`, one vector and so one similarity; others
    have a group of their own. Of `text` the model has seen the first `seen` characters.
    """

    asked: str
    text: str
    query: Sequence[Piece]
    document: Sequence[Piece]
    similarity: Float[np.ndarray, "Q D"]
    group: Int[np.ndarray, " D"]
    seen: int

    @property
    def score(self) -> float:
        """MaxSim: what each token of the query finds most similar, summed."""
        return float(self.similarity.max(1).sum()) if len(self.document) else 0.0

    def best(self, token: int) -> float:
        """The similarity of a token of the query with what it took; 0 where there is nothing."""
        return float(self.similarity[token].max()) if len(self.document) else 0.0

    def taken(self, token: int) -> Int[np.ndarray, " n"]:
        """The document's tokens that a token of the query took: the best one, with those it was pooled with."""
        if not len(self.document):
            return np.zeros(0, int)
        return np.flatnonzero(self.group == self.group[self.similarity[token].argmax()])

    def strength(self) -> Float[np.ndarray, " D"]:
        """How much of the score each token of the document gave, the most that a token of its words gave being 1; at least 0,
        and at most 1."""
        given = np.zeros(len(self.document))
        for token in range(len(self.query)):
            taken = self.taken(token)
            given[taken] += max(0.0, self.best(token))
        words = [piece.placed for piece in self.document]
        most = given[words].max(initial=0)
        return np.minimum(given / most, 1) if most > 0 else np.zeros(len(given))


def pieces(model: Model, column: str, text: str, task: str | None = None) -> list[Piece]:
    """The tokens of a text of a column, with the prompt that `encode_tokens` gives it."""
    prompt, _ = asked(model.config, column, task=task)
    return model.texts[model.config.tower_of(column)].of(column).pieces(text, prompt=prompt)


def matches(
    model: Model,
    query: str,
    vectors: TokenVectors,
    texts: Sequence[str],
    documents: TokenVectors,
    *,
    column: str = "document",
    task: str | None = None,
    groups: Sequence[Int[np.ndarray, " L"]] | None = None,
) -> list[Match]:
    """The matches of a query, of one text, with some documents, by their vectors; of pooled ones `groups` says which tokens
    each vector stands for."""
    wanted = [piece for piece in pieces(model, "query", query, task) if piece.compared]
    found = []
    for n, text in enumerate(texts):
        every = pieces(model, column, text, task)
        compared = [piece for piece in every if piece.compared]
        group = np.arange(len(compared)) if groups is None else groups[n]
        similarity = (vectors.of(0) @ documents.of(n).T)[:, group]
        assert similarity.shape == (len(wanted), len(compared)), "tokens are those that have vectors"
        seen = max((piece.end for piece in every), default=0)
        found.append(Match(query, text, wanted, compared, similarity, group, seen))
    return found
