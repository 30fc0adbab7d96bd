"""What a run tells at its end: the closing line, trained beside untrained and BM25, three queries, the commands to try next."""

import dataclasses
import re
import sys
import types

import jax
import pytest

from embedjax import config, sharding
from embedjax.commands import COMMANDS
from embedjax.evaluate import report, tasks
from embedjax.load import load
from embedjax.metrics.writers import Writer
from embedjax.train import train

SCORES = {"recall@1": 0.25, "recall@10": 0.5, "mrr@10": 0.125, "ndcg@10": 0.375, "recall@100": 1.0}


def row(step, factor=1.0):
    return {"step": step, **{f"t/{metric}": factor * value for metric, value in SCORES.items()}}


@pytest.fixture
def make(tmp_path):
    """`make(rows)` -> the retrieval task "t" over (query, document) rows, read."""

    def read(rows):
        path = tmp_path / "t.tsv"
        path.write_text("q\td\n" + "".join(f"{query}\t{document}\n" for query, document in rows))
        return tasks.prepare((config.Retrieval(config.File(str(path)), {"query": "q", "document": "d"}, name="t"),))

    return read


@pytest.fixture
def plain(model):
    """The model without its prompt for queries: equal texts have equal vectors."""
    (tower,), (texts,) = model.config.towers.values(), model.texts.values()
    towers = {"text": dataclasses.replace(tower, prompts={})}
    return dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, towers=towers),
        texts={"text": dataclasses.replace(texts, prompts={})},
    )


def cells(line):
    """A row of the table: its system, and its scores."""
    return line[:26].strip(), [float(cell) for cell in line[26:].split()]


def test_a_table_three_queries_and_what_to_do_next(plain, make, tmp_path):
    texts = ["w0 w1", "w10 w11 w12", "w20", "w30 w31", "w40 w41 w42"]
    evaluations = [row(0, 0.5), row(3), row(9, 1.5)]
    told = list(report.lines(plain, make([(text, text) for text in texts]), evaluations, tmp_path / "out"))
    head, columns, *table = told[:5]
    assert head == "\nt: 5 held-out queries, 5 documents"
    assert columns.split() == ["recall@1", "recall@10", "mrr@10", "ndcg@10"]
    shown = [SCORES[metric] for metric in columns.split()]
    assert [cells(line) for line in table] == [
        ("trained", pytest.approx([1.5 * value for value in shown], abs=1e-3)),
        ("untrained", pytest.approx([0.5 * value for value in shown], abs=1e-3)),
        ("BM25", [1.0] * 4),
    ]
    # The nearest document of a text is the same text, and only that is right.
    queries, commands = told[5:-4], told[-4:]
    assert [line for line in queries if line.startswith("\n?")] == [f"\n? {text}" for text in texts[1:4]]
    found = [line for line in queries if not line.startswith("\n?")]
    assert [line for line in found if "*" in line] == [f"  1* {text}" for text in texts[1:4]]
    assert [line[:4] for line in found] == ["  1*", "  2 ", "  3 "] * 3
    assert str(tmp_path / "out") in commands[0]
    verbs = ["search", "encode", "train"]
    assert [line.split()[:2] for line in commands[1:]] == [["embedjax", verb] for verb in verbs]
    assert {*verbs} <= {*COMMANDS}


def test_other_runs_stand_beside(plain, make, tmp_path):
    others = {"runs/other": row(5, 0.25), "runs/elsewhere": {"another/ndcg@10": 0.5}}
    told = list(report.lines(plain, make([("w0", "w0"), ("w1", "w1")]), [row(9)], tmp_path, beside=others))
    shown = [0.25 * SCORES[metric] for metric in ("recall@1", "recall@10", "mrr@10", "ndcg@10")]
    assert [line[:26].strip() for line in told[2:5]] == ["trained", "runs/other", "BM25"]
    assert cells(told[3])[1] == pytest.approx(shown, abs=1e-3)


def test_the_better_bm25_is_named_and_a_new_task_has_no_untrained_row(model, make, tmp_path):
    rows = [(f"load w{n}", f"def loadW{n}(x): pass") for n in range(4)]
    told = list(report.lines(model, make(rows), [{"step": 0, "other/ndcg@10": 0.1}, row(9)], tmp_path))
    assert [cells(line)[0] for line in told[2:4]] == ["trained", "BM25 (split identifiers)"]


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that keeps what it is given."""
    made = []

    def init(**options):
        run = types.SimpleNamespace(options=options, rows=[], finished=False)
        run.log = lambda values, step: run.rows.append((step, values))
        run.finish = lambda: setattr(run, "finished", True)
        made.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return made


def test_the_closing_line_and_what_wandb_gets(tiny_config, tmp_path, monkeypatch, capsys, wandb):
    one = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: one(mesh, devices or jax.devices()[:1]))
    words = ["red", "green", "blue", "small", "large", "old", "new", "round"]
    rows = [(a, f"{a} {b}") for a in words[:4] for b in words]
    rows += [(f"{a} {b} cat {a}", f"{b} {a} tree {b} {a}") for a in words[4:] for b in words]
    data = tmp_path / "rows.tsv"
    data.write_text("question\tanswer\n" + "".join(f"{question}\t{answer}\n" for question, answer in rows))
    (pairs,) = tiny_config.data.sets
    made = dataclasses.replace(
        tiny_config,
        steps=4,
        data=dataclasses.replace(
            tiny_config.data, sets=(dataclasses.replace(pairs, source=config.File(str(data))),), buckets=((4, 4), (8, 8))
        ),
        evaluate=dataclasses.replace(tiny_config.evaluate, baseline=True),
        writers=("wandb",),
    )
    result = train(made, tmp_path / "run")
    # Each row is drawn once in four steps: two batches of 16 at each length.
    texts = load(result.folder).texts["text"]
    tokens = sum(texts.lengths(column).sum() for column in zip(*rows, strict=True))
    padding = 100 * (1 - tokens / (2 * 32 * (4 + 8)))
    out = capsys.readouterr().out
    (line,) = re.findall(r"trained 4 steps, \d+ pairs/s, .*", out)
    assert line.endswith(f", 2 compiled shapes, {padding:.0f}% padding") and 0 < padding < 100
    assert out.index(line) < out.index("\ntrained  ") < out.index("Next:")

    (run,) = wandb
    assert run.options["name"] == "tiny" and run.options["resume"] == "allow" and run.finished
    assert [step for step, values in run.rows if "loss" in values] == [1, 2, 3, 4]
    assert [step for step, values in run.rows if "pairs/ndcg@10" in values] == [0, 4]
    Writer(result.folder, ("wandb",), start=4, name="tiny").close()
    Writer(tmp_path, ("wandb",), name="tiny").close()
    again, other = wandb[1:]
    assert again.options["id"] == run.options["id"] != other.options["id"]
