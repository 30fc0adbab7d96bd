"""Runs on pictures and texts: the trainer, its batches, evaluation and loading are those of texts."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from embedjax import build, runs, sharding
from embedjax import config as c
from embedjax.config.errors import ConfigError, DataError, Saved
from embedjax.evaluate import tasks
from embedjax.evaluate.encode import encode
from embedjax.load import load
from embedjax.metrics.writers import read_rows
from embedjax.train import train

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230), "grey": (128, 128, 128)}
SHAPES = ("square", "bar", "post", "corner")


def picture(colour, shape, seed=0):
    """A coloured shape on white, somewhere."""
    draw = np.random.default_rng(seed)
    square = np.full((24, 30, 3), 255, np.uint8)
    y, x = draw.integers(2, 8, 2)
    height, width = {"square": (12, 12), "bar": (4, 16), "post": (14, 4), "corner": (12, 12)}[shape]
    square[y : y + height, x : x + width] = COLOURS[colour]
    if shape == "corner":
        square[y + 4 : y + height, x + 4 : x + width] = 255
    return Image.fromarray(square)


@pytest.fixture
def captioned(tmp_path):
    """A JSONL of 64 captioned pictures beside their files: paths relative to it, two captions a picture."""
    rows = []
    for n in range(64):
        colour, shape = list(COLOURS)[n % 4], SHAPES[n // 4 % 4]
        picture(colour, shape, n).save(tmp_path / f"{n}.{'png' if n % 2 else 'jpg'}")
        rows.append(
            {"file": f"{n}.{'png' if n % 2 else 'jpg'}", "captions": [f"{colour} {shape}", f"a {shape} in {colour}"], "n": n}
        )
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(captioned):
    """The same with one caption a row, each a query for its picture."""
    rows = [json.loads(line) for line in captioned.read_text().splitlines()]
    path = captioned.with_name("pairs.jsonl")
    said = [(row["file"], text, row["captions"][0].split()[0]) for row in rows for text in row["captions"]]
    path.write_text("".join(json.dumps({"file": file, "text": text, "colour": colour}) + "\n" for file, text, colour in said))
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs use one of the simulated devices; `use(count)` makes them use more."""
    original = sharding.make_mesh

    def use(count):
        some = lambda mesh, devices=None: original(mesh, devices or jax.devices()[:count])
        monkeypatch.setattr(sharding, "make_mesh", some)

    use(1)
    return use


@pytest.fixture
def config(captioned, pairs):
    head = (c.Dense(16, bias=False, activation="identity"),)
    image = c.ImageTower(
        c.Vit(image=16, patch=4, width=16, depth=1, heads=2, mlp=32, patch_dropout=0.25, dropout=0.1),
        dense=head,
        augment=c.Augment(area=(0.7, 1.0), brightness=0.2, grey=0.1),
    )
    text = c.Tower(
        c.Bert(vocab_size=96, width=16, depth=1, heads=2, mlp=32, positions=16), tokenizer="wordpiece", max_length=8, dense=head
    )
    task = lambda name, query, document: c.Retrieval(
        c.File(str(pairs)), {"query": query, "document": document}, pictures=(name,), name=f"to {name}", dims=(8,)
    )
    return c.Config(
        name="pictures",
        steps=6,
        model=c.Model({"image": image, "text": text}, {"anchor": "text", "positive": "image"}),
        data=c.Data(
            batch_size=16,
            sets=(
                c.Set(
                    c.File(str(captioned)),
                    {"anchor": "captions", "positive": "file"},
                    c.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", scale=1 / 0.07, learn_scale=True),
                    several=("anchor",),
                ),
            ),
        ),
        optim=c.Optim(learning_rate=1e-3),
        evaluate=c.Evaluate(
            tasks=(
                task("document", "text", "file"),
                task("query", "file", "text"),
                c.ZeroShot(c.File(str(pairs)), {"image": "file", "label": "colour"}, templates=("{} square", "a bar in {}")),
            )
        ),
        checkpoint=c.Checkpoint(every=3),
        export=c.Export("none"),
        log_every=1,
    )


def rows(folder):
    return [
        {k: v for k, v in row.items() if k not in ("pairs_per_second", "data_wait")}
        for row in read_rows(folder / "metrics.jsonl")
    ]


class StopAt:
    def __init__(self, n):
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


