"""Plans against what can be counted by hand, or measured by running the step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from embedjax import build, commands, sharding
from embedjax import config as c
from embedjax.__main__ import run as command
from embedjax.config import overrides
from embedjax.config.errors import ConfigError
from embedjax.plan import ahead, chips, measure, table, variants
from embedjax.plan.flops import flops
from embedjax.plan.shapes import shapes
from embedjax.plan.traffic import Collective, sizes, traffic


def changed(config, **fields):
    """The config with towers, sets or parts replaced: tower=, task=, data=, optim= are dicts of fields."""
    replace = dataclasses.replace
    if "tower" in fields:
        towers = {name: replace(tower, **fields.pop("tower")) for name, tower in config.model.towers.items()}
        config = replace(config, model=replace(config.model, towers=towers))
    if "task" in fields:
        task = replace(config.data.sets[0], **fields.pop("task"))
        config = replace(config, data=replace(config.data, sets=(task,)))
    for name, part in fields.items():
        config = replace(config, **{name: replace(getattr(config, name), **part)})
    return config


# ---- shapes


def test_shapes_are_those_of_the_data(tiny_config, tmp_path, pairs_file):
    prompted = {"prompts": {"query": "red ", "document": ""}, "include_prompt": False}
    columns = {"anchor": "question", "positive": "answer", "negative": "answer", "negative_2": "question"}
    config = build.resolve(changed(tiny_config, tower=prompted, task={"columns": columns}, data={"buckets": ((4, 4), (4, 8))}))
    run = build.build(config, tmp_path)
    told = lambda each: [(task, jax.tree.map(lambda x: (x.shape, x.dtype), columns)) for task, columns in each]
    assert told(shapes(config)) == told(run.batches.shapes())
    assert "pool" in shapes(config)[0][1]["anchor"] and "pool" not in shapes(config)[0][1]["positive"]


def test_shapes_without_buckets_are_the_longest(tiny_config):
    (_, columns), *more = shapes(build.resolve(tiny_config))
    assert columns["anchor"]["ids"].shape == (16, 8) and not more


def test_shapes_of_late_interaction_are_those_of_the_data(tiny_config, tmp_path):
    late = {"late": c.Late(query_length=6, document_length=9), "max_length": None}
    config = build.resolve(changed(tiny_config, tower=late, export={"format": "none"}))
    told = lambda each: [(task, jax.tree.map(lambda x: (x.shape, x.dtype), columns)) for task, columns in each]
    assert told(shapes(config)) == told(build.build(config, tmp_path).batches.shapes())
    assert [shapes(config)[0][1][name]["score"].shape for name in ("anchor", "positive")] == [(16, 6), (16, 9)]


# ---- a step that can be run: what was compiled ahead is what it takes


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(config, its measured step on eight devices, the bytes on device 0 before and after a step that ran)."""
    folder = tmp_path_factory.mktemp("ran")
    rows = "".join(f"red {i}\tcat {i}\n" for i in range(64))
    (folder / "pairs.tsv").write_text("question\tanswer\n" + rows)
    arch = c.Bert(vocab_size=512, width=64, depth=1, heads=2, mlp=256, positions=16)
    sets = (c.Set(c.File(str(folder / "pairs.tsv")), {"anchor": "question", "positive": "answer"}, name="pairs"),)
    config = build.resolve(
        c.Config(
            model=c.Model({"text": c.Tower(arch=arch, tokenizer="wordpiece", max_length=16)}),
            data=c.Data(batch_size=16, sets=sets),
        )
    )
    run = build.build(config, folder)
    task, columns = run.batches.batch(0)
    state, constants = run.init()
    placed = sharding.place(columns, run.mesh)
    here = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    before = here((state, constants, placed))
    (planned,) = measure.measure(config, chips.parse("cpu:8"), None)
    outputs = run.steps[task](state, constants, placed)
    after = here(outputs) + 8 * len(jax.tree.leaves(outputs))  # results come with a table of where they are
    return config, planned, before, after


def test_bytes_are_those_that_live_on_a_device(ran):
    _, planned, before, after = ran
    # A scalar has an alignment of its own, and an unused argument is not passed.
    assert planned["argument_bytes"] == pytest.approx(before, abs=256)
    assert planned["output_bytes"] == pytest.approx(after, abs=256)
    held = planned["parameter_bytes"] + planned["optimizer_bytes"] + planned["constant_bytes"] + planned["batch_bytes"]
    assert held == pytest.approx(before, abs=256)
    assert planned["alias_bytes"] > 0.99 * (planned["parameter_bytes"] + planned["optimizer_bytes"])


