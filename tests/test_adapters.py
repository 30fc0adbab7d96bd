"""A model of several tasks: each set trains its adapter under its prompt, and is served, searched and exported with both."""

import dataclasses
import json

import numpy as np
import pytest

from embedjax import build, commands, objective, sharding
from embedjax import config as c
from embedjax.config.errors import ConfigError
from embedjax.evaluate.encode import encode
from embedjax.evaluate.tasks import evaluate
from embedjax.export import export
from embedjax.load import adapted, load, resolve_tower
from embedjax.mine import again
from embedjax.models.embedder import build_embedder
from embedjax.train import train

TEXTS = ["red cat 1", "a blue dog", ""]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.tsv"
    rows = [f"{'red' if i % 2 else 'blue'} cat {i}\tblue dog {i}\t{'x' if i % 2 else 'y'}" for i in range(32)]
    file.write_text("a\tb\tlabel\n" + "\n".join(rows) + "\n")
    return c.File(str(file))


PROMPTS = {"query": "cat ", "search-query": "dog ", "search-document": "dog dog ", "cls": "red red red "}


@pytest.fixture(scope="module")
def several(rows):
    """A head on the adapter "cls" under the prompt of that name, pairs on the adapter "search" under two."""
    arch = c.Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16, init_std=0.3)
    lora = dict.fromkeys(("cls", "search"), c.Lora(4, 16.0, "blocks/"))
    tower = c.Tower(arch=arch, tokenizer="wordpiece", max_length=8, lora=lora, prompts=PROMPTS)
    columns = {"anchor": "a", "label": "label"}
    kinds = c.Set(rows, columns, c.Classify(), name="kinds", labels=("x", "y"), adapter="cls", prompt="cls")
    pairs = c.Set(rows, {"anchor": "a", "positive": "b"}, name="pairs", adapter="search", prompt="search")
    found = c.Retrieval(rows, {"query": "a", "document": "b"}, prompt="search")
    return c.Config(
        steps=8,
        model=c.Model({"text": tower}),
        data=c.Data(batch_size=16, sets=(kinds, pairs)),
        optim=c.Optim(learning_rate=2e-2),
        evaluate=c.Evaluate(tasks=(found, head_task(rows, "cls"))),
        export=c.Export(adapter="search"),
    )


def head_task(rows, prompt):
    return c.HeadAccuracy(rows, {"text": "a", "label": "label"}, prompt=prompt)


@pytest.fixture(scope="module")
def result(several, tmp_path_factory):
    return train(several, tmp_path_factory.mktemp("several") / "run")


@pytest.fixture(scope="module")
def folder(result):
    return result.folder


def test_a_head_goes_with_the_adapter_it_was_trained_on(folder, rows, tmp_path):
    run = load(folder)
    assert run.heads["kinds"].adapter == "cls"
    assert not load(folder / "export").heads, "a head of another adapter is not exported"
    export(run, tmp_path / "cls", adapter="cls")
    read = load(tmp_path / "cls")
    assert read.heads.keys() == adapted(run, "cls").heads.keys() == {"kinds"} and read.heads["kinds"].adapter == ""
    np.testing.assert_array_equal(read.heads["kinds"].kernel, run.heads["kinds"].kernel)
    np.testing.assert_allclose(encode(read, TEXTS, task="cls"), encode(run, TEXTS, task="cls"), atol=1e-5)
    assert evaluate(read, [head_task(rows, "cls")]) == evaluate(run, [head_task(rows, "cls")])


def test_a_head_is_not_scored_on_another_adapter(several, folder, rows):
    told = "task 'head': the class head was trained on the adapter 'cls', but .* encoded with 'search'"
    with pytest.raises(ConfigError, match=told):
        evaluate(load(folder), [head_task(rows, "search")])
    with pytest.raises(ConfigError, match=told):
        build.resolve(dataclasses.replace(several, evaluate=c.Evaluate(tasks=(head_task(rows, "search"),))))


def test_sets_are_trained_under_their_prompts_and_evaluated_so(several, result, folder, tmp_path):
    run = build.build(build.resolve(several), tmp_path)
    met = {}
    for step in range(8):
        task, columns = run.batches.batch(step)
        ids = [columns[column]["ids"][0] for column in ("anchor", "positive") if column in columns]
        met[task] = [text.split()[:3] for text in map(run.texts["text"].tokenizer.decode, ids)]
    assert met["kinds"] == [["red"] * 3]
    assert [[word for word in text if word == "dog"] for text in met["pairs"]] == [["dog"], ["dog", "dog"]]
    task, shown = run.batches.batch(0)[0], run.batches.decoded(0, 1)[0]["anchor"][1]
    assert shown.split()[1] == met[task][0][0]
    model = load(folder)
    sides = {column: encode(model, TEXTS, column=column, task="search") for column in ("query", "document")}
    for column, prompt in (("query", "search-query"), ("document", "search-document")):
        merged = encode(adapted(model, "search"), TEXTS, prompt=prompt)
        np.testing.assert_allclose(sides[column], merged, atol=1e-5)
    assert np.abs(sides["query"] - sides["document"]).max() > 1e-2
    assert evaluate(model, several.evaluate.tasks) == pytest.approx(result.scores, abs=1e-6)


