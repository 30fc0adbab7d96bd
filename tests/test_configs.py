"""Every file of configs/ is a config, and the recipes of pictures run when they are made small."""

import dataclasses
import importlib.util
import inspect
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from embedjax import config, sharding
from embedjax.config.errors import ConfigError
from embedjax.config.load import from_file
from embedjax.config.serialize import from_json, to_json
from embedjax.data.tokenizer import save_tokenizer, train_wordpiece
from embedjax.evaluate import report
from embedjax.load import load
from embedjax.metrics.writers import read_rows
from embedjax.preview import preview
from embedjax.train import train

FOLDER = Path(__file__).resolve().parents[1] / "configs"
SMALL = {"width": 16, "depth": 1, "heads": 2, "mlp": 32}


def functions(path):
    """The functions of a file that make a config."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = inspect.getmembers(module, inspect.isfunction)
    return [name for name, f in made if f.__module__ == path.stem and not inspect.signature(f).parameters and name[0] != "_"]


CONFIGS = [f"{path.name}:{name}" for path in sorted(FOLDER.glob("*.py")) for name in functions(path)]


@pytest.mark.parametrize("name", CONFIGS)
def test_is_a_config_that_is_stored_and_read_back(name):
    made = from_file(FOLDER / name)
    assert isinstance(made, config.Config) and made.name != "run"
    assert from_json(json.loads(json.dumps(to_json(made)))) == made
    assert all(set(made.model.columns.values()) <= made.model.towers.keys() for _ in made.data.sets)


def test_a_file_without_a_name_is_its_function_config(tmp_path):
    assert from_file(FOLDER / "clip.py") == from_file(FOLDER / "clip.py:config")
    assert from_file(FOLDER / "clip.py:l14").model.towers["image"].arch == config.VITS["clip-L/14"]
    with pytest.raises(ConfigError, match=r"clip.py: no function 'l15'; did you mean 'l14'"):
        from_file(FOLDER / "clip.py:l15")
    for name in ("VITS", "recipe"):  # no function, and one that takes arguments
        with pytest.raises(ConfigError, match=f"no function {name!r}; known: b16, config, distilled, l14, rn50"):
            from_file(FOLDER / f"clip.py:{name}")
    (tmp_path / "a.py").write_text("def other():\n    return 3\n")
    with pytest.raises(ConfigError, match=r"other\(\) returned int"):
        from_file(tmp_path / "a.py:other")


# ---- the recipes, small


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    original = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: original(mesh, devices or jax.devices()[:1]))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer of the captions' words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = "a small large old new round flat quiet red green blue white square"
    save_tokenizer(train_wordpiece([words] * 4, 96), folder, max_length=8)
    return str(folder)


def small(made, shards, tokenizer, steps=2):
    """The same recipe on tiny towers, batches and pictures: what is left of it are loss, optimiser and how towers are used."""
    towers = {}
    for name, tower in made.model.towers.items():
        changes = {"init": "", "dense": tower.dense and tuple(dataclasses.replace(each, features=16) for each in tower.dense)}
        if isinstance(tower, config.Tower):
            arch = tower.arch or (config.ClipText() if "clip" in tower.init else config.Bert())
            sizes = {"vocab_size": 96, "pad_id": 0, "positions": 8}
            sizes |= {"eos_id": 3} if isinstance(arch, config.ClipText) else {}
            changes |= {"tokenizer": tokenizer, "max_length": 8}
        elif isinstance(tower.arch, config.ModifiedResnet):
            arch, sizes = config.ModifiedResnet(32, (1, 1, 1, 1), 8, 2, 16), {}
        else:
            arch, sizes = tower.arch or config.VITS["vit-B/16"], {"image": 16, "patch": 8}
        sizes = sizes if isinstance(arch, config.ModifiedResnet) else {**SMALL, **sizes}
        towers[name] = dataclasses.replace(tower, arch=dataclasses.replace(arch, **sizes), **changes)
    sets = tuple(dataclasses.replace(each, source=config.Tar(shards)) for each in made.data.sets)
    tasks = tuple(dataclasses.replace(each, source=config.Tar(shards), limit=12) for each in made.evaluate.tasks)
    return dataclasses.replace(
        made,
        steps=steps,
        model=dataclasses.replace(made.model, towers=towers),
        data=dataclasses.replace(made.data, batch_size=16, sets=sets, threads=1, prefetch=1),
        optim=dataclasses.replace(made.optim, warmup=1),
        evaluate=dataclasses.replace(made.evaluate, tasks=tasks),
        log_every=1,
    )


RECIPES = [name for name in CONFIGS if name.split(".")[0] in ("clip", "siglip", "lit")]
# One of them; `slow` runs every kind and size.
USUAL = ("clip.py:l14",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in USUAL else [pytest.mark.slow]) for name in RECIPES])
def test_recipes_run_when_they_are_small(name, shards, tokenizer, tmp_path, capsys):
    made = small(from_file(FOLDER / name), shards, tokenizer)
    result = train(made, tmp_path / "run")
    assert result.step == 2 and result.scores.keys() >= {"text_to_image/success@1", "image_to_text/success@10"}
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["loss"]) and not row["skipped"] for row in rows)
    assert 0 <= rows[-1]["data_wait"] <= 1 and "data wait" in capsys.readouterr().out
    frozen = {
        name for name in made.model.towers if name.startswith("teacher_") or name == "image" and made.name.startswith("lit")
    }
    constants = tmp_path / "run" / "constants.safetensors"
    assert constants.exists() == bool(frozen)


def test_colbertv2_runs_when_it_is_small(tmp_path):
    made = from_file(FOLDER / "colbertv2.py")
    (task,) = made.data.sets
    names = [name for name in task.columns if not name.startswith("score")]
    assert len(names) == 65 and len(task.columns) == 129 and list(task.columns.values()) == list(task.columns)
    rng, words = np.random.default_rng(0), ["red", "green", "blue", "small", "large", "old", "new", "round", "flat", "quiet"]
    text = lambda: " ".join(rng.choice(words, 4))
    rows = [{name: text() if name in names else float(rng.normal()) for name in task.columns} for _ in range(16)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tower = dataclasses.replace(
        made.model.towers["text"],
        init="",
        tokenizer="wordpiece",
        arch=config.Bert(vocab_size=128, positions=12, **SMALL),
        late=config.Late(query_length=8, document_length=12),
        compute="float32",
    )
    made = dataclasses.replace(
        made,
        steps=2,
        model=config.Model({"text": tower}),
        data=dataclasses.replace(
            made.data, batch_size=8, sets=(dataclasses.replace(task, source=config.File(str(tmp_path / "train.jsonl"))),)
        ),
        optim=dataclasses.replace(made.optim, warmup=1),
        log_every=1,
    )
    assert train(made, tmp_path / "run").step == 2
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert all(row["loss"] == pytest.approx(row["KlDistillation"] + row["MultipleNegatives"], rel=1e-5) for row in rows)
    assert load(tmp_path / "run" / "export").params["towers"]["text"]["dense"]["0"]["kernel"].shape == (16, 128)


def test_a_dry_run_of_a_recipe_tells_its_shapes(shards, tokenizer):
    told = "\n".join(preview(small(from_file(FOLDER / "clip.py:b16"), shards, tokenizer)))
    assert "16x16x16x3" in told and "row 0 anchor: a " in told and '"b2": 0.98' in told


def test_the_recipes_of_the_papers():
    """What is told of each in its docstring, where a slip would not be seen in a run."""
    clip, siglip, lit = (from_file(FOLDER / f"{name}.py") for name in ("clip", "siglip", "lit"))
    assert (clip.data.batch_size, siglip.data.batch_size, lit.data.batch_size) == (32_768, 32_768, 16_384)
    fields = ("learning_rate", "warmup", "weight_decay", "b2", "clip_norm", "schedule")
    shown = lambda made: [getattr(made.optim, field) for field in fields]
    assert shown(clip) == [5e-4, 2000, 0.2, 0.98, 0.0, "cosine"] and clip.optim.eps == 1e-6
    assert shown(siglip) == [1e-3, 20_000, 0.1, 0.95, 1.0, "cosine"]
    assert shown(lit) == [1e-3, 10_000, 0.1, 0.999, 1.0, "cosine"] and lit.optim.freeze == ("^towers/image/",)
    seen = lambda made: made.steps * made.data.batch_size
    assert seen(clip) == pytest.approx(32 * 400e6, rel=0.01) and seen(siglip) == pytest.approx(40e9, rel=0.01)


def test_the_quickstart_of_pictures_ends_with_a_table_and_a_sheet(tmp_path, capsys):
    made = from_file(FOLDER / "quickstart_clip.py")
    glyphs = lambda split: config.Glyphs(split, font="DejaVuSansMono", limit=96 if split == "train" else 24)
    towers = {
        "image": dataclasses.replace(made.model.towers["image"], arch=config.Vit(image=16, patch=8, **SMALL, pool="mean")),
        "text": dataclasses.replace(made.model.towers["text"], arch=config.Bert(512, **SMALL, positions=24)),
    }
    head = (config.Dense(8, bias=False, activation="identity"),)
    towers = {name: dataclasses.replace(tower, dense=head) for name, tower in towers.items()}
    task = dataclasses.replace(made.data.sets[0], source=glyphs("train"))
    tasks = tuple(dataclasses.replace(each, source=glyphs("test")) for each in made.evaluate.tasks)
    made = dataclasses.replace(
        made,
        steps=2,
        model=dataclasses.replace(made.model, towers=towers),
        data=dataclasses.replace(made.data, batch_size=16, sets=(task,)),
        optim=dataclasses.replace(made.optim, warmup=1),
        evaluate=dataclasses.replace(made.evaluate, tasks=tasks),
    )
    train(made, tmp_path / "run")
    out = capsys.readouterr().out
    tables = out[out.index("drawings: 24 held-out queries") :]
    assert tables.count("\nchance ") == tables.count("\nuntrained ") == tables.count("\ntrained ") == 2
    assert tables.count("\n? ") == report.EXAMPLES and "BM25" not in tables
    sheet = (tmp_path / "run" / "sheet-drawings.html").read_text()
    assert sheet.count("<h2>") == 24 and sheet.count("data:image/png;base64,") == 24 * report.BEST_PICTURES
    assert set(load(tmp_path / "run").config.towers) == {"image", "text"}
