"""GradCache gives what the plain step gives: with every criterion and mask, and combined with everything it composes with."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embedjax import config, objective, optim, sharding, step
from embedjax.models.embedder import Embedder, Output

B, L, D = 16, 6, 32
KEY = jnp.uint32(7)
ONE = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
PREFIXES = (32, 24, 16, 8, 4)


def mesh_of(data, fsdp=1, tensor=1):
    return sharding.make_mesh(config.Mesh(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def batch(negatives, *, equal=0):
    """Texts of random tokens; the first `equal` rows have one anchor and every other one positive."""
    rng = np.random.default_rng(negatives)

    def text(*shape):
        mask = np.arange(L) < rng.integers(2, L + 1, (*shape, 1))
        return {"ids": np.where(mask, rng.integers(1, 32, (*shape, L)), 0).astype(np.int32), "mask": mask}

    word = lambda *shape: rng.integers(0, 2**32, (*shape, 2), dtype=np.uint32)
    columns = {"anchor": text(B), "positive": text(B), "row": np.arange(B, dtype=np.int32)}
    columns["hash"] = {"anchor": word(B), "positive": word(B)}
    columns["hash"]["anchor"][:equal] = 1
    columns["hash"]["positive"][:equal:2] = 2
    if negatives:
        columns |= {"negative": text(B, negatives)}
        columns["hash"]["negative"] = word(B, negatives)
    return columns


def assert_same(found, wanted):
    (value, _), grads = found
    (plain_value, _), plain_grads = wanted
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    assert jax.tree.structure(grads) == jax.tree.structure(plain_grads)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(plain_grads))
    for path, (g, p) in zip(
        map(sharding.path_of, (path for path, _ in jax.tree_util.tree_leaves_with_path(grads))),
        zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(g), np.asarray(p), rtol=1e-4, atol=1e-5 * largest, err_msg=path)


# ---- every criterion, mask and number of negatives, on a tower that costs nothing


class Bag:
    """A tower without layers: the mean of a text's token vectors."""

    width = D

    def apply(self, params, column, *, row, key, want=("pooled",)):
        return Output(pooled=params["encoder"]["table"][column["ids"]].mean(-2))


BAG = {"text": Bag()}
BAG_MODEL = config.Model({"text": config.Tower(arch=config.Bert())})
CRITERIA = {
    "softmax": config.MultipleNegatives(learn_scale=True),
    "symmetric": config.MultipleNegatives(directions=("q2d", "d2q"), partition="per_direction", learn_scale=True),
    "joint": config.MultipleNegatives(directions=("q2d", "d2q", "q2q", "d2d"), learn_scale=True),
    "sigmoid": config.Siglip(),
}
NEGATIVES = (0, 1, 7)
KINDS = tuple(itertools.product((False, True), ((), PREFIXES)))  # equal texts masked or not, with prefixes or without
MESHES = {1: (1, 1), 2: (2, 1), 4: (4, 1), 8: (4, 2)}


def relative_error(criterion, negatives, masked, prefixes, devices, dtype):
    """The largest, over value and gradients, of the cached and streamed loss against the plain dense one in float64."""
    loss = dataclasses.replace(CRITERIA[criterion], mask_duplicates=masked, matryoshka=prefixes, tile=8)
    columns = batch(negatives, equal=6)
    names = {"anchor": "a", "positive": "b"} | ({"negative": "c"} if negatives else {})
    make = lambda form, mesh: objective.make(
        config.Set(columns=names, loss=dataclasses.replace(loss, form=form)), BAG_MODEL, BAG, mesh
    )
    params = {
        "towers": {"text": {"encoder": {"table": np.random.default_rng(0).normal(size=(32, D))}}},
        "loss": objective.loss_params(config.Set(loss=loss), BAG_MODEL, BAG, jax.random.key(0)),
    }
    of_type = lambda dtype: jax.tree.map(lambda x: np.asarray(x, dtype), params)
    with jax.enable_x64(True):  # eagerly: cases share the operations, and no two the program
        (value, _), grads = step.plain(make("dense", ONE))(of_type(np.float64), {}, columns, KEY)
    mesh, form = mesh_of(*MESHES[devices]), "ring" if devices > 1 else "tiled"
    with jax.enable_x64(dtype == np.float64):
        cached = jax.jit(step.cached(make(form, mesh), 2, mesh))
        (found, _), found_grads = cached(of_type(dtype), {}, sharding.place(columns, mesh), KEY)
    assert jax.tree.structure(found_grads) == jax.tree.structure(grads)
    pairs = list(zip(jax.tree.leaves((found, found_grads)), jax.tree.leaves((value, grads)), strict=True))
    assert all((x.dtype, y.dtype) == (dtype, np.float64) for x, y in pairs)
    return max(np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y)) / np.linalg.norm(y) for x, y in pairs)


# A Latin square: every kind meets every number of devices, whatever the criterion. The quarter that is usual has one of each
# criterion and number of negatives, and no two of a kind on as many devices; `slow` runs the rest.
GRID = [
    ((criterion, negatives, *KINDS[kind], (1, 2, 4, 8)[(kind - c + k) % 4]), kind == (2 * c + k) % 4)
    for c, criterion in enumerate(CRITERIA)
    for k, negatives in enumerate(NEGATIVES)
    for kind in range(4)
]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if usual else [pytest.mark.slow], id="-".join(map(str, c))) for c, usual in GRID]
)
def test_cached_streamed_loss_is_the_plain_dense_one(case):
    assert relative_error(*case, np.float64) < 1e-10


