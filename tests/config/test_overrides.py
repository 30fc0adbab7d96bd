"""The command line, read: its options are those tyro has, and what is wrong with them is told in one line."""

import dataclasses
import re
import sys
import typing
from typing import Annotated, Literal

import pytest
import tyro

from embedjax import commands, config
from embedjax.config import overrides
from embedjax.config.errors import ConfigError

EXAMPLE = config.Config(
    model=config.Model({"text": config.Tower(config.Bert(), dense=(config.Dense(8),), lora={"a": config.Lora()})}),
    data=config.Data(
        sets=(
            config.Set(config.Functions(), {"anchor": "summary"}, name="one", loss=config.Sum(losses=(config.Siglip(),))),
            config.Set(loss=config.MultipleNegatives(layers=config.Layers()), name="two"),
        )
    ),
    evaluate=config.Evaluate(tasks=(config.Sts(), config.Retrieval(corpus=config.File("c.jsonl")))),
)


def read(*words):
    return overrides.parse(commands.Train, words, prog="train", default=commands.Train(EXAMPLE))


def test_the_options_are_tyros(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    shown = {name for line in lines if re.match("--[a-z]", line) for name in re.findall(r"--[\w.-]+", line.split("  ")[0])}
    known = overrides.options(commands.Train, commands.Train(EXAMPLE))
    assert {name for name, kind in known.items() if kind is not overrides.EMPTY} == shown
    empty = {"--data.sets.0.mine", "--data.sets.1.mine", "--optim.groups", "--evaluate.tasks.1.queries"}
    empty |= {
        "--export.calibrate",
        "--data.sets.0.loss.layers",
        "--data.sets.0.loss.losses.0.layers",
        "--model.towers.text.late",
    }
    empty |= {f"--data.sets.{n}.quantized" for n in ("0.loss", "0.loss.losses.0", "1.loss")}
    assert {name for name, kind in known.items() if kind is overrides.EMPTY} == empty


def test_what_is_right_is_read():
    made = read("--data.buckets", "1", "2", "3", "4", "--data.no-shuffle", "--data.batch_size=32", "--optim.clip-norm", "1e-3")
    assert made.config.data.buckets == ((1, 2), (3, 4)) and not made.config.data.shuffle
    assert made.config.data.batch_size == 32 and made.config.optim.clip_norm == 1e-3
    assert read("--mesh.data", "-1", "--fresh").config.mesh.data == -1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--steps", "--steps has no value; an int was expected"),
        ("--steps 1e3", "--steps is '1e3'; an int was expected"),
        ("--steps 3 4", "--steps is '3' '4'; an int was expected"),
        ("--steps=", "--steps is ''; an int was expected"),
        ("--optim.learning_rate fast", "--optim.learning_rate is 'fast'; a float was expected"),
        ("--data.sets.1.loss.scale big", "--data.sets.1.loss.scale is 'big'; a float or None was expected"),
        ("--model.towers.text.normalize no", "--model.towers.text.normalize is 'no'; True or False or None was expected"),
        ("--model.towers.text.pooling men", "--model.towers.text.pooling is 'men'; one of 'mean', 'cls', "),
        ("--data.shuffle False", "--data.shuffle is 'False'; it takes no value: give --data.shuffle or --data.no-shuffle"),
        ("--no-fresh x", "--no-fresh is 'x'; it takes no value: give --fresh or --no-fresh"),
        ("--data.buckets 8 16 32", "--data.buckets is '8' '16' '32'; any number of times an int and an int was expected"),
        ("--writers wandb csv", "--writers is 'wandb' 'csv'; any number of times one of 'tensorboard', 'wandb' was expected"),
        ("--model.columns anchor", "--model.columns is 'anchor'; any number of keys and values was expected"),
        ("extra --steps 3", "'extra' follows no option; options begin with --, and --help lists them"),
        ("--learning-rate 1", "there is no option --learning-rate; did you mean '--optim.learning-rate'?"),
        ("--model.towers.text.arch.widht 8", "there is no option --model.towers.text.arch.widht; did "),
        ("--qqq 1", "there is no option --qqq; --help lists them"),
        ("-q 1", "there is no option -q; --help lists them"),
        ("--optim.groups.0.path x", "--optim.groups.0.path cannot be set here: optim.groups is empty in the config file"),
        ("--steps 0", "steps is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(words, line, capsys):
    with pytest.raises(ConfigError) as error:
        read(*words.split())
    assert str(error.value).startswith(line), error.value
    assert capsys.readouterr().err == ""


def command(
    model: tyro.conf.Positional[str], k: int = 5, kind: Annotated[Literal["a"] | None, tyro.conf.arg(name="as")] = None
):
    """A command."""
    return model, k, kind


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("m --k x", "--k is 'x'; an int was expected"),
        ("m --as b", "--as is 'b'; one of 'a' or None was expected"),
        ("m --kk 3", "there is no option --kk; did you mean '--k'?"),
        ("--k 3", "Missing from c: STR"),
        ("--k 3 m n", "Unrecognized options: n"),
    ],
)
def test_commands_with_words_of_their_own(words, line):
    assert overrides.parse(command, ["--k", "3", "m"], prog="c") == ("m", 3, None)
    with pytest.raises(ConfigError) as error:
        overrides.parse(command, words.split(), prog="c")
    assert str(error.value).startswith(line) and "│" not in str(error.value)


def test_what_is_said_without_an_error_is_passed_on(capsys):
    with overrides.one_line():
        print("careful", file=sys.stderr)
    assert capsys.readouterr().err == "careful\n"


def test_every_type_of_a_field_has_words():
    """What a message would say of any field of any config."""
    kinds = {kind for name in config.__all__ if dataclasses.is_dataclass(kind := getattr(config, name))}
    assert len(kinds) > 40
    for kind in kinds:
        for hint in typing.get_type_hints(kind).values():
            if typing.get_origin(hint) is not typing.ClassVar and not overrides._holds_fields(hint):
                assert overrides._expected(hint)
