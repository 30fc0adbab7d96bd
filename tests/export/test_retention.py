"""What is kept at each dimension and precision: scores from vectors by hand, tables, the card and the plot."""

import xml.etree.ElementTree as xml

import numpy as np
import pytest
from safetensors.numpy import save_file

from embedjax import calibration, quantize
from embedjax import config as c
from embedjax.calibration import Calibrated
from embedjax.config.errors import ConfigError, StorageError
from embedjax.evaluate import scores
from embedjax.evaluate.tasks import RetrievalData
from embedjax.evaluate.tasks.pairs import TripletData
from embedjax.evaluate.tasks.side import Side
from embedjax.evaluate.tasks.sts import StsData
from embedjax.export import retained, retention
from embedjax.export.plot import svg
from embedjax.load import Model

WIDTH = 16


def unit(rows, seed):
    found = np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


DOCUMENTS, QUERIES = unit(60, 0), unit(12, 1)


@pytest.fixture
def model(tmp_path):
    """A folder with ranges and a model of that width; no vector is made by it."""

    class Embedder:
        width = WIDTH

    tower = c.Tower(c.Bert(width=WIDTH, heads=2), normalize=True, similarity="cosine", prompts={})
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    short = DOCUMENTS[:, :8] / np.linalg.norm(DOCUMENTS[:, :8], axis=1, keepdims=True)
    ranges = {WIDTH: quantize.ranges_of(DOCUMENTS), 8: quantize.ranges_of(short)}
    calibration.write(tmp_path, {"text": Calibrated(ranges, 60)})
    return Model(c.Model({"text": tower}), {"text": Embedder()}, {}, {}, {}, str(tmp_path))


@pytest.fixture
def retrieval():
    relevant = [{int(np.argsort(-DOCUMENTS @ query)[2]): 1.0} for query in QUERIES]
    return RetrievalData(c.Retrieval(name="find"), Side(["q"] * 12, "query"), Side(["d"] * 60, "document"), relevant)


@pytest.fixture
def sts():
    wanted = np.random.default_rng(2).uniform(0, 5, 12)
    return StsData(c.Sts(), (Side(["a"] * 12, "anchor"), Side(["b"] * 12, "positive")), wanted)


def ndcg(task, similarities, candidates=None):
    if candidates is not None:
        kept = np.full_like(similarities, -np.inf)
        np.put_along_axis(kept, candidates, np.take_along_axis(similarities, candidates, 1), 1)
        similarities = kept
    gains = scores.gains_of(np.argsort(-similarities, axis=1, kind="stable")[:, :10], task.judgements)
    return scores.ndcg_at(gains, scores.ideal_gains(task.judgements), 10).mean()


