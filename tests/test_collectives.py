"""The training step on every mesh: the same numbers as on one device, and only the communication that the mesh is for."""

import dataclasses
import functools
import math

import hlo
import jax
import numpy as np
import pytest

from embedjax import build, config, objective, sharding, step
from embedjax.models.embedder import Embedder

# All but the batch have a factor 3 or 5: what has not is of hashes, row numbers and scores.
B, L, D, F, V = 64, 6, 24, 40, 36
ARCH = config.Bert(
    vocab_size=V, width=D, depth=2, heads=8, mlp=F, positions=10, dropout=0.2, attention_dropout=0.2, init_std=0.2
)
TOWER = config.Tower(arch=ARCH, pooling="mean", max_length=L, layers="scan")
CONFIG = build.resolve(
    config.Config(
        steps=100,
        model=config.Model({"text": TOWER}),
        data=config.Data(
            batch_size=B,
            sets=(config.Set(config.File("none"), {"anchor": "a", "positive": "b", "negative": "c"}, name="pairs"),),
        ),
        optim=config.Optim(warmup=0, clip_norm=0.0),
        export=config.Export("none"),
    )
)
MESHES = [(n // f // t, f, t) for n in (1, 2, 4, 8) for f in (1, 2, 4, 8) for t in (1, 2, 4, 8) if n % (f * t) == 0]
USUAL = [(8, 1, 1), (1, 8, 1), (2, 1, 4)]  # `CACHED` below is on a mesh of all three axes
ids = lambda mesh: "x".join(map(str, mesh))


def batch():
    rng = np.random.default_rng(0)

    def text(*shape):
        mask = np.arange(L) < rng.integers(2, L + 1, (*shape, 1))
        return {"ids": np.where(mask, rng.integers(1, V, (*shape, L)), 0).astype(np.int32), "mask": mask}

    word = lambda *shape: rng.integers(0, 2**32, (*shape, 2), dtype=np.uint32)
    columns = {"anchor": text(B), "positive": text(B), "negative": text(B, 1), "row": np.arange(B, dtype=np.int32)}
    return columns | {"hash": {"anchor": word(B), "positive": word(B), "negative": word(B, 1)}}


@functools.cache
def params():
    embedder = build.build_embedder(CONFIG.model.towers["text"])
    return {"towers": {"text": jax.tree.map(np.asarray, jax.jit(embedder.init)(jax.random.key(0)))}}


WAYS = {"plain": {}, "cached": {"cached": 2}, "accumulated": {"accumulate": 2}}


@functools.cache
def compiled(shape, way="plain", form="dense"):
    """(mesh, parts of the run, compiled step) on a mesh of this shape."""
    mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices()[: np.prod(shape)])
    optim = dataclasses.replace(CONFIG.optim, **WAYS[way])
    task = dataclasses.replace(CONFIG.data.sets[0], loss=config.MultipleNegatives(form=form))
    data = dataclasses.replace(CONFIG.data, sets=(task,))
    parts = build.parts(dataclasses.replace(CONFIG, optim=optim, data=data), mesh)
    return mesh, parts, parts.steps["pairs"].lower(parts.abstract, {}, build.placed(batch(), mesh)).compile()


@functools.cache
def stepped(shape, way="plain", form="dense"):
    """(loss, gradient) of the step. Adam's first moment is a tenth of the gradient."""
    mesh, parts, step_of = compiled(shape, way, form)
    state = jax.device_put(step.init_state(params(), parts.tx), jax.tree.map(lambda x: x.sharding, parts.abstract))
    state, metrics = step_of(state, {}, sharding.place(batch(), mesh))
    return float(metrics["loss"]), jax.tree.map(np.asarray, state.opt_state["adam"].mu)


def assert_same(found, known):
    np.testing.assert_allclose(found[0], known[0], rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(known[1]))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(known[1]), jax.tree.leaves(found[1]), strict=True):
        # The gradient of a key's bias is zero but for rounding: softmax does not see it.
        scale = max(np.abs(a).max(), 1e-2 * largest)
        assert np.abs(a - b).max() <= 1e-5 * scale, sharding.path_of(path)


def check_mesh(shape, way="plain", form="dense"):
    assert_same(stepped(shape, way, form), stepped((1, 1, 1), "accumulated" if way == "accumulated" else "plain"))


