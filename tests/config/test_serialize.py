"""Configs survive JSON, and every mistake in a stored config is named by its place."""

import dataclasses
import json

import pytest

from embedjax import config
from embedjax.config import serialize
from embedjax.config.errors import ConfigError

FULL = config.Config(
    name="all",
    model=config.Model(
        {"a": config.Tower(config.Mpnet(), dense=(config.Dense(8),), prompts={"query": "q: "})}, {"anchor": "a"}
    ),
    data=config.Data(
        buckets=((8, 16), (32, 64)),
        sets=(
            config.Set(config.Tfds("x"), {"anchor": "q"}, name="one"),
            config.Set(config.Functions(), {"anchor": "summary"}, name="two"),
        ),
    ),
    optim=config.Optim(groups=(config.Group("tokens", 0.1),), freeze=("norm",)),
    evaluate=config.Evaluate(tasks=(config.Sts(), config.Retrieval(corpus=config.File("c.jsonl")))),
)


def test_json_round_trip():
    assert serialize.from_json(json.loads(json.dumps(serialize.to_json(FULL)))) == FULL


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("optim", "learning_rat"), 1, "config.optim has no field 'learning_rat'; did you mean 'learning_rate'?"),
        (("optim", "learning_rate"), "fast", "config.optim.learning_rate is 'fast'; a float was expected"),
        (("optim", "schedule"), "liner", "config.optim.schedule is 'liner'; it must be one of 'linear', 'cosine', 'constant'"),
        (("steps",), 2.5, "config.steps is 2.5; an int was expected"),
        (("steps",), True, "config.steps is True; an int was expected"),
        (("data", "buckets"), [[1, 2, 3]], "config.data.buckets.0 has 3 items; 2 were expected"),
        (("model", "towers"), [], "config.model.towers is []; an object was expected"),
        (("evaluate", "tasks"), [{"type": "Stss"}], "config.evaluate.tasks.0.type is 'Stss'; did you mean 'Sts'?"),
    ],
)
def test_mistakes_are_named(path, value, words):
    data = serialize.to_json(FULL)
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ConfigError) as error:
        serialize.from_json(data)
    assert words in str(error.value)


def test_differences_name_paths_and_both_values():
    other = dataclasses.replace(FULL, steps=7, optim=dataclasses.replace(FULL.optim, clip_norm=2.0))
    found = serialize.differences(serialize.to_json(FULL), serialize.to_json(other))
    assert found == {"steps": (1000, 7), "optim.clip_norm": (1.0, 2.0)}


@pytest.mark.parametrize("text", ["", "[1", '{"type": "Bert"}', "null"])
def test_a_damaged_file_is_a_config_error(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        serialize.read(path)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        serialize.read(tmp_path / "config.json")