def test_flops_are_those_of_the_formula(ran):
    """Six FLOPs a weight and token, attention's two products, and the loss's scores: forward once, backward twice."""
    config, planned, _, _ = ran
    width, mlp, depth, length, rows = 64, 256, 1, 16, 16
    tokens = 2 * rows * length
    layers = 6 * tokens * depth * (4 * width**2 + 2 * width * mlp) + 12 * tokens * depth * length * width
    assert planned["flops"] == pytest.approx(layers + 6 * rows * rows * width, rel=0.1)
    assert planned["model_flops"] == pytest.approx(layers, rel=0.1)
    assert planned["unbounded_loops"] == 0


def test_a_data_parallel_step_reduces_its_gradient(ran):
    _, planned, _, _ = ran
    reduced = planned["collectives"]["all-reduce"]["bytes"]
    # Beside the gradient: the loss's, of 16 embeddings a side, and a few scalars.
    assert planned["parameter_bytes"] <= reduced <= planned["parameter_bytes"] + 4 * 2 * 16 * 64 + 1024


# ---- FLOPs of loops and of recomputation


def test_flops_count_loops_and_devices():
    w = jnp.zeros((4, 4))
    once = 2 * 4**3

    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

    assert flops(jax.make_jaxpr(loop)(w)).total == 5 * once
    recomputed = jax.make_jaxpr(jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x).sum()))(w)
    plain = jax.make_jaxpr(jax.grad(lambda x: jnp.sin(jnp.sin(x @ w) @ w).sum()))(w)
    assert flops(plain).total == 4 * once < flops(recomputed).total <= 6 * once
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(lambda x: x @ w, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert flops(jax.make_jaxpr(spread)(jnp.zeros((16, 4)))).total == 4 * once
    choice = jax.make_jaxpr(lambda p, x: jax.lax.cond(p, lambda x: x @ w @ w, lambda x: x, x))(True, w)
    assert flops(choice).total == 2 * once


def test_flops_know_their_units():
    dot = lambda dtype, precision=None: flops(
        jax.make_jaxpr(lambda x: jnp.dot(x, x, precision=precision))(jnp.zeros((2, 2), dtype))
    )
    assert dot(jnp.bfloat16).bfloat16 == dot(jnp.float32).float32 == dot(jnp.float32, "highest").exact == 16


# ---- HLO text

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%layer (param_0.1: f32[12,100], param_1: s32[]) -> f32[100] {
  %param_0.1 = f32[12,100]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %slice = f32[1,100]{1,0:T(1,128)} dynamic-slice(%param_0.1, %param_1), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100]{0:T(128)} bitcast(%slice)
}

%condition (p.1: (s32[], f32[12,100])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[12,100]{1,0:T(8,128)}) parameter(0)
  %twelve = s32[]{:T(128)} constant(12)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %twelve), direction=LT
}

%body (p.2: (s32[], f32[12,100])) -> (s32[], f32[12,100]) {
  %p.2 = (s32[]{:T(128)}, f32[12,100]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %stack = f32[12,100]{1,0:T(8,128)} get-tuple-element(%p.2), index=1
  %one = f32[100]{0:T(128)S(1)} fusion(%stack, %i.2), kind=kLoop, calls=%layer
  %sent = (f32[100]{0}, f32[100]{0}, u32[]{:S(2)}) collective-permute-start(%one), source_target_pairs={{0,1},{1,0}}
  %done = f32[100]{0} collective-permute-done(%sent)
  ROOT %next = (s32[]{:T(128)}, f32[12,100]{1,0:T(8,128)}) tuple(%i.2, %stack)
}

ENTRY %main (x: f32[12,100], g: bf16[50]) -> f32[12,100] {
  %x = f32[12,100]{1,0:T(8,128)} parameter(0)
  %g = bf16[50]{0:T(256)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[12,100]{1,0:T(8,128)}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, /*index=1*/f32[12,100]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %reduced = (bf16[50]{0:T(256)}, f32[12,100]{1,0}) all-reduce(%g, %x), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %out = f32[12,100]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("groups", "size", "outside"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4, False),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, True),
        ("[2,4]<=[8]", 4, False),
        ("[4,2]<=[2,4]T(1,0)", 2, True),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4, False),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", 2, True),
    ],
)
def test_traffic_of_a_text(groups, size, outside):
    found = traffic(HLO.replace("GROUPS", groups), island=4)
    sent, reduced = found.collectives
    assert sent == Collective("collective-permute", 400, 12, 2)
    assert reduced == Collective("all-reduce", 100 + 4800, 1, size, outside)
    assert reduced.wire == pytest.approx(2 * (size - 1) / size * 4900)
    assert found.by_kind() == {"collective-permute": (12, 4800), "all-reduce": (1, 4900)}
    # A turn of the loop reads one of the twelve rows, and keeps it on the chip; the all-reduce reads and writes its arrays.
    assert found.memory == pytest.approx(12 * (400 + 400 + 4) + 2 * 4900, abs=12 * 404) and found.unbounded == 0