def test_a_run_on_pictures_is_evaluated_loaded_and_goes_on_bitwise(config, tmp_path, monkeypatch):
    result = train(config, tmp_path / "whole")
    assert set(result.scores) >= {
        "to document/ndcg@10",
        "to document@8/ndcg@10",
        "to document/success@5",
        "to query/success@10",
        "zero-shot/top1",
    }
    with monkeypatch.context() as patch:
        patch.setattr(runs, "stop_signal", lambda: contextlib.nullcontext(StopAt(2)))
        with pytest.raises(Saved):
            train(config, tmp_path / "parts")
    again = train(config, tmp_path / "parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole") and again.scores == result.scores
    model = load(tmp_path / "whole")
    scores = tasks.evaluate(model, config.evaluate.tasks)
    np.testing.assert_allclose([scores[key] for key in result.scores], list(result.scores.values()), atol=1e-6)
    # The same pictures as bytes and as paths, and the texts that are their queries.
    file = tmp_path / "3.png"
    vectors = encode(model, [str(file), file.read_bytes()], column="document")
    assert vectors.shape == (2, 16) and np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert encode(model, ["red bar"], column="query").shape == (1, 16)
    with pytest.raises(DataError, match=r"none.png.*No such file"):
        encode(model, [str(tmp_path / "none.png")], column="document")


