"""A static query tower beside a transformer of documents: trained at rates of their own, exported, read back, searched."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from embedjax import build, commands, search, sharding
from embedjax import config as c
from embedjax.config.errors import ConfigError, StorageError
from embedjax.evaluate.encode import encode
from embedjax.evaluate.tasks import evaluate
from embedjax.export import export, gate
from embedjax.export.card import card as card_of
from embedjax.load import assemble, load, make_texts, resolve_tower
from embedjax.models.folders import read_tower
from embedjax.train import train

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "round", "flat", "quiet"]
WORDS += ["cat", "dog", "bird", "fish", "tree", "stone", "river", "house", "boat", "song"]
TEXTS = ["red cat", "small old house", "boat song river tree stone fish bird", ""]


BERT = c.Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16)
PROMPTS = {"query": "find ", "document": "new ", "odd": "quiet "}
QUERY = c.Tower(arch=c.Static(128, 16), tokenizer="wordpiece", max_length=5, similarity="dot", prompts=PROMPTS)
DOCUMENT = c.Tower(arch=BERT, tokenizer="wordpiece", max_length=8, similarity="dot", prompts=PROMPTS, include_prompt=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of six steps of two towers compared by dot products: other sizes, lengths and rates."""
    file = tmp_path_factory.mktemp("data") / "pairs.tsv"
    rows = [f"{a} {b}\t{b} {a} {WORDS[(i * 7) % 20]}" for i, (a, b) in enumerate(itertools.product(WORDS[:8], WORDS[12:]))]
    file.write_text("question\tanswer\n" + "\n".join(rows) + "\n")
    pairs = c.Set(c.File(str(file)), {"anchor": "question", "positive": "answer"}, c.MultipleNegatives(scale=1), name="pairs")
    return c.Config(
        steps=6,
        model=c.Model({"query": QUERY, "document": DOCUMENT}, {"anchor": "query", "positive": "document"}),
        data=c.Data(batch_size=16, sets=(pairs,)),
        optim=c.Optim(learning_rate=1e-3, groups=(c.Group("towers/query/", 30.0),)),
        evaluate=c.Evaluate(tasks=(c.Retrieval(c.File(str(file)), {"query": "question", "document": "answer"}),)),
        mesh=c.Mesh(fsdp=2),
    )


@pytest.fixture(scope="module")
def result(two, tmp_path_factory):
    return train(two, tmp_path_factory.mktemp("two") / "run")


def test_batches_speak_to_each_tower_in_its_way(two, tmp_path):
    run = build.build(build.resolve(two), tmp_path)
    _, columns = run.batches.batch(0)
    assert columns["anchor"]["ids"].shape == (16, 5) and columns["positive"]["ids"].shape == (16, 8)
    decoded = {
        column: run.texts[name].tokenizer.decode(columns[column]["ids"][0], skip_special_tokens=False)
        for column, name in two.model.columns.items()
    }
    assert decoded["anchor"].startswith("find ") and decoded["positive"].startswith("[CLS] new ")
    assert "pool" not in columns["anchor"]
    np.testing.assert_array_equal(columns["positive"]["pool"][:, :3], [[False, False, True]] * 16)


def test_the_towers_are_exported_whole_and_know_their_sides(two, result):
    run, exported = load(result.folder), load(result.exported)
    assert exported.config.similarity == "dot" and exported.config.routes == run.config.routes
    for role, arch in (("query", c.Static), ("document", c.Bert)):
        assert isinstance(exported.config.towers[role].arch, arch)
        vectors = encode(run, TEXTS, column=role)
        np.testing.assert_allclose(encode(exported, TEXTS, column=role), vectors, atol=1e-5)
        np.testing.assert_allclose(encode(load(result.exported / role), TEXTS, column=role), vectors, atol=1e-5)
        np.testing.assert_array_equal(encode(run, TEXTS, column=role, task=role), vectors)
        assert np.abs(encode(run, TEXTS, column=role, task="odd") - vectors).max() > 1e-4
    with pytest.raises(ConfigError, match="no prompt and no adapter 'od'"):
        encode(run, TEXTS, column="query", task="od")
    assert evaluate(exported, two.evaluate.tasks) == pytest.approx(result.scores, abs=1e-6)