@pytest.mark.parametrize("shape", USUAL, ids=ids)
def test_meshes_give_the_same_loss_and_gradients(shape):
    check_mesh(shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape in MESHES if shape not in USUAL], ids=ids)
def test_every_other_mesh_gives_the_same_loss_and_gradients(shape):
    assert len(MESHES) == 20
    check_mesh(shape)


# What else the step may be: in chunks or in parts, with the ring.
OTHERS = [
    (shape, way, form)
    for shape in ((4, 2, 1), (2, 2, 2))
    for way in WAYS
    for form in ("dense", "ring")
    if shape not in USUAL or (way, form) != ("plain", "dense")
]


def others(*chosen):
    """All of them, the chosen ones by default and the rest in `slow`."""
    marks = lambda case: [] if case in chosen else [pytest.mark.slow]
    cases = [pytest.param(*case, marks=marks(case), id="-".join((ids(case[0]), *case[1:]))) for case in OTHERS]
    return pytest.mark.parametrize(("shape", "way", "form"), cases)


CACHED, ACCUMULATED = ((2, 2, 2), "cached", "ring"), ((4, 2, 1), "accumulated", "dense")


@others(CACHED)
def test_ways_and_forms_give_the_same_loss_and_gradients(shape, way, form):
    check_mesh(shape, way, form)


FAMILIES = [
    arch(vocab_size=V, width=D, depth=2, heads=2, mlp=F, positions=10, pad_id=0, dropout=0.2, init_std=0.2)
    for arch in (
        config.Roberta,
        config.DistilBert,
        config.Mpnet,
        functools.partial(config.ModernBert, global_every=2, local_window=2),
    )
]


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[] if isinstance(arch, config.ModernBert) else [pytest.mark.slow], id=type(arch).__name__)
        for arch in FAMILIES
    ],
)
def test_every_family_gives_the_same_on_a_mesh(arch):
    embedder = Embedder(arch, layers="scan")
    model, task = config.Model({"text": config.Tower(arch=arch)}), CONFIG.data.sets[0]
    start = {"towers": {"text": jax.tree.map(np.asarray, jax.jit(embedder.init)(jax.random.key(0)))}}

    def found(shape):
        mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices()[: np.prod(shape)])
        places = sharding.shardings(start, mesh)
        gradient = step.plain(objective.make(task, model, {"text": embedder}, mesh))
        gradient = jax.jit(sharding.in_sight(mesh, gradient), out_shardings=(None, places))
        (value, _), grads = gradient(jax.device_put(start, places), {}, sharding.place(batch(), mesh), np.uint32(7))
        return value, jax.tree.map(np.asarray, grads)

    assert_same(found((2, 2, 2)), found((1, 1, 1)))


@functools.cache
def moved(*case):
    """[(collective, the axes it moves data along)] of the step on a mesh."""
    mesh, _, step_of = compiled(*case)
    return [(each, each.axes(mesh)) for each in hlo.collectives(step_of.as_text())]


# One layer of each stacked matrix, and the tables: what may be gathered of the parameters.
MATRICES = {(D, D), (D, F), (F, D), (V, D), (10, D), (2, D)}


def sizes(shapes):
    return {int(np.prod(shape)) for shape in shapes}