@pytest.mark.parametrize("dim", [WIDTH, 8])
@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_retrieval_by_codes_and_rescored(model, retrieval, dim, precision):
    """By codes the shortlist; the float query against what the codes stand for within it."""
    rows = retention.measure(model, retrieval, (QUERIES, DOCUMENTS), (8,), ("float32", "int8", "binary"), rescore=2)
    assert [(row.dim, row.precision) for row in rows][:3] == [(16, "float32"), (16, "int8"), (16, "binary")] and len(rows) == 6
    (row,) = [row for row in rows if (row.dim, row.precision) == (dim, precision)]
    assert row.bytes == {"float32": 4 * dim, "int8": dim, "binary": dim // 8}[precision] and row.metric == "ndcg@10"
    short = lambda x: x[:, :dim] / np.linalg.norm(x[:, :dim], axis=1, keepdims=True)
    ranges = quantize.ranges_of(short(DOCUMENTS)) if precision == "int8" else None
    stand = lambda x: quantize.dequantize(quantize.quantize(short(x), precision, ranges), precision, dim, ranges)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    coded = unit(stand(QUERIES)) @ unit(stand(DOCUMENTS)).T
    coded = np.round(coded, 5) if precision == "binary" else coded  # equal numbers of equal signs are equal
    first = np.argsort(-coded, axis=1, kind="stable")[:, :20]
    assert row.score == pytest.approx(ndcg(retrieval, coded), abs=1e-6)
    assert row.rescored == pytest.approx(ndcg(retrieval, short(QUERIES) @ unit(stand(DOCUMENTS)).T, first), abs=1e-6)


def test_sts_by_codes_and_rescored(model, sts):
    a, b = QUERIES, DOCUMENTS[:12]
    (row,) = [row for row in retention.measure(model, sts, (a, b), (), ("binary",)) if row.precision == "binary"]
    sign = lambda x: np.where(x > 0, 1, -1).astype(np.float32)
    assert row.score == pytest.approx(scores.spearman((sign(a) * sign(b)).sum(1), sts.wanted), abs=1e-5)
    assert row.rescored == pytest.approx(scores.spearman((a * sign(b)).sum(1), sts.wanted), abs=1e-5)


def test_what_it_is_not_for(model, retrieval):
    with pytest.raises(ConfigError, match="'triplets' is TripletAccuracy; retention is of Retrieval and Sts"):
        retention.retention(model, [TripletData(c.TripletAccuracy(), retrieval.sides * 2)])
    with pytest.raises(ConfigError, match="not for 12"):
        retention.retention(model, [retrieval], (12,))
    assert retention.scorable(model, retrieval)


def row(task, dim, precision, score, rescored, size=4):
    return retention.Row(task, "ndcg@10", dim, precision, size, score, rescored)


SOME = [
    row("find", 16, "float32", 0.5, 0.5, 64),
    row("find", 16, "binary", 0.4, 0.45, 2),
    row("find", 8, "float32", 0.48, 0.48, 32),
    row("find", 8, "binary", 0.3, 0.55, 1),
]
SPEED = retention.Encoding(72, 0.5, "cpu")


def test_the_folder_tells_of_it(model, tmp_path):
    (tmp_path / "README.md").write_text("# mine\n\nwords\n")
    retained.keep(tmp_path, SOME, SPEED)
    more = [row("other <&>", 16, "float32", 0.25, 0.25, 64), row("other <&>", 16, "binary", 0.2, 0.25, 2)]
    assert retained.keep(tmp_path, more, SPEED) == [*SOME, *more]
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# mine\n\nwords\n") and card.count("## Dimensions") == 1
    assert "| 16 | binary | 2 | 0.4000 | 80.0% | 0.4500 | 90.0% |" in card and "| 16 | binary | 2 | 0.2000 | 80.0%" in card
    assert "at 144 a second on cpu" in card
    assert retained.keep(tmp_path, SOME[:2], SPEED) == [*more, *SOME[:2]], "a task that is measured anew takes its own place"
    assert retained.keep(tmp_path, SOME, SPEED, rescore=9) == SOME, "other rows were rescored otherwise"
    save_file({"w": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    assert retained.keep(tmp_path, more, SPEED, rescore=9) == more, "the rest is of other weights"
    (tmp_path / "quantization" / "retention.json").write_text("{")
    with pytest.raises(StorageError, match="retention.json: cannot be read"):
        retained.keep(tmp_path, SOME, SPEED)


def test_the_table():
    lines = list(retained.table(SOME))
    assert lines[0].split()[:4] == ["task", "dim", "precision", "bytes"] and len(lines) == 5
    assert lines[2].split() == ["find", "16", "binary", "2", "0.4000", "80.0%", "0.4500", "90.0%"]


def test_the_plot_is_a_picture_of_all_points():
    drawn = xml.fromstring(retained.picture(SOME))
    space = "{http://www.w3.org/2000/svg}"
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in drawn.iter(f"{space}circle")]
    assert len(dots) == 4 and all(0 < x < 640 and 0 < y < 400 for x, y in dots)
    height = {round(x): y for x, y in dots}
    first, *_, last = sorted(height)
    assert height[first] < height[last], "110 % lies above 100 %"
    texts = [text.text for text in drawn.iter(f"{space}text")]
    assert {"float32", "binary", "100%", "1", "64"} <= set(texts)
    assert "a &lt;b&gt;" in svg("a <b>", {"x": [(8, 1.0, 1.0)]})
    xml.fromstring(svg("nothing in common", {"x": []}))
