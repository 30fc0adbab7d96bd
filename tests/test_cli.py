"""The command line on wrong input: one line that names the thing, and the exit code of the README's table."""

import ast
import dataclasses
import functools
import gzip
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedjax import config as c
from embedjax.__main__ import run
from embedjax.commands import COMMANDS
from embedjax.config.errors import ConfigError
from embedjax.config.load import from_file
from embedjax.export import export
from embedjax.load import assemble, make_texts
from embedjax.models.embedder import build_embedder
from embedjax.runs import opened

HEAD = "from embedjax.config import *\ndef config():\n    return "
NORM = "embeddings.LayerNorm.weight"
MODULE = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
TOWER = "arch=arch, tokenizer='wordpiece', max_length=8"


def assert_fails(arguments, code, *words, capsys):
    """Runs a command that must fail with `code` in one line that has all the words."""
    found = run([str(a) for a in arguments])
    err = capsys.readouterr().err.strip().splitlines()
    assert found == code, err
    assert len(err) == 1 and err[0].startswith("embedjax: "), err
    for word in words:
        assert word in err[0], err[0]


@pytest.fixture
def write_config(tmp_path, pairs_file):
    """Writes a config file whose tower and data can be replaced by source text."""

    def write(source=None, columns='{"anchor": "question", "positive": "answer"}', tower="", data="", **fields):
        source = source or f"File({str(pairs_file)!r})"
        more = "".join(f", {key}={value}" for key, value in fields.items())
        path = tmp_path / "my.py"
        path.write_text(
            "from embedjax.config import *\n"
            "def config():\n"
            "    arch = Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16)\n"
            f"    tower = Tower({tower or TOWER})\n"
            f"    sets = (Set({source}, {columns}),)\n"
            f"    return Config(steps=2, model=Model({{'text': tower}}), data=Data(batch_size=16, sets=sets{data}){more})\n"
        )
        return path

    return write


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small exported model."""
    import jax

    from embedjax.data.tokenizer import save_tokenizer, train_wordpiece

    folder = tmp_path_factory.mktemp("model")
    tower = c.Tower(
        arch=c.Bert(vocab_size=64, width=16, depth=1, heads=2, mlp=32, positions=16),
        pooling="mean", dense=(), normalize=True, max_length=8, prompts={}, include_prompt=True,
    )  # fmt: skip
    save_tokenizer(train_wordpiece(["red cat", "blue dog", "old tree"] * 9, 64), folder / "tokenizer", max_length=8)
    params = jax.jit(build_embedder(tower).init)(jax.random.key(0))
    tokenizer = folder / "tokenizer"
    model = assemble(
        c.Model({"text": tower}),
        {"towers": {"text": params}},
        {"text": make_texts(tower, tokenizer)},
        {"text": tokenizer},
        "test",
    )
    export(model, folder / "export")
    return folder / "export"


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of the exported model to damage."""
    import shutil

    return shutil.copytree(exported, tmp_path / "copy")