def first_batch(config, folder):
    run = build.build(build.resolve(config), folder)
    task, columns = run.batches.batch(0)
    return run, run.steps[task], columns


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"cached": 4}, marks=pytest.mark.slow),
        pytest.param({"devices": 4}, marks=pytest.mark.slow),
        {"cached": 2, "devices": 2},
    ],
    ids=str,
)
def test_cached_and_on_several_devices_the_first_step_is_the_same(config, changes, tmp_path, one_device):
    """Dropout, patches left out and colours hang on the row alone, not on chunks or devices."""
    found = []
    for n, (cached, devices) in enumerate([(1, 1), (changes.get("cached", 1), changes.get("devices", 1))]):
        one_device(devices)
        changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, cached=cached))
        run, step, columns = first_batch(changed, tmp_path / str(n))
        state, constants = run.init()
        _, metrics = step(state, constants, sharding.place(columns, run.mesh))
        found.append({key: float(metrics[key]) for key in ("loss", "grad_norm")})
    np.testing.assert_allclose(found[1]["loss"], found[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(found[1]["grad_norm"], found[0]["grad_norm"], rtol=1e-4)


def test_batches_of_pictures_and_captions(config, tmp_path):
    run, _, columns = first_batch(config, tmp_path / "a")
    assert columns["positive"]["pixels"].shape == (16, 16, 16, 3) and columns["positive"]["pixels"].dtype == np.uint8
    assert columns["hash"]["positive"].shape == (16, 2) and columns["anchor"]["ids"].shape == (16, 8)
    shapes = {key: x.shape for key, x in run.batches.shapes()[0][1]["positive"].items()}
    assert shapes == {"pixels": (16, 16, 16, 3)}
    decode = lambda batch: {tuple(ids[ids > 0]) for ids in batch["anchor"]["ids"]}
    # Each step draws a caption of each picture: over some epochs both are seen, and the same step draws the same again.
    seen = set().union(*(decode(run.batches.batch(step)[1]) for step in range(0, 12)))
    assert len(seen) > 16
    again = build.build(build.resolve(config), tmp_path / "b").batches
    for step in (0, 7):
        for x, y in zip(jax.tree.leaves(run.batches.batch(step)[1]), jax.tree.leaves(again.batch(step)[1]), strict=True):
            np.testing.assert_array_equal(x, y)
    assert not np.array_equal(run.batches.batch(0)[1]["positive"]["pixels"], run.batches.batch(4)[1]["positive"]["pixels"])


def test_two_processes_hold_the_halves_of_the_batch(config, tmp_path):
    from embedjax.data.batches import Batches

    run, _, whole = first_batch(config, tmp_path / "a")
    arguments = (config.data, list(run.sources.values()), run.batches.texts, run.batches.prompts)
    options = {"seed": config.seed, "steps": config.steps, "images": run.batches.images, "process_count": 2}
    halves = [Batches(*arguments, **options, process_index=n).batch(0)[1] for n in (0, 1)]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_damaged_pictures_are_replaced_counted_and_listed(config, captioned, tmp_path):
    folder = captioned.parent
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:60])
    (folder / "6.jpg").unlink()
    loose = dataclasses.replace(config, data=dataclasses.replace(config.data, bad_share=0.1))
    train(dataclasses.replace(loose, evaluate=c.Evaluate()), tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    reasons = {row["row"]: row["reason"] for row in listed}
    assert sorted(reasons) == [6, 7] and "cannot be decoded" in reasons[6] and "No such file" in reasons[7]
    with pytest.raises(DataError, match=r"bad .*more than data.bad_share 1.0%"):
        train(dataclasses.replace(config, evaluate=c.Evaluate()), tmp_path / "strict")


def test_a_frozen_image_tower_has_no_optimiser_state_and_does_not_move(config, tmp_path):
    """LiT (Zhai et al. 2022): only the text tower learns."""
    frozen = dataclasses.replace(
        config, steps=2, optim=dataclasses.replace(config.optim, freeze=("^towers/image/",)), evaluate=c.Evaluate()
    )
    run = build.build(build.resolve(frozen), tmp_path / "first")
    state, constants = run.init()
    assert set(state.params["towers"]) == {"text"} and set(constants["towers"]) == {"image"}
    train(frozen, tmp_path / "run")
    jax.tree.map(
        np.testing.assert_array_equal,
        load(tmp_path / "run").params["towers"]["image"],
        jax.device_get(constants["towers"]["image"]),
    )


def test_what_pictures_cannot_be(config, tmp_path):
    def refused(reason, **changes):
        with pytest.raises(ConfigError, match=reason):
            build.build(build.resolve(dataclasses.replace(config, **changes)), tmp_path)

    which = config.data.sets[0]
    sets = lambda **changes: dataclasses.replace(config.data, sets=(dataclasses.replace(which, **changes),))
    refused("several names 'positive'", data=sets(several=("positive",)))
    image = dataclasses.replace(config.model.towers["image"], pixels=c.Pixels(shorter=8))
    refused(
        "at least the picture's side", model=dataclasses.replace(config.model, towers={**config.model.towers, "image": image})
    )
    texts = c.Model({"text": config.model.towers["text"]})
    data = sets(columns={"anchor": "captions", "positive": "captions"}, several=("anchor", "positive"))
    refused("task 'to document': the model has no tower that takes pictures", model=texts, data=data)
    dims = dataclasses.replace(config.evaluate.tasks[2], dims=(17,))
    refused("task 'zero-shot', tower 'text': dims holds 17", evaluate=c.Evaluate(tasks=(dims,)))


@pytest.mark.slow
def test_pictures_learn_what_they_show(config, tmp_path):
    """Colour and shape of pictures drawn anew are found by their names, far above chance."""
    data = io.StringIO()
    for n in range(32):
        colour, shape = list(COLOURS)[n % 4], SHAPES[n // 4 % 4]
        picture(colour, shape, 1000 + n).save(tmp_path / f"new-{n}.png")
        data.write(json.dumps({"file": f"new-{n}.png", "text": f"{colour} {shape}"}) + "\n")
    (tmp_path / "new.jsonl").write_text(data.getvalue())
    image = dataclasses.replace(
        config.model.towers["image"],
        arch=dataclasses.replace(config.model.towers["image"].arch, patch_dropout=0.0, dropout=0.0),
    )
    task = c.Retrieval(
        c.File(str(tmp_path / "new.jsonl")), {"query": "text", "document": "file"}, pictures=("document",), name="new"
    )
    longer = dataclasses.replace(
        config,
        steps=150,
        model=dataclasses.replace(config.model, towers={**config.model.towers, "image": image}),
        optim=c.Optim(learning_rate=3e-3),
        evaluate=c.Evaluate(tasks=(task,)),
        checkpoint=c.Checkpoint(every=1000),
        log_every=50,
    )
    # 16 queries, two right pictures each among 32: chance finds one of the two first in 6 % of the cases.
    assert train(longer, tmp_path / "run").scores["new/success@1"] > 0.5


@pytest.mark.parametrize(
    "format", ["sentence-transformers", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hf", "open-clip"))]
)
def test_a_run_ends_with_a_folder(format, config, tmp_path):
    """With the run's own pictures in its reference, and the scale that was learned."""
    towers = dict(config.model.towers)
    if format != "sentence-transformers":
        clip = {"input_norm": True, "patch_bias": False, "activation": "gelu"}
        towers["image"] = dataclasses.replace(towers["image"], arch=dataclasses.replace(towers["image"].arch, **clip))
        sizes = {"vocab_size": 96, "width": 16, "depth": 1, "heads": 2, "mlp": 32, "positions": 16}
        arch = c.ClipText(**sizes, pad_id=0, eos_id=3, activation="gelu")
        towers["text"] = dataclasses.replace(towers["text"], arch=arch, pooling="lasttoken")
    model = dataclasses.replace(config.model, towers=towers)
    short = dataclasses.replace(config, model=model, steps=2, evaluate=c.Evaluate(), export=c.Export(format))
    result = train(short, tmp_path / "run")
    run, read = load(tmp_path / "run"), load(result.exported)
    file = str(tmp_path / "5.png")
    for one, column in ((file, "document"), ("red bar", "query")):
        np.testing.assert_allclose(encode(read, [one], column=column), encode(run, [one], column=column), atol=1e-5)
    if format != "sentence-transformers":
        assert float(read.details["loss"]["scale"]) == pytest.approx(run.details["loss"]["scale"], abs=1e-6)
        assert run.details["loss"]["scale"] != pytest.approx(np.log(1 / 0.07), abs=1e-6)
    kept = [Image.open(path).size for path in sorted((result.exported / "parity").glob("*.png"))]
    assert len(kept) == 64 and kept[:16] == [(30, 24)] * 16
    with pytest.raises(ConfigError, match="a Bert pooled by 'mean'"):
        build.resolve(dataclasses.replace(config, export=c.Export("hf")))
