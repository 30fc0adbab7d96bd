"""BM25 through its library: the formula, both ways to take words, and texts that share no word."""

import numpy as np

from embedjax.evaluate.bm25 import bm25_rank, split_identifiers

DOCUMENTS = [
    "def parse_http_header(text)",
    "class HTTPServer",
    "",
    "cats sleep on mats",
    "cats eat fish, cats eat mice, cats sleep",
]


def test_ranks_by_bm25():
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(30)]
    documents = [rng.choice(words, rng.integers(3, 20)).tolist() for _ in range(50)]
    query = ["word3", "word7", "word11"]
    mean = np.mean([len(d) for d in documents])
    wanted = np.zeros(50)
    for word in query:
        frequency = np.array([d.count(word) for d in documents])
        idf = np.log(1 + (50 - (frequency > 0).sum() + 0.5) / ((frequency > 0).sum() + 0.5))
        wanted += idf * frequency / (frequency + 1.5 * (0.25 + 0.75 * np.array([len(d) for d in documents]) / mean))
    ranked = bm25_rank([" ".join(query)], [" ".join(d) for d in documents], 50)[0]
    kept = ranked[ranked >= 0]
    assert set(kept) == set(np.flatnonzero(wanted)) and len(kept) < 50
    np.testing.assert_allclose(wanted[kept], np.sort(wanted[wanted > 0])[::-1], rtol=1e-5)


def test_words_and_identifiers():
    assert split_identifiers("parse_HTTPHeader toJson2 plain") == "parse HTTP Header to Json2 plain"
    assert bm25_rank(["parse the header"], DOCUMENTS, 2).tolist() == [[-1, -1]]
    assert bm25_rank(["parse the header"], DOCUMENTS, 2, words="identifiers").tolist() == [[0, -1]]


def test_no_shared_word_is_no_rank():
    assert bm25_rank(["zebra", ""], DOCUMENTS, 9).tolist() == [[-1] * 5] * 2
    assert bm25_rank(["zebra"], ["", "a"], 2).tolist() == [[-1, -1]]
