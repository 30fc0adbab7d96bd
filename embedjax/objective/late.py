"""Losses of late interaction: texts are compared over the vectors of their tokens, by MaxSim or as XTR does."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from embedjax.config import InBatch, KlDistillation, MarginMse, Model, MultipleNegatives, Set, Taught
from embedjax.config.errors import ConfigError
from embedjax.losses import late
from embedjax.losses.late import Tokens
from embedjax.models.embedder import Embedder
from embedjax.objective.distill import judged, stored_scores
from embedjax.objective.encoding import candidates, frozen_towers, texts
from embedjax.objective.inbatch import hashes_of, learned, rule_of
from embedjax.objective.kinds import Objective
from embedjax.sharding import BATCH_AXES

Scores = Callable[[Tokens, Tokens], Float[Array, "B N"]]


def in_batch(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Each query against the documents of the global batch. Raises ConfigError for a guide, and for directions that would
    compare two queries, or two documents."""
    loss = task.loss
    assert isinstance(loss, InBatch)
    if loss.guide:
        raise ConfigError(f"set {task.name!r}: late interaction has no guide; leave {type(loss).__name__}.guide empty")
    if isinstance(loss, MultipleNegatives) and (odd := set(loss.directions) - {"q2d", "d2q"}):
        raise ConfigError(f"set {task.name!r}: late interaction compares queries with documents, not {sorted(odd)}")
    rule, score = rule_of(loss, model.similarity), _scores(loss, mesh)

    def targets(constants, columns):
        return compared(columns), hashes_of(columns) if loss.mask_duplicates else None

    def value(params, outputs, targets, key):
        masks, hashes = targets
        query, documents = tokens(outputs, masks)
        b, c = documents.score.shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(b * c, *x.shape[2:]), documents)
        scale, bias, told = learned(params, loss, model)
        found, metrics = late.loss(score(query, flat).reshape(b, b, c), rule, scale, bias, hashes)
        return found, metrics | told

    return Objective(texts(task, model, embedders), targets, value)


def scores(task: Set, model: Model, embedders: Mapping[str, Embedder], mesh: Mesh) -> Objective:
    """Distillation of a teacher's scores of a row's own documents. Raises ConfigError for a number of score columns that does
    not fit that of the texts, and for a similarity: it is MaxSim."""
    loss = task.loss
    assert isinstance(loss, MarginMse | KlDistillation)
    if loss.similarity:
        raise ConfigError(
            f"set {task.name!r}: late interaction compares by MaxSim; leave {type(loss).__name__}.similarity None"
        )
    teach = _taught(loss, task, model, embedders) if loss.teacher else stored_scores(task)

    def targets(constants, columns):
        return compared(columns), teach(constants, columns)

    def value(params, outputs, targets, key):
        masks, wanted = targets
        return judged(loss, late.maxsim_own(*tokens(outputs, masks)), wanted), {}

    return Objective(texts(task, model, embedders), targets, value)


def compared(columns: dict) -> dict[str, Array]:
    """Which tokens count: {"anchor": [B L], "positive": [B C L]}."""
    return {name: column["score"] for name, column in candidates(columns).items()}


def tokens(outputs: Mapping[str, Array], masks: Mapping[str, Array]) -> tuple[Tokens, Tokens]:
    """The queries and each one's documents."""
    return Tokens(outputs["anchor"], masks["anchor"]), Tokens(outputs["positive"], masks["positive"])


def _taught(loss: Taught, task: Set, model: Model, embedders: Mapping[str, Embedder]) -> Callable:
    towers = {"anchor": loss.teacher, "positive": loss.document_teacher or loss.teacher}
    encode = frozen_towers("teacher", towers, task, model, embedders)
    for name in towers.values():
        if not model.is_late(name):
            raise ConfigError(
                f"set {task.name!r}: the teacher {name!r} reads the student's tokens, so it must be late as it is"
            )
    widths = {name: embedders[name].width for name in towers.values()}
    if len(set(widths.values())) > 1:
        raise ConfigError(f"set {task.name!r}: the teacher's towers are compared token by token, but have widths {widths}")
    return lambda constants, columns: late.maxsim_own(*tokens(encode(constants, columns), compared(columns)))


def _scores(loss: InBatch, mesh: Mesh) -> Scores:
    """`(queries, documents) -> scores` of the global batch, MaxSim or XTR's, in the form that is asked for. The tiled form is
    faster than the dense one at any size."""
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    form = loss.form if loss.form != "auto" else ("ring" if devices > 1 else "tiled")
    dense: Scores = functools.partial(late.xtr, k=loss.xtr) if loss.xtr else late.maxsim
    tiled = functools.partial(late.xtr_tiled, k=loss.xtr) if loss.xtr else late.maxsim_tiled
    local = functools.partial(tiled, axis=BATCH_AXES, tile=loss.tile)

    def ring(query: Tokens, documents: Tokens) -> Float[Array, "B N"]:
        # As in the ring of vectors, the loops begin with plain zeros, which the check of varying axes refuses.
        rows = P(BATCH_AXES)
        return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False)(query, documents)

    return {"dense": dense, "tiled": functools.partial(tiled, tile=loss.tile), "ring": ring}[form]