def test_a_rate_of_its_own(two, result, tmp_path):
    trained = load(result.folder).params["towers"]
    start, _ = build.build(build.resolve(two), tmp_path).init()
    far = lambda new, old: float(np.abs(np.asarray(new) - np.asarray(old)).max())
    moved = {name: max(jax.tree.leaves(jax.tree.map(far, trained[name], start.params["towers"][name]))) for name in trained}
    assert moved["query"] > 10 * moved["document"] > 0


@pytest.mark.slow
def test_gradcache_gives_the_same_of_both_towers(two, tmp_path):
    found = {}
    for cached in (1, 2):
        config = dataclasses.replace(two, optim=dataclasses.replace(two.optim, cached=cached))
        run = build.build(build.resolve(config), tmp_path)
        state, constants = run.init()
        task, columns = run.batches.batch(0)
        state, metrics = run.steps[task](state, constants, sharding.place(columns, run.mesh))
        found[cached] = jax.device_get((state.opt_state["adam"].mu, metrics["loss"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[1], found[2])
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found[1][0]["towers"]["query"]))


def test_search_and_encode_by_dot_product(result, tmp_path, capsys):
    exported = load(result.exported)
    vectors = {role: encode(exported, TEXTS[:3], column=role) for role in ("query", "document")}
    corpus = search.Corpus(TEXTS[:3], ["1", "2", "3"])
    hits = search.search(exported, corpus, TEXTS[0], 3, cache=tmp_path / "cache")
    products = vectors["document"] @ vectors["query"][0]
    assert [int(hit.place) - 1 for hit in hits] == np.argsort(-products).tolist()
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(products)[::-1], atol=1e-5)

    (tmp_path / "texts.txt").write_text("red cat\nboat\n")
    (tmp_path / "queries.jsonl").write_text('{"query": "red cat"}\n{"query": "boat"}\n')
    for arguments, role in (
        (["texts.txt"], "document"),
        (["queries.jsonl"], "query"),
        (["texts.txt", "--as", "query"], "query"),
    ):
        arguments[0] = str(tmp_path / arguments[0])
        commands.encode([str(result.exported), arguments[0], str(tmp_path / "out.npy"), *arguments[1:]])
        wanted = encode(exported, ["red cat", "boat"], column=role)
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), wanted, atol=1e-5)
    assert capsys.readouterr().out.count("out.npy: 2 vectors") == 3


def test_towers_go_on_from_an_exported_folder(two, result, tmp_path):
    """Each route of a Router is a folder to start from, and the shared prompts come with it."""
    names = {role: c.Tower(init=str(result.exported / role)) for role in ("query", "document")}
    again = build.resolve(dataclasses.replace(two, model=c.Model(names, two.model.columns)))
    towers = again.model.towers
    assert [type(tower.arch) for tower in towers.values()] == [c.Static, c.Bert]
    assert [(t.max_length, t.similarity, t.normalize) for t in towers.values()] == [(5, "dot", False), (8, "dot", False)]
    assert towers["query"].prompts == PROMPTS
    state, _ = build.build(again, tmp_path / "again").init()
    trained = load(result.folder).params["towers"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params["towers"]), trained)


def prompted(run, prompts, default):
    """The model of a run with other prompts."""
    towers = {name: dataclasses.replace(t, prompts=prompts, default_prompt=default) for name, t in run.config.towers.items()}
    texts = {name: dataclasses.replace(t, prompts=prompts, default_prompt=default) for name, t in run.texts.items()}
    return dataclasses.replace(run, config=dataclasses.replace(run.config, towers=towers), texts=texts)