def test_loops_of_unknown_length_are_told():
    text = HLO.replace("constant(12)", "parameter(1)").replace("GROUPS", "{{0,1}}")
    assert traffic(text, 4).unbounded == 1
    noted = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert traffic(noted, 4).collectives[0].times == 7


def test_sizes():
    assert sizes("(f32[2,3]{1,0}, pred[8]{0}, bf16[4]{0:T(8)S(1)}, s4[3]{0}, f32[])") == [24, 8, 8, 2, 4]
    assert sizes("bf16[4]{0:T(8)S(1)}", on_chip=False) == [0]


# ---- chips and topologies


@pytest.mark.parametrize(
    ("text", "devices", "island", "platform"),
    [("v5e:16x16", 256, 256, "tpu"), ("v6e:8x8*2", 128, 64, "tpu"), ("h100:64", 64, 8, "gpu"), ("CPU:3", 3, 3, "cpu")],
)
def test_topologies(text, devices, island, platform):
    found = chips.parse(text)
    assert (found.devices, found.island, found.platform) == (devices, island, platform)


@pytest.mark.parametrize("text", ["", "v5e", "v5e:16", "v5p:4x4", "h100:8x8", "h101:8", "cpu:0", "v5e:4x4*0", "cpu:8*2"])
def test_wrong_topologies(text):
    with pytest.raises(ConfigError, match="--topology"):
        chips.parse(text)