def test_a_prompt_counts_in_the_length_index(several, tmp_path):
    """Texts are put in buckets by the length that they have with the prompt of their set."""
    found = {}
    for prompt in ("", "search"):
        kept = dataclasses.replace(several.data.sets[1], prompt=prompt)
        data = dataclasses.replace(several.data, sets=(kept,), buckets=((6, 6), (8, 8)))
        folder = tmp_path / (prompt or "none")
        folder.mkdir()
        whole = dataclasses.replace(several, data=data, evaluate=c.Evaluate())
        run = build.build(build.resolve(whole), folder)
        (index,) = (folder / "lengths").iterdir()
        found[prompt] = np.load(index)
    np.testing.assert_array_equal(found["search"][:, 1], np.minimum(found[""][:, 1] + 2, 8))
    np.testing.assert_array_equal(found["search"][:, 0], found[""][:, 0])  # of "dog " and "cat "
    assert run.batches.prompts == [{"anchor": "search-query", "positive": "search-document"}]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "serch"}, "set 'pairs': no tower of its texts has a prompt 'serch'; known: cls, query, search-document"),
        ({"prompt": "ask"}, "no tower of its texts has a prompt 'ask'"),
        ({"adapter": "serch"}, "there is no adapter 'serch'"),
    ],
)
def test_names_that_no_tower_knows_are_refused(several, change, told):
    sets = (several.data.sets[0], dataclasses.replace(several.data.sets[1], **change))
    with pytest.raises(ConfigError, match=told):
        build.resolve(dataclasses.replace(several, data=dataclasses.replace(several.data, sets=sets)))


def test_rows_of_one_batch_share_their_prompt(several):
    sets = [dataclasses.replace(several.data.sets[1], name=name, prompt=name) for name in ("search", "query")]
    with pytest.raises(ConfigError, match="differ in their prompt .search and query"):
        c.Data(sets=tuple(sets), draw="rows")


def test_a_guide_has_the_prompt_of_the_set(several):
    tower = dataclasses.replace(several.model.towers["text"], lora={})
    guide = dataclasses.replace(tower, prompts={"query": "cat "})
    model = c.Model({"text": tower, "guide": guide}, {"anchor": "text", "positive": "text"})
    loss = c.MultipleNegatives(guide="guide")
    mesh = sharding.make_mesh(c.Mesh())
    make = lambda prompt: objective.make(
        dataclasses.replace(several.data.sets[1], loss=loss, prompt=prompt, adapter=""),
        model,
        {name: build_embedder(resolve_tower(tower)) for name, tower in model.towers.items()},
        mesh,
    )
    make("")
    with pytest.raises(ConfigError, match="share the prompt of column 'anchor'; they have .'cat '.*'dog '"):
        make("search")


def test_a_run_mines_under_the_prompts_of_the_set(several, folder, tmp_path, monkeypatch):
    pairs = dataclasses.replace(several.data.sets[1], mine=c.Mine(every=8))
    data = dataclasses.replace(several.data, sets=(several.data.sets[0], pairs))
    run = build.build(build.resolve(dataclasses.replace(several, data=data)), tmp_path)
    asked, stream = {}, again.stream
    monkeypatch.setattr(
        again, "stream", lambda *given, task, **rest: asked.update({given[2]: task}) or stream(*given, task=task, **rest)
    )
    numbers, _ = again.mine(run.mined["pairs"], adapted(load(folder), "search"), 0, seed=0)
    assert asked == {"query": "search", "document": "search"} and numbers.shape == (32, 1)


def test_the_command_line_takes_a_task(folder, tmp_path, monkeypatch, capsys):
    """`encode`, `search` and `mine` put on both the prompts and the adapter of a name; `export` the adapter."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, run = load(folder), str(folder)
    corpus = ["blue dog 1", "red cat 2", "blue dog 5", "red dog 7"]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus) + "\n")
    for role in ("query", "document"):
        out = str(tmp_path / f"{role}.npy")
        commands.encode([run, str(tmp_path / "corpus.txt"), out, "--as", role, "--task", "search"])
        np.testing.assert_allclose(np.load(out), encode(model, corpus, column=role, task="search"), atol=1e-5)
    capsys.readouterr()
    found = {}
    for task, query in (("search", "search-query"), ("cls", "cls"), ("search", "search-query")):
        commands.search([run, "red dog 2", "--corpus", str(tmp_path / "corpus.txt"), "--task", task])
        lines = capsys.readouterr().out.splitlines()
        scores = [float(line.split()[1]) for line in lines if line[0].isdigit()]
        document = "search-document" if task == "search" else "cls"
        one = encode(adapted(model, task), ["red dog 2"], prompt=query)
        every = encode(adapted(model, task), corpus, prompt=document)
        np.testing.assert_allclose(scores, np.sort((every @ one.T)[:, 0])[::-1], atol=2e-3)
        found.setdefault(task, scores)
    assert found["search"] != found["cls"] and len(list((tmp_path / "cache").rglob("*.npy"))) == 2
    for task in ("", "serch"):
        with pytest.raises(ConfigError, match="adapters cls, search; name one" if not task else "no adapter 'serch'"):
            commands.search([run, "red", "--corpus", str(tmp_path / "corpus.txt"), *(["--task", task] if task else [])])

    commands.export([run, str(tmp_path / "out"), "--adapter", "cls"])
    exported = load(tmp_path / "out")
    assert list(exported.heads) == ["kinds"]
    np.testing.assert_allclose(encode(exported, corpus), encode(adapted(model, "cls"), corpus), atol=1e-5)
    commands.export([str(tmp_path / "out"), "--check"])
    assert "embedjax\tlargest difference" in capsys.readouterr().out


def test_mining_takes_a_task(folder, rows, tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(f"blue dog {i}\nred cat {i}\n" for i in range(12)))
    places = [str(folder), str(tmp_path / "corpus.txt"), rows.path, str(tmp_path / "out.jsonl")]
    commands.mine([*places, "--columns", "a,b", "--scores", "--task", "search"])
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    a, b = (
        encode(load(folder), [first[column]], column=role, task="search")
        for column, role in (("anchor", "query"), ("negative", "document"))
    )
    assert first["score_2"] == pytest.approx(float((a @ b.T)[0, 0]), abs=1e-4)