def test_default_prompts_of_two_towers_come_back(result, tmp_path):
    made = prompted(load(result.folder), {"page": "quiet "}, "page")
    export(made, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert settings["default_prompt_name"] == "document" and settings["prompts"]["document"] == "quiet "
    read = load(tmp_path / "out")
    assert [tower.default_prompt for tower in read.config.towers.values()] == ["page", "page"]
    for column in ("query", "document", "anchor", "positive"):
        np.testing.assert_allclose(encode(read, TEXTS, column=column), encode(made, TEXTS, column=column), atol=1e-5)
    (tmp_path / "out" / "query" / "config_sentence_transformers.json").unlink()  # as sentence-transformers saves a Router
    assert read_tower(tmp_path / "out" / "query").default_prompt == "document"


def test_a_default_prompt_can_be_dropped(result, tmp_path):
    made = prompted(load(result.folder), {"page": "quiet "}, "page")
    export(made, tmp_path / "out")
    folder = tmp_path / "out" / "document"
    assert resolve_tower(c.Tower(init=str(folder))).default_prompt == "page"
    dropped = resolve_tower(c.Tower(init=str(folder), prompts={}, default_prompt=""))
    assert not dropped.default_prompt and dropped.prompt_for("positive") is None
    assert resolve_tower(dropped) == dropped
    texts, plain = make_texts(dropped, folder), load(result.folder).texts["document"]
    np.testing.assert_array_equal(texts.encode(TEXTS)["ids"], plain.encode(TEXTS)["ids"])
    with pytest.raises(ConfigError, match="'page' is not among the prompts .*\"\" for none"):
        resolve_tower(c.Tower(init=str(folder), prompts={}))


def test_a_file_is_no_folder_to_write(result, tmp_path):
    (tmp_path / "out").write_text("mine")
    for replace in (False, True):
        with pytest.raises(StorageError, match="out is a file"):
            export(load(result.folder), tmp_path / "out", replace=replace)
    assert (tmp_path / "out").read_text() == "mine"


def test_two_bare_encoders(result, tmp_path):
    """Each is the folder of an encoder; a model of shared sizes needs no second tokenizer or architecture."""
    run = load(result.folder)
    query, document = dataclasses.replace(run.config.towers["document"], max_length=5), run.config.towers["document"]
    both = lambda tree: dict.fromkeys(("query", "document"), tree["document"])
    texts = {"query": dataclasses.replace(run.texts["document"], max_length=5), "document": run.texts["document"]}
    config = dataclasses.replace(run.config, towers={"query": query, "document": document})
    made = assemble(config, {"towers": both(run.params["towers"])}, texts, both(run.tokenizers), "two")
    assert export(made, tmp_path / "out", "hf") < 1e-5
    assert not (tmp_path / "out" / "modules.json").exists() and (tmp_path / "out" / "query" / "config.json").exists()
    assert gate.check(tmp_path / "out") == {
        "embedjax": pytest.approx(0, abs=1e-5),
        "sentence-transformers": "does not read this format",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'SentenceTransformer(f"path/to/out/{side}")' in card and "encode_query" not in card and "## Prompts" not in card
    read = load(tmp_path / "out").config
    assert read.routes == {"query": "query", "document": "document"} and read.towers["query"].max_length == 5


def test_the_card_shows_the_prompt_of_each_side(result):
    made = load(result.folder)
    told = card_of(made, "x").split("## Prompts")[1]
    assert "| query | `find ` |" in told and "| document | `new ` |" in told and "| odd | `quiet ` |" in told
    assert "encode_query" in card_of(made, "x")
    apart = dict(made.config.towers)
    apart["document"] = dataclasses.replace(apart["document"], prompts={"query": "another ", "document": "house "})
    told = card_of(dataclasses.replace(made, config=dataclasses.replace(made.config, towers=apart)), "x").split("## Prompts")[1]
    assert "| query | `find ` |" in told and "| document | `house ` |" in told and "another" not in told