def test_memory_of_a_chip(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert chips.parse("h100:8").memory(None) == 60 * chips.GIB
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert chips.parse("h100:8").memory(None) == pytest.approx(72 * chips.GIB)
    assert chips.parse("h100:8").memory(2) == 2 * chips.GIB and chips.parse("cpu:8").memory(None) is None
    assert all(chip.bfloat16 >= chip.float32 > chip.exact for chip in chips.CHIPS.values())


def test_roofline():
    chip, size = chips.CHIPS["v5e"], 10**9
    found = measure.roofline(
        chip,
        4,
        measure.Flops(bfloat16=4 * chip.bfloat16, exact=chip.bfloat16),
        2 * chip.bandwidth,
        (Collective("all-reduce", size, 1, 4), Collective("collective-permute", size, 3, 2)),
    )
    assert found == pytest.approx({"compute": 1 + 6 / 4, "memory": 2, "communication": 1.5 * size / 200e9 + 3 * size / 50e9})


def test_what_a_compiler_out_of_memory_says():
    assert measure.needed("total memory required for HLO temporaries (16.75G) exceeds available HBM (15.75G).") == 16.75 * 2**30
    assert measure.needed("Used 379.65G of 15.75G hbm. Exceeded by 363.90G.") == 379.65 * 2**30
    assert measure.needed("no numbers") is None


# ---- what to change, and how far to go


@pytest.mark.parametrize(
    ("most", "start", "best"), [(1000, 64, 960), (1000, 5000, 944), (7, 64, 0), (8, 8, 8), (10**9, 64, 2**24)]
)
def test_search(most, start, best):
    tried = []

    def fits(rows):
        assert rows % 8 == 0 and rows not in tried
        tried.append(rows)
        return rows <= most

    found = variants.search(fits, start, 8)
    assert found <= most and found >= min(most, variants.MOST_ROWS) * 8 / 9 - 8
    assert found == best or abs(found - best) <= best / 8


def given(config, told):
    """The config with the options that a change tells to give."""
    return overrides.parse(commands.Plan, told.split(), prog="plan", default=commands.Plan(config)).config


def test_changes_are_those_of_the_command_line(tiny_config):
    config = changed(tiny_config, task={"loss": c.MultipleNegatives(form="dense")}, data={"batch_size": 512})
    found = dict(variants.smaller(config, 8))
    assert list(found) == [
        "--model.towers.text.remat",
        "--optim.cached 4",
        "--optim.cached 16",
        "--data.sets.0.loss.form ring",
        "--mesh.fsdp 8",
        "--model.towers.text.remat --optim.cached 16",
        "--model.towers.text.remat --optim.cached 64",
    ]
    assert all(given(config, told) == made for told, made in found.items())


def test_data_stays_a_multiple_of_the_slices(tiny_config):
    config = changed(tiny_config, mesh={"slices": 2})
    wide = {n: [told for told, _ in variants.smaller(config, n) if "fsdp" in told] for n in (2, 4, 8, 32)}
    assert wide == {2: [], 4: ["--mesh.fsdp 2"], 8: ["--mesh.fsdp 4"], 32: ["--mesh.fsdp 16"]}


@pytest.mark.parametrize(
    ("loss", "offered"),
    [
        (c.MultipleNegatives(), ["tile 512"]),
        (c.MultipleNegatives(form="ring"), ["tile 512"]),
        (c.Siglip(form="tiled"), ["form ring", "tile 512"]),
        (c.MultipleNegatives(tile=2048), ["tile 512"]),
        (c.MultipleNegatives(tile=256), []),
        (c.MultipleNegatives(form="dense", tile=2048), ["form ring"]),
        (c.CoSent(), []),
    ],
)
def test_smaller_tiles(loss, offered, tiny_config):
    config = changed(tiny_config, task={"loss": loss}, data={"batch_size": 512})
    found = {told: made for told, made in variants.smaller(config, 8) if ".loss." in told}
    assert list(found) == [f"--data.sets.0.loss.{option}" for option in offered]
    assert all(given(config, told) == made for told, made in found.items())


# ---- the verb, in a process of its own


def test_a_plan_that_does_not_fit(tiny_config, tmp_path, capsys):
    """No data set is there, and none is asked for."""
    path = tmp_path / "my.py"
    path.write_text(
        "from embedjax.config import *\n"
        "def config():\n"
        "    arch = Bert(vocab_size=128, width=16, depth=1, heads=2, mlp=32, positions=16)\n"
        "    tower = Tower(arch=arch, tokenizer='nowhere/at-all', max_length=8)\n"
        "    sets = (Set(File('not-there.tsv'), {'anchor': 'question', 'positive': 'answer'}),)\n"
        "    return Config(model=Model({'text': tower}), data=Data(batch_size=64, sets=sets))\n"
    )
    file = tmp_path / "plan.json"
    arguments = ["plan", str(path), "--topology", "h100:2", "--memory", "0.0003", "--tries", "1", "--json", str(file)]
    assert command(arguments) == 6
    out, err = capsys.readouterr()
    assert "DOES NOT FIT" in out and "simulated" in out and "--model.towers.text.remat" in out
    assert err.splitlines()[-1] == "embedjax: it does not fit on h100:2"
    (step,) = (found := json.loads(file.read_text()))["steps"]
    assert found["devices"] == 2 and step["batch"] == 64 and not step["fits"] and len(found["changes"]) == 1
    assert step["needed_bytes"] > found["limit_bytes"] and step["seconds"]["step"] == max(step["seconds"].values())
    assert "\n".join(table.lines(found)) in out


@pytest.mark.slow
def test_the_largest_batch(tiny_config):
    found = ahead.plan(tiny_config, "cpu:2", search=True, memory=0.002)
    tried = {int(rows): well for rows, well in found["tried_batches"].items()}
    assert ahead.fits(found) and tried[found["largest_batch"]]
    assert not any(well for rows, well in tried.items() if rows > found["largest_batch"])
    assert found["steps"][0]["batch"] == found["largest_batch"] and found["largest_batch"] % 2 == 0


def test_errors_of_the_other_process_are_its_own(tiny_config):
    with pytest.raises(ConfigError, match="not divisible by 3 devices"):
        ahead.plan(tiny_config, "cpu:3")
    with pytest.raises(ConfigError, match="--search on cpu:2 needs --memory"):
        ahead.plan(tiny_config, "cpu:2", search=True)


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_a_plan_for_a_tpu(tiny_config):
    """By the TPU's own compiler: the gradient is summed once, documents travel round the ring, too much is refused."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs embedjax[plan]")
    config = changed(tiny_config, task={"loss": c.MultipleNegatives(form="ring")}, optim={"cached": 2})
    found = ahead.plan(config, "v5e:2x2")
    (step,) = found["steps"]
    assert ahead.fits(found) and step["unbounded_loops"] == 0
    assert step["collectives"]["all-reduce"]["bytes"] == pytest.approx(step["parameter_bytes"], rel=0.2)
    assert step["collectives"]["collective-permute"]["calls"] >= 4
    # Arrays this small are padded to the TPU's tiles.
    assert step["argument_bytes"] >= step["parameter_bytes"] + step["optimizer_bytes"]
    large = changed(config, data={"batch_size": 2**24}, optim={"cached": 1})
    refused = ahead.plan(large, "v5e:2x2", tries=0)
    assert not ahead.fits(refused) and refused["steps"][0]["needed_bytes"] > refused["limit_bytes"]
    with pytest.raises(ConfigError, match="--topology v5e:3x3: the TPU compiler knows no such slice"):
        ahead.plan(config, "v5e:3x3")