@pytest.mark.parametrize(
    "criterion", [pytest.param(name, marks=[] if name == "symmetric" else [pytest.mark.slow]) for name in CRITERIA]
)
def test_cached_streamed_loss_in_float32(criterion):
    assert relative_error(criterion, 1, True, PREFIXES, 4, np.float32) < 1e-5


# ---- a real tower with dropout, and what GradCache is combined with

ARCH = config.Bert(
    vocab_size=32, width=16, depth=1, heads=2, mlp=32, positions=8, dropout=0.2, attention_dropout=0.2, init_std=0.2
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination. What changes the numbers: loss, negatives, frozen. What must not: mesh, form, remat, chunks."""

    loss: config.MultipleNegatives | config.Siglip | config.KlDistillation = config.MultipleNegatives()
    negatives: int = 1
    frozen: tuple[str, ...] = ()
    mesh: tuple[int, int, int] = (2, 1, 1)
    form: str = "dense"
    remat: bool = False
    chunks: int = 4

    @property
    def task(self):
        names = {"anchor": "a", "positive": "b"} | ({"negative": "c"} if self.negatives else {})
        return config.Set(columns=names, loss=self.loss)

    @property
    def towers(self):
        """The trained one, and the loss's guide or teacher if it has one."""
        return ["text", *filter(None, (getattr(self.loss, name, "") for name in ("guide", "teacher")))]


MATRYOSHKA = config.MultipleNegatives(matryoshka=(16, 8, 4), learn_scale=True)
GUIDED = config.MultipleNegatives(guide="guide", guide_margin=0.1)
# Sharp: at temperature 1 the loss is 0.02, a difference of much larger logarithms, whose rounding alone is 1e-6 of it.
TAUGHT = config.KlDistillation(teacher="teacher", temperature=0.1, teacher_temperature=0.1)
WHOLE = config.MultipleNegatives(matryoshka=(16, 8, 4), learn_scale=True, guide="guide", guide_margin=0.1)
CELLS = {
    "two chunks": Cell(chunks=2),
    "fsdp": Cell(mesh=(2, 2, 1)),
    "tensor": Cell(mesh=(2, 1, 2)),
    "remat": Cell(remat=True),
    "ring": Cell(form="ring", mesh=(4, 1, 1)),
    "remat, ring, fsdp": Cell(remat=True, form="ring", mesh=(2, 2, 1)),
    "tiled": Cell(form="tiled", mesh=(1, 1, 1)),
    "hard negatives": Cell(negatives=7, form="ring"),
    "no negatives": Cell(negatives=0, loss=config.Siglip(), form="ring"),
    "matryoshka, learned scale, ring": Cell(MATRYOSHKA, form="ring"),
    "matryoshka, learned scale, remat, fsdp": Cell(MATRYOSHKA, remat=True, mesh=(2, 2, 1)),
    "frozen": Cell(frozen=("encoder/tokens", "blocks/attn/"), form="ring"),
    "frozen, remat, fsdp": Cell(frozen=("encoder/tokens", "blocks/attn/"), remat=True, mesh=(2, 2, 1)),
    "guide": Cell(GUIDED, frozen=("^towers/guide/",)),
    "guide, ring": Cell(GUIDED, frozen=("^towers/guide/",), form="ring"),
    "teacher": Cell(TAUGHT, 3, ("^towers/teacher/",)),
    "teacher, remat, fsdp": Cell(TAUGHT, 3, ("^towers/teacher/",), remat=True, mesh=(2, 2, 1)),
    "everything": Cell(WHOLE, 7, ("^towers/guide/", "text/encoder/tokens"), mesh=(2, 2, 2), form="ring", remat=True, chunks=2),
}


def parts(cell, *, form, remat, mesh):
    """(objective, trained, constants)"""
    model = config.Model({name: config.Tower(arch=ARCH) for name in cell.towers}, {"anchor": "text", "positive": "text"})
    embedders = {name: Embedder(ARCH, remat=remat) for name in cell.towers}
    in_form = {"form": form} if isinstance(cell.loss, config.InBatch) else {}
    task = dataclasses.replace(cell.task, loss=dataclasses.replace(cell.loss, **in_form))
    init = jax.jit(embedders["text"].init)
    params = {"towers": {name: init(jax.random.key(i)) for i, name in enumerate(cell.towers)}}
    params |= {"loss": found} if (found := objective.loss_params(task, model, embedders, jax.random.key(0))) else {}
    return objective.make(task, model, embedders, mesh), *optim.partition(params, cell.frozen)


@functools.cache
def plain(cell):
    made, trained, constants = parts(cell, form="dense", remat=False, mesh=ONE)
    return jax.jit(step.plain(made))(trained, constants, batch(cell.negatives), KEY)


# The others hold what `slow` takes apart.
USUAL = ("two chunks", "tensor", "teacher, remat, fsdp", "everything")


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=[] if name in USUAL else [pytest.mark.slow], id=name) for name, cell in CELLS.items()]
)
def test_cached_equals_plain_with_dropout(cell):
    mesh = mesh_of(*cell.mesh)
    made, trained, constants = parts(cell, form=cell.form, remat=cell.remat, mesh=mesh)
    trained, constants = (jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in (trained, constants))
    gradient = jax.jit(step.cached(made, cell.chunks, mesh), out_shardings=(None, sharding.shardings(trained, mesh)))
    found = gradient(trained, constants, sharding.place(batch(cell.negatives), mesh), KEY)
    same_numbers = dataclasses.replace(cell, mesh=(1, 1, 1), form="dense", remat=False, chunks=1)
    assert_same(found, plain(same_numbers))
