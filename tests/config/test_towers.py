"""Which tower encodes what, and what several towers must agree in."""

import dataclasses

import pytest

from embedjax import build
from embedjax import config as c
from embedjax.config.errors import ConfigError

BERT = c.Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16)
TOWER = c.Tower(arch=BERT, tokenizer="wordpiece", max_length=16)
COLUMNS = {"anchor": "query", "positive": "document"}
TWO = c.Model({"query": TOWER, "document": TOWER}, COLUMNS)


def test_sides_columns_and_routes():
    columns = ("query", "anchor", "document", "positive", "negative", "negative_2")
    assert [TWO.tower_of(column) for column in columns] == ["query"] * 2 + ["document"] * 4
    assert TWO.routes == {"query": "query", "document": "document"} and TWO.similarity == "cosine"
    named = c.Model({"a": TOWER, "b": TOWER, "guide": TOWER}, {"anchor": "a", "positive": "b"})
    assert named.routes == {"query": "a", "document": "b"}
    one = c.Model({"text": TOWER})
    assert one.routes == {"text": "text"} and {one.tower_of(column) for column in (*columns, "text")} == {"text"}
    with pytest.raises(ConfigError, match="no tower for column 'text'"):
        TWO.tower_of("text")


def test_prompts_of_the_sides():
    tower = dataclasses.replace(TOWER, prompts={"query": "q: ", "plain": ""}, default_prompt="plain")
    found = [tower.prompt_for(column) for column in ("query", "anchor", "document", "positive", "negative")]
    assert found == ["query", "query", "plain", "plain", "plain"]
    prompts = {"query": "", "find-query": "", "find-document": "", "find": "", "ask-query": "", "sts": ""}
    tower = dataclasses.replace(TOWER, prompts=prompts, lora={"cls": c.Lora()})
    sides = ("anchor", "query", "positive", "negative_2", "text")
    named = {name: [tower.prompt_named(name, column) for column in sides] for name in ("find", "ask", "sts", "cls", "")}
    assert named == {
        "find": ["find-query"] * 2 + ["find-document"] * 2 + ["find"],
        "ask": ["ask-query"] * 2 + [None] * 3,
        "sts": ["sts"] * 5,
        "cls": [None] * 5,
        "": [None] * 5,
    }
    assert [tower.prompt_for(column, "ask") for column in sides[:3]] == ["ask-query", "ask-query", None]
    assert [tower.prompt_for(column, "cls") for column in sides[:3]] == ["query", "query", None]
    assert [name for name in (*named, "fin") if tower.knows(name)] == ["find", "ask", "sts", "cls"]
    assert TOWER.prompt_for("query") is None


def resolved(towers, columns=COLUMNS, export="sentence-transformers"):
    sets = (c.Set(columns={"anchor": "a", "positive": "b"}),)
    return build.resolve(c.Config(model=c.Model(towers, columns), data=c.Data(sets=sets), export=c.Export(export)))


DOT = dataclasses.replace(TOWER, similarity="dot")
WIDE = dataclasses.replace(TOWER, arch=dataclasses.replace(BERT, width=32))
STATIC = c.Tower(arch=c.Static(vocab_size=128, width=16), tokenizer="wordpiece")


def test_what_is_left_open_is_resolved():
    towers = resolved({"query": STATIC, "document": TOWER}).model.towers
    assert [(t.similarity, t.normalize, t.pooling) for t in towers.values()] == [("cosine", True, "mean")] * 2
    dot = resolved({"query": DOT, "document": dataclasses.replace(DOT, normalize=True)}).model
    assert dot.similarity == "dot" and [t.normalize for t in dot.towers.values()] == [False, True]
    fitted = dataclasses.replace(WIDE, dense=(c.Dense(16, activation="identity"),))
    assert resolved({"query": TOWER, "document": fitted}).model.towers["document"].width == 16


@pytest.mark.parametrize(
    ("towers", "columns", "told"),
    [
        (("text",), {"anchr": "text"}, "model.columns has no column 'anchr'; did you mean 'anchor'"),
        (("a", "b"), {"query": "a", "positive": "b"}, "has no column 'query'; known: anchor, negative, positive"),
        (("a", "b"), {"anchor": "a", "positive": "c"}, "gives 'positive' to tower 'c'"),
        (("a/b",), {}, "tower 'a/b' needs a name of letters"),
    ],
)
def test_names_that_mean_nothing_are_refused(towers, columns, told):
    with pytest.raises(ConfigError, match=told):
        c.Model(dict.fromkeys(towers, TOWER), columns)


@pytest.mark.parametrize(
    ("towers", "columns", "export", "told"),
    [
        ({"query": TOWER, "document": DOT}, COLUMNS, "none", "similarities differ"),
        ({"query": TOWER, "document": WIDE}, COLUMNS, "none", "have {'document': 32, 'query': 16} numbers"),
        ({"a": TOWER, "b": TOWER}, {"anchor": "a", "positive": "a", "negative": "b"}, "none", "negatives to tower 'b'"),
        (
            {"query": TOWER, "document": TOWER},
            {"anchor": "query"},
            "none",
            "tower 'document' encodes no column",
        ),
        ({"query": STATIC, "document": TOWER}, COLUMNS, "hf", "'query' is a static table"),
        ({"text": dataclasses.replace(STATIC, pooling="cls")}, {}, "none", "mean over all tokens"),
        ({"text": dataclasses.replace(STATIC, include_prompt=False)}, {}, "none", "mean over all tokens"),
    ],
)
def test_towers_that_do_not_fit_are_refused(towers, columns, export, told):
    with pytest.raises(ConfigError, match=told):
        resolved(towers, columns, export)
