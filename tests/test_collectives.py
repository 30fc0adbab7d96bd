"""The training step on every mesh: the same numbers as on one device, and only the communication that the mesh is for."""

import functools

import hlo
import jax
import numpy as np
import pytest

from embedjax import build, config, sharding, step

B, L, D, F, V = 16, 6, 24, 40, 36
ARCH = config.Bert(
    vocab_size=V, width=D, depth=2, heads=8, mlp=F, positions=8, dropout=0.2, attention_dropout=0.2, init_std=0.2
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
USUAL = [(8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2)]
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


@functools.cache
def stepped(shape):
    """(mesh, compiled step, loss, gradient) on a mesh of this shape. Adam's first moment is a tenth of the gradient."""
    mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices()[: np.prod(shape)])
    parts = build.parts(CONFIG, mesh)
    places = jax.tree.map(lambda x: x.sharding, parts.abstract)
    state = jax.device_put(step.init_state(params(), parts.tx), places)
    columns = sharding.place(batch(), mesh)
    compiled = parts.steps["pairs"].lower(state, {}, columns).compile()
    state, metrics = compiled(state, {}, columns)
    return mesh, compiled, float(metrics["loss"]), jax.tree.map(np.asarray, state.opt_state["adam"].mu)


def check_mesh(shape):
    (_, _, wanted, gradient), (_, _, loss, found) = stepped((1, 1, 1)), stepped(shape)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(found), strict=True):
        # The gradient of a key's bias is zero but for rounding: softmax does not see it.
        scale = max(np.abs(a).max(), 1e-2 * largest)
        assert np.abs(a - b).max() <= 1e-5 * scale, sharding.path_of(path)


@pytest.mark.parametrize("shape", USUAL, ids=ids)
def test_meshes_give_the_same_loss_and_gradients(shape):
    check_mesh(shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape in MESHES if shape not in USUAL], ids=ids)
def test_every_other_mesh_gives_the_same_loss_and_gradients(shape):
    assert len(MESHES) == 20
    check_mesh(shape)


def moved(shape):
    """[(collective, the axes it moves data along)] of the step on a mesh."""
    mesh, compiled, _, _ = stepped(shape)
    return [(each, each.axes(mesh)) for each in hlo.collectives(compiled.as_text())]


# One layer of each stacked matrix, and the tables: what may be gathered of the parameters.
MATRICES = {(D, D), (D, F), (F, D), (V, D), (8, D), (2, D)}


def sizes(shapes):
    return {int(np.prod(shape)) for shape in shapes}


@pytest.mark.parametrize("shape", USUAL, ids=ids)
def test_no_gradient_is_summed_over_data_in_a_loop(shape):
    looped = [(each, axes) for each, axes in moved(shape) if each.in_loop]
    assert bool(looped) == (shape != (8, 1, 1))  # the loop over layers is seen: fsdp and tensor communicate in it
    assert not [each for each, axes in looped if "data" in axes]
    if shape[0] > 1:
        summed = sum(each.bytes for each, axes in moved(shape) if each.kind == "all-reduce" and "data" in axes)
        parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params()))
        assert summed >= parameters / (shape[1] * shape[2])


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