# ---- commands and configs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "'train'"]),
        (["train"], ["config file"]),
        (["train", "missing.py"], ["missing.py", "no such config"]),
        (["export", "model"], ["folder to write"]),
        (["evaluate", "m", "--task", "sts", "--data", "f.csv", "--columns", "a:b"], ["a:b", "OURS=THEIRS"]),
        (["encode", "nowhere/at all", "in.txt", "out.npy"], ["nowhere/at all"]),
        (["export", "missing-folder", "--check"], ["missing-folder", "parity.json"]),
    ],
)
def test_wrong_commands(arguments, words, capsys):
    assert_fails(arguments, 2, *words, capsys=capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_that_name\n", ["ModuleNotFoundError"]),
        ("def config(:\n", ["SyntaxError"]),
        ("x = 1\n", ["config"]),
        ("def config():\n    return 3\n", ["int", "Config"]),
        (HEAD + "Config(step=3)\n", ["Config has no field 'step'; did you mean 'steps'?"]),
        (HEAD + "Config(optim=Optim(learning_rat=1))\n", ["Optim has no field 'learning_rat'; did you mean 'learning_rate'?"]),
        (HEAD + "Config(x=3)\n", ["Config has no field 'x'; known: checkpoint, data,"]),
        (HEAD + "Config(steps='many')\n", ["Config.steps is 'many'; an int was expected"]),
        (HEAD + "Config(optim=Optim(eps=None))\n", ["Optim.eps is None; a float was expected"]),
        (HEAD + "Config(model=Model({'a': Tower(Bert(width='8'))}))\n", ["Bert.width is '8'; an int was expected"]),
        (HEAD + "Config(data=Data(sets=Set()))\n", ["Data.sets is Set(...); a list was expected"]),
        (HEAD + "Config(evaluate=Evaluate(tasks=('sts',), best='x'))\n", ["Evaluate.tasks.0 is 'sts'; expected one of Sts, "]),
        (HEAD + "Config(name=3)\n", ["config.name is 3; a string was expected"]),
        (HEAD + "Config(model=Model({'a': Bert()}))\n", ["config.model.towers.a.type is 'Bert'; known: ImageTower, Tower"]),
        (HEAD + "Config(steps=1 // 0)\n", ["ZeroDivisionError"]),
        (HEAD + "Config(steps=0)\n", ["steps is 0"]),
        (HEAD + "Config(data=Data(batch_size=-4))\n", ["batch_size is -4"]),
        (HEAD + "Config(model=Model({'a': Tower(Bert(width=-8))}))\n", ["width is -8"]),
        (HEAD + "Config(model=Model({'a': Tower(Bert(heads=7))}))\n", ["heads 7"]),
        (HEAD + "Config()\n", ["towers is empty"]),
    ],
)
def test_wrong_config_files(text, words, tmp_path, capsys):
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert_fails(["train", path, "--run-dir", tmp_path / "run"], 2, *words, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--data.batch-sise", "3"], "there is no option --data.batch-sise; did you mean '--data.batch-size'?"),
        (["--steps", "many"], "--steps is 'many'; an int was expected"),
        (["--optim.schedule", "liner"], "--optim.schedule is 'liner'; one of 'linear', 'cosine', 'constant' was expected"),
    ],
)
def test_wrong_overrides_name_the_field(arguments, line, write_config, capsys):
    assert_fails(["train", write_config(), *arguments], 2, f"embedjax: {line}", capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "m", "--task", "sts", "--data", "f.csv", "--k", "many"], ["--k is 'many'; an int was expected"]),
        (["evaluate", "m", "--tusk", "sts"], ["there is no option --tusk; did you mean '--task'?"]),
        (["mine", "m", "c", "pairs", "out", "--num-negative", "3"], ["no option --num-negative; did", "'--num-negatives'"]),
        (["mine", "m", "corpus", "pairs", "out", "--sampling", "all"], ["--sampling is 'all'; one of 'top', 'random'"]),
        (["encode", "m", "in.txt", "out.npy", "--as", "querry"], ["--as is 'querry'", "'query'"]),
        (["encode", "m", "in.txt", "out.npy", "--ids", "id"], ["--for qdrant, --for vespa or --for pgvector"]),
        (["search", "m", "text"], ["--corpus FILE", "--images FOLDER"]),
        (["search", "m", "text", "--corpus", "a", "--images", "b"], ["name one of them"]),
        (["search", "m", "--images", "a"], ["a text or a picture", "--like"]),
        (["search", "m", "text", "--like", "a.png", "--images", "a"], ["a text or a picture", "--like"]),
        (["search", "m", "--image", "a", "text"], ["no option --image; did you mean '--images'?"]),
        (["export", "m", "folder", "--format", "st"], ["--format is 'st'", "'sentence-transformers'"]),
        (["doctor", "--limit", "few"], ["--limit is 'few'; an int was expected"]),
        (["plan", "my.py", "--topology"], ["my.py"]),
    ],
)
def test_wrong_options_of_other_commands(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_fails(arguments, 2, *words, capsys=capsys)


@pytest.mark.parametrize("folder", ["gs://bucket/runs/x", "s3://bucket/x"])
def test_a_run_folder_at_a_url(folder, write_config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_fails(["train", write_config(), "--run-dir", folder], 2, folder, "mount the bucket", capsys=capsys)
    with pytest.raises(ConfigError, match="mount the bucket"), opened(Path(folder).absolute(), fresh=False):
        pass
    assert not list(tmp_path.glob("*:"))


# A config with every class of config in it, but for those that are sums of others.
EVERYTHING = """
import typing
from embedjax.config import *

def made(kind):
    whole = {"layers": Layers(), "quantized": Quantized()} if issubclass(kind, Pooled) else {}
    return kind(losses=(Siglip(),)) if kind is Sum else kind(**whole)

def config():
    losses, sources = map(made, typing.get_args(Loss)), [Tfds(), Functions(), Pictures(), Tar(), Glyphs()] + [File()] * 99
    sets = [Set(source, {"anchor": "a"}, name=str(i), loss=loss) for i, (loss, source) in enumerate(zip(losses, sources))]
    sets.append(Set(columns={"anchor": "a", "positive": "b"}, mine=Mine()))
    towers = {kind.__name__: Tower(kind(), dense=(Dense(8),), lora={"x": Lora()}) for kind in typing.get_args(Architecture)}
    image = lambda kind: ImageTower(kind(), pixels=Pixels(), dense=(Dense(8),), lora={"x": Lora()})
    towers |= {kind.__name__: image(kind) for kind in typing.get_args(ImageArchitecture)}
    towers["late"] = Tower(Bert(), dense=(Dense(8),), lora={"x": Lora()}, late=Late())
    return Config(
        model=Model(towers), data=Data(sets=tuple(sets)), optim=Optim(groups=(Group(),)),
        evaluate=Evaluate(tasks=tuple(kind() for kind in typing.get_args(Task))),
    )
"""


def leaves(value, path=""):
    """(option, class, field, value) of every field below a config that has no fields of its own."""
    for field in dataclasses.fields(value):
        item, name = getattr(value, field.name), f"{path}.{field.name}".lstrip(".")
        parts = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, tuple) else ()
        inner = [(f"{name}.{key}", part) for key, part in parts if dataclasses.is_dataclass(part)]
        for below, part in [(name, item)] if dataclasses.is_dataclass(item) else inner:
            yield from leaves(part, below)
        if not inner and not dataclasses.is_dataclass(item):
            yield "--" + name.replace("_", "-"), type(value), field.name, item


@functools.cache
def documented(kind):
    """Field -> the text below it, in a class or those it comes from."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def test_help_shows_every_field(tmp_path, capsys):
    path = tmp_path / "everything.py"
    path.write_text(EVERYTHING)
    with pytest.raises(SystemExit) as stop:
        run(["train", str(path), "--help"])
    assert stop.value.code == 0
    out = " ".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    told = {text.split(" ")[0].rstrip(","): text for text in re.split(r"(?<!,) (?=--[a-z])", out)}
    met, hidden = set(), set()
    for option, kind, field, value in leaves(from_file(path)):
        met |= set(kind.__mro__)
        options = [f"{option}.{key}" for key in value] if isinstance(value, dict) and value else [option]
        if not value and option not in told:
            hidden.add(field)
            continue
        assert set(options) <= set(told), option
        first = " ".join(documented(kind)[field].split()[:4])
        assert first in out if options != [option] else first in told[option], (option, first)
    assert hidden == {
        "mine",
        "queries",
        "corpus",
        "layers",
        "late",
        "calibrate",
        "quantized",
    }  # configs of their own that are not there
    assert {getattr(c, name) for name in c.__all__ if dataclasses.is_dataclass(getattr(c, name))} <= met


# ---- data


def table(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


GOOD = "question\tanswer\n" + "red cat\tcat red\n" * 40


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("missing.tsv", None, 3, ["missing.tsv"]),
        ("empty.tsv", "", 3, ["empty.tsv"]),
        ("header.tsv", "question\tanswer\n", 3, ["header.tsv"]),
        ("columns.tsv", GOOD.replace("answer", "reply"), 3, ["answer", "reply"]),
        ("few.tsv", "question\tanswer\n" + "a\tb\n" * 5, 3, ["5 rows", "batch_size 16"]),
        ("bad.parquet", b"PAR1 this is no parquet PAR1", 3, ["bad.parquet"]),
        ("cut.jsonl.gz", gzip.compress(b'{"question": "a", "answer": "b"}\n' * 900, mtime=0)[:40], 3, ["cut.jsonl.gz"]),
        ("utf8.tsv", GOOD.encode() + b"\xff\xfe\tdog\n" * 30, 3, ["are bad", "utf8.tsv"]),
        ("blank.tsv", GOOD + "\tdog\n" * 30, 3, ["are bad", "blank.tsv"]),
        ("broken.jsonl", '{"question": "a", "answer": "b"}\n' * 40 + "{nonsense\n" * 40, 3, ["are bad", "broken.jsonl"]),
        ("what.xyz", GOOD, 2, ["what.xyz"]),
        ("twice.tsv", GOOD.replace("answer", "question"), 3, ["twice.tsv", "question"]),
    ],
)
def test_wrong_data(name, content, code, words, write_config, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        table(path, content)
    config = write_config(source=f"File({str(path)!r})")
    assert_fails(["train", config, "--run-dir", tmp_path / "run"], code, *words, capsys=capsys)


def test_nan_among_the_scores_of_an_evaluation(exported, tmp_path, capsys):
    path = table(tmp_path / "sts.csv", "sentence1,sentence2,score\na,b,1\nc,d,nan\n")
    assert_fails(["evaluate", exported, "--task", "sts", "--data", path], 3, "sts.csv", "nan", capsys=capsys)


def test_an_empty_text_to_encode(exported, tmp_path, capsys):
    path = table(tmp_path / "in.txt", "red\n\nblue\n")
    assert_fails(["encode", exported, path, tmp_path / "out.npy"], 3, "in.txt", capsys=capsys)


# ---- models


def test_a_batch_that_does_not_divide(write_config, tmp_path, capsys):
    arguments = ["train", write_config(), "--run-dir", tmp_path / "run", "--data.batch-size", "12"]
    assert_fails(arguments, 2, "12", "8 devices", capsys=capsys)


def test_a_tower_without_tokenizer(write_config, tmp_path, capsys):
    assert_fails(
        ["train", write_config(tower="arch=arch, max_length=8"), "--run-dir", tmp_path / "r"], 2, "tokenizer", capsys=capsys
    )


def test_a_length_beyond_the_positions(write_config, tmp_path, capsys):
    config = write_config(tower="arch=arch, tokenizer='wordpiece', max_length=99")
    assert_fails(["train", config, "--run-dir", tmp_path / "run"], 2, "99", "16", capsys=capsys)


def test_a_reader_that_goes_away_ends_a_command_well(monkeypatch):
    """As after `embedjax train CONFIG --dry-run | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setitem(COMMANDS, "train", lambda arguments: print("a line", flush=True))
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert run(["train", "c.py", "--dry-run"]) == 0


def test_a_store_that_breaks_off_is_no_end_of_a_run(monkeypatch, capsys):

    def broken(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(COMMANDS, "train", broken)
    assert run(["train", "c.py"]) == 4
    assert capsys.readouterr().err == "embedjax: a connection broke off (Broken pipe)\n"


def test_a_freeze_that_matches_nothing(write_config, tmp_path, capsys):
    config = write_config(optim="Optim(freeze=('bloks',))")
    assert_fails(["train", config, "--run-dir", tmp_path / "run"], 2, "bloks", capsys=capsys)


def test_a_freeze_of_what_the_loss_has(write_config, tmp_path, capsys):
    columns = '{"anchor": "question", "positive": "answer"}, loss=MultipleNegatives(learn_scale=True)'
    config = write_config(columns=columns, optim="Optim(freeze=('scale$',))")
    assert_fails(["train", config, "--run-dir", tmp_path / "run"], 2, "loss/scale", "learn_scale to False", capsys=capsys)
    columns = '{"anchor": "question", "positive": "answer"}, loss=Siglip()'
    config = write_config(columns=columns, optim="Optim(freeze=('bias$',))")
    assert_fails(["train", config, "--run-dir", tmp_path / "run"], 2, "loss/bias", "learn_bias to False", capsys=capsys)
    columns = '{"anchor": "question", "label": "answer"}, loss=Classify(), labels=("a", "b"), name="kinds"'
    config = write_config(columns=columns, optim="Optim(freeze=('^loss/kinds/',))")
    assert_fails(["train", config, "--run-dir", tmp_path / "run"], 2, "loss/kinds/", "which is the loss's own", capsys=capsys)


def damage_tensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def set_json(name, **values):
    def change(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **values} if isinstance(data, dict) else values["rows"]))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, ["model.safetensors"]),
        (lambda f: (f / "model.safetensors").unlink(), ["safetensors"]),
        (lambda f: damage_tensor(f, lambda t: t.pop(NORM)), [NORM]),
        (lambda f: damage_tensor(f, lambda t: t.update(surprise=np.zeros(3, np.float32))), ["surprise"]),
        (lambda f: damage_tensor(f, lambda t: t.update({NORM: np.zeros(3, np.float32)})), ["[3]", "[16]"]),
        (set_json("config.json", model_type="gpt9"), ["gpt9"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
        (set_json("modules.json", rows=[MODULE | {"path": "../.."}]), [".."]),
        (set_json("modules.json", rows=[MODULE | {"type": "my.Module"}]), ["my.Module"]),
    ],
)  # fmt: skip
def test_damaged_models(damage, words, copied, tmp_path, capsys):
    damage(copied)
    texts = table(tmp_path / "in.txt", "red\nblue\n")
    assert_fails(["encode", copied, texts, tmp_path / "out.npy"], 2, *words, capsys=capsys)


def test_a_check_that_fails(copied, capsys):
    damage_tensor(copied, lambda t: t.update({k: v * 1.5 for k, v in t.items() if "word_embeddings" in k}))
    assert_fails(["export", copied, "--check"], 6, "differ", capsys=capsys)


def test_a_weight_that_is_not_finite(copied, tmp_path, capsys):
    damage_tensor(copied, lambda t: t[NORM].fill(np.nan))
    texts = table(tmp_path / "in.txt", "red\nblue\n")
    assert_fails(["encode", copied, texts, tmp_path / "out.npy"], 5, "not finite", capsys=capsys)


# ---- storage


def test_an_export_over_another_folder(exported, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert_fails(["export", exported, tmp_path / "mine"], 4, "not empty", capsys=capsys)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_run_folder_that_cannot_be_made(write_config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert_fails(["train", write_config(), "--run-dir", tmp_path / "file" / "run"], 4, "run", capsys=capsys)


# ---- what works


def test_encode_search_evaluate_and_check_work(exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = table(tmp_path / "in.txt", "red cat\nblue dog\nold tree\n")
    assert run(["encode", str(exported), str(texts), str(tmp_path / "out.npy")]) == 0
    assert np.load(tmp_path / "out.npy").shape == (3, 16)
    assert run(["search", str(exported), "blue dog", "--corpus", str(texts)]) == 0
    assert capsys.readouterr().out.split("in.txt:")[1].startswith("2")
    sts = table(tmp_path / "sts.csv", "sentence1,sentence2,score\nred cat,red cat,5\nred cat,old tree,1\nblue dog,red dog,3\n")
    assert run(["evaluate", str(exported), "--task", "sts", "--data", str(sts)]) == 0
    assert "sts/spearman" in capsys.readouterr().out
    assert run(["export", str(exported), "--check"]) == 0
    assert "largest difference 0.0e+00" in capsys.readouterr().out


def test_ranges_are_saved_used_and_told(copied, tmp_path, capsys):
    """export --calibrate, encode --precision, evaluate --retention, on one exported folder; then what a run does at its end."""
    from embedjax import calibration
    from embedjax.evaluate.tasks import read
    from embedjax.export import quantize

    texts = table(tmp_path / "in.txt", "red cat\nblue dog\nold tree\n")
    others = table(tmp_path / "others.txt", "red\ncat\nblue\ndog\nold\ntree\nred dog\nblue tree\n")
    out, model = tmp_path / "out.npy", str(copied)
    encode = ["encode", model, texts, out, "--precision", "int8", "--dim", "8"]
    assert_fails(encode, 2, "int8 needs the ranges", "--calibrate FILE", capsys=capsys)
    assert_fails([*encode, "--calibrate", texts], 2, "in.txt is what is encoded", capsys=capsys)
    assert run([*map(str, encode), "--calibrate", str(others)]) == 0
    once = out.read_bytes()
    assert run(["export", model, "--calibrate", str(others), "--dims", "8"]) == 0
    assert "ranges of text: 16, 8 dimensions, from 8 rows (at least 10,000 are advised)" in capsys.readouterr().out
    assert run([str(word) for word in encode]) == 0 and out.read_bytes() == once
    capsys.readouterr()
    assert_fails([*encode[:-1], "4"], 2, "ranges for 16, 8 dimensions, not for 4", capsys=capsys)
    capsys.readouterr()

    rows = "red cat,red cat,5\nred cat,old tree,1\nblue dog,red dog,3\n"
    sts = table(tmp_path / "sts.csv", f"sentence1,sentence2,score\n{rows}")
    assert run(["evaluate", model, "--task", "sts", "--data", str(sts), "--dims", "8", "--retention"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8 + 1 and lines[1].split()[:4] == ["sts", "16", "float32", "64"]
    card = (copied / "README.md").read_text()
    assert "| 8 | binary | 1 |" in card and "(quantization/retention.svg)" in card
    assert run(["export", model, "--check"]) == 0, "what was added does not disturb its readers"

    asked = c.Export(calibrate=c.File(str(others)), dims=(4,))
    told = list(quantize.at_the_end(copied, asked, [read(c.Sts(c.File(str(sts)), name="mine"))]))
    assert told[0].startswith("ranges of text: 16, 4 dimensions") and any(line.startswith("mine ") for line in told)
    assert list(calibration.read(copied)["text"].ranges) == [16, 4]
    assert (copied / "README.md").read_text().count("## Dimensions and precisions") == 1
    assert not list(quantize.at_the_end(copied, c.Export(), []))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encode", "m", "in.txt", "out.npy", "--dim", "-1"], ["--dim is -1"]),
        (["encode", "m", "in.txt", "out.npy", "--calibrate", "a.txt"], ["--calibrate takes the ranges", "float32"]),
        (["export", "m", "f", "--dims", "8"], ["--dims are of --calibrate"]),
        (["export", "m", "--check", "--calibrate", "a.txt"], ["two commands"]),
        (["export", "m", "--calibrate", "a.txt", "--dims", "a"], ["--dims holds 'a'"]),
        (["evaluate", "m", "--task", "sts", "--data", "f", "--retention", "yes"], ["yes"]),
    ],
)
def test_options_of_codes_that_do_not_go_together(arguments, words, capsys):
    assert_fails(arguments, 2, *words, capsys=capsys)


@pytest.fixture
def loaded(pair, monkeypatch, tmp_path):
    """Whatever model is named, it is the random one of pictures and texts."""
    monkeypatch.setattr("embedjax.load.load", lambda name: pair)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_pictures_are_encoded_searched_and_evaluated(loaded, pictures, tmp_path, capsys):
    out = tmp_path / "out.npy"
    assert run(["encode", "m", str(pictures), str(out)]) == 0 and np.load(out).shape == (28, 12)
    assert run(["search", "m", "--images", str(pictures), "a red photo", "--k", "3"]) == 0
    assert re.findall(r"^(\d)  -?\d\.\d{3}  (.*)$", capsys.readouterr().out, re.M)[2][1].startswith(str(pictures))
    assert run(["search", "m", "--images", str(pictures), "--like", str(pictures / "red" / "0.png"), "--k", "1"]) == 0
    assert capsys.readouterr().out == f"1  1.000  {pictures / 'red' / '0.png'}\n"
    texts = table(tmp_path / "in.txt", "red cat\nblue dog\n")
    assert run(["search", "m", "--corpus", str(texts), "--like", str(pictures / "red" / "0.png")]) == 0
    assert capsys.readouterr().out.count("in.txt:") == 2
    task = ["evaluate", "m", "--data", str(pictures), "--dims", "8", "--task"]
    assert run([*task, "zero-shot", "--templates", "a photo of a {}.", "{}"]) == 0
    found = capsys.readouterr().out
    assert all(f"zero-shot{dim}/{metric}" in found for dim in ("", "@8") for metric in ("top1", "top5", "mean_per_class"))
    assert run([*task, "classification", "--train", str(pictures), "--per-label", "0"]) == 0
    assert run([*task, "knn", "--train", str(pictures), "--k", "1"]) == 0
    assert "knn/accuracy\t1.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("encode m {none} out.npy", 3, ["none", "no such file"]),
        ("encode m {empty} out.npy", 3, ["empty", "a folder without pictures"]),
        ("encode m {broken} out.npy", 3, ["broken", "x.png:1", "cannot be decoded"]),
        ("encode m {pictures} out.npy --column picture", 3, ["no column 'picture'", "found: image, name, label"]),
        ("encode m {pictures} out.npy --as picture", 2, ["--as is 'picture'", "'image'"]),
        ("encode m {pictures} out.txt", 2, ["out.txt", ".npy, .parquet"]),
        ("encode m {pictures} out.npy --task wint", 2, ["no prompt and no adapter 'wint'"]),
        ("encode m {packed} out.npy", 3, ["train.tar.gz", "unpack it to .tar"]),
        ("encode m {words} out.npy --as image", 3, ["words.jsonl:1: column 'text'", "red cat' cannot be read"]),
        ("search m --images {empty} red", 3, ["a folder without pictures"]),
        ("search m --images {broken} red", 3, ["none of the 1 pictures can be decoded", "x.png"]),
        ("search m --images {pictures} --like {none}", 3, ["none", "No such file"]),
        ("search m --images {pictures} --like {words}", 3, ["words.jsonl", "cannot be decoded"]),
        ("search m --images {pictures} red --k 0", 2, ["0 results"]),
        ("search m --images {words} red", 3, ["none of the 1 pictures can be decoded", "red cat' cannot be read"]),
        ("search m --corpus {pictures} red", 3, ["no Python functions", "--images"]),
        ("evaluate m --task zero-shot --data {pictures} --templates photo", 2, ["'photo' has no {}"]),
        ("evaluate m --task zero-shot --data {pictures} --classes red,blue", 3, ["is 'gold', none of the 2 classes"]),
        ("evaluate m --task zero-shot --data {empty}", 3, ["a folder without pictures"]),
        ("evaluate m --task zero-shot --data {broken}", 3, ["all 1 rows have the label 'broken'"]),
        ("evaluate m --task zero-shot --data {words}", 3, ["words.jsonl has no column 'image'"]),
        ("evaluate m --task zero-shot --data {pictures} --columns label=kind", 3, ["no column 'kind'"]),
        ("evaluate m --task zero-shot --data {pictures} --dims 99", 2, ["dims holds 99"]),
        ("evaluate m --task knn --data {pictures} --train {empty}", 3, ["a folder without pictures"]),
        ("evaluate m --task classification --data {pictures}", 2, ["name their file with --train"]),
        ("evaluate m --task retrieval --data {words} --columns query=text,document=text --pictures document", 3, ["red cat"]),
        ("evaluate m --task retrieval --data {words} --pictures documents", 2, ["pictures names 'documents'"]),
    ],
)
def test_wrong_pictures(arguments, code, words, loaded, pictures, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no picture")
    table(tmp_path / "words.jsonl", '{"text": "red cat"}\n')
    table(tmp_path / "train.tar.gz", "packed")
    monkeypatch.chdir(tmp_path)
    made = {name: tmp_path / name for name in ("none", "empty", "broken")}
    made |= {"words": tmp_path / "words.jsonl", "packed": tmp_path / "train.tar.gz"}
    filled = [word.format(pictures=pictures, **made) for word in arguments.split()]
    assert_fails(filled, code, *words, capsys=capsys)


def test_dry_run_prints_and_writes_nothing(write_config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(write_config()), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert '"batch_size": 16' in out and "MiB" in out and out.count("tokens:") == 6
    assert not (tmp_path / "runs").exists()


def test_doctor_reports_the_machine(tmp_path, capsys):
    assert run(["doctor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "jax" in out and "allocator" in out and "writable" in out


def test_the_command_as_a_process(tmp_path):
    """Once for real: a process of its own, no traceback, the exit code of the table."""
    found = subprocess.run(
        [sys.executable, "-m", "embedjax", "train", "none.py"], capture_output=True, text=True, cwd=tmp_path, env={**os.environ}
    )
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "Traceback" not in found.stderr