def of_parameters(fsdp, tensor):
    """The sizes of parameters and their gradients, and of one layer's, on a device and gathered."""
    whole = {leaf.size // layers for leaf in jax.tree.leaves(params()) for layers in (1, ARCH.depth)}
    return {size // part for size in whole for part in (1, fsdp, tensor, fsdp * tensor) if size % part == 0}


def assert_summed_once(shape, *case):
    """The gradients are summed over `data`, outside of all loops."""
    sums = [each for each, axes in moved(shape, *case) if each.kind == "all-reduce" and "data" in axes]
    summed = sum(each.bytes for each in sums if not each.in_loop)
    if shape[0] > 1:
        assert summed >= sum(leaf.nbytes for leaf in jax.tree.leaves(params())) / (shape[1] * shape[2])


@pytest.mark.parametrize("shape", USUAL, ids=ids)
def test_no_gradient_is_summed_over_data_in_a_loop(shape):
    looped = [(each, axes) for each, axes in moved(shape) if each.in_loop]
    assert bool(looped) == (shape != (8, 1, 1))  # the loop over layers is seen: fsdp and tensor communicate in it
    assert not [each for each, axes in looped if "data" in axes]
    assert_summed_once(shape)


@others(CACHED, ACCUMULATED)
def test_no_gradient_is_summed_and_no_parameter_gathered_over_data_in_a_loop(shape, way, form):
    looped = [each for each, axes in moved(shape, way, form) if each.in_loop and "data" in axes]
    assert not sizes(found for each in looped for found in each.shapes) & of_parameters(*shape[1:])
    if way == "accumulated":  # each part has a loss, of embeddings, hashes and single numbers
        assert max(sizes(found for each in looped for found in each.shapes)) <= B * D
    else:  # documents go round
        assert {each.kind for each in looped} == ({"collective-permute"} if form == "ring" else set())
    assert_summed_once(shape, way, form)


@others(CACHED, ACCUMULATED)
def test_the_ring_holds_no_score_of_every_pair(shape, way, form):
    """Not even a device's share of the scores of all rows with all positives."""
    held = hlo.shapes(compiled(shape, way, form)[2].as_text())
    largest = max(math.prod(found) for found in held if math.prod(found) & (math.prod(found) - 1) == 0)
    rows, devices = B // (2 if way == "accumulated" else 1), shape[0] * shape[1]
    share = rows * rows // devices
    assert largest < share if form == "ring" else largest >= share


def test_data_parallelism_gathers_no_parameters():
    gathered = [each for each, _ in moved((8, 1, 1)) if each.kind != "all-reduce"]
    assert not sizes(shape for each in gathered for shape in each.shapes) & sizes(MATRICES)
    assert max(each.bytes for each in gathered) <= 2 * B * D * 4  # embeddings, for the loss


def test_fsdp_gathers_parameters_and_no_activations():
    gathered = [each for each, _ in moved((1, 8, 1)) if each.kind != "all-reduce"]
    assert "all-to-all" not in {each.kind for each in gathered}
    assert {(D, D), (D, F), (F, D)} <= {shape for each in gathered if each.in_loop for shape in each.shapes}
    found = sizes(shape for each in gathered for shape in each.shapes) - sizes(MATRICES)
    assert max(found) <= 2 * B * D < B * L * D // 2, found  # embeddings, for the loss


def test_tensor_parallelism_sums_twice_a_layer_each_way_and_gathers_no_matrix():
    tokens = 3 * B * L // 2  # of a device: 3 texts a row, data 2
    sums = [(each, axes) for each, axes in moved((2, 1, 4)) if each.in_loop]
    assert all(each.kind == "all-reduce" and axes == {"tensor"} for each, axes in sums)
    activations = [shape for each, _ in sums for shape in each.shapes if np.prod(shape) == tokens * D]
    # Forward: after attention and after the mlp; backward: for what queries, keys and values came from, and for the mlp.
    assert len(activations) in (4, 6)
    gathered = [each for each, _ in moved((2, 1, 4)) if each.kind != "all-reduce"]
    assert not {(D, D), (D, F), (F, D)} & {shape for each in gathered for shape in each.shapes}


def test_the_reader_sees_groups_loops_and_combined_results():
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (f32[2,4]{1,0}, /*index=1*/bf16[8]{0}) all-reduce(%x, %y), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %b = f32[16]{0} all-gather(%z), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %c = f32[16]{0} all-gather(%z), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={0}
  %d = f32[4]{0} collective-permute(%z), channel_id=3, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
}
"""
    first, second, third, fourth = hlo.collectives(text)
    assert first.in_loop and first.bytes == 48 and first.shapes == ((2, 4), (8,)) and first.groups == ((0, 1), (2, 3))
    assert not second.in_loop and second.groups == ((0, 2), (1, 3)) and third.groups == ((0, 1), (2, 3))
    mesh = sharding.make_mesh(config.Mesh(2, 2), jax.devices()[:4])
    assert [each.axes(mesh) for each in (first, second, third, fourth)] == [{"fsdp"}, {"data"}, {"fsdp"}, {"fsdp"}]
    assert (16,) in hlo.shapes(text)
