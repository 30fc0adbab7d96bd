"""The training step: state, gradient (plain, accumulated or cached), update. The only jitted entry of training."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from embedjax import sharding
from embedjax.objective import Objective, bound, combine

Gradient = Callable[..., tuple[tuple[jax.Array, dict], Any]]
"""`(params, constants, columns, key) -> ((loss, metrics), gradient)`; among the metrics "stats", where towers have taken those
of the batch."""

MOMENTUM = 0.1
"""How far the running statistics of batch normalisation go to those of each batch; torch's default, and so that of every
published ResNet."""


class TrainState(NamedTuple):
    """What a checkpoint holds. `step` counts batches, skipped ones included; the schedule counts applied updates.

    `extra`: `skipped`, steps whose loss or gradient was not finite, and `in_a_row`, how many of them were the latest; `ema`,
    where one is kept, the moving average of `weights`; `stats`, where towers have such, the running statistics.
    """

    step: jax.Array
    params: dict
    opt_state: Any
    extra: dict


def init_state(params: dict, tx: optax.GradientTransformation, ema: float = 0.0, stats: dict | None = None) -> TrainState:
    zero = lambda: jnp.zeros((), jnp.int32)
    # Copies: a step donates the state, and no array can be given away twice.
    average = {"ema": jax.tree.map(jnp.copy, combine(params, stats or {}))} if ema else {}
    counts = {"skipped": zero(), "in_a_row": zero()}
    return TrainState(zero(), params, tx.init(params), counts | average | ({"stats": stats} if stats else {}))


def weights(state: TrainState) -> dict:
    """What is evaluated, exported and loaded, with running statistics: the average where one is kept, else as trained."""
    return state.extra["ema"] if "ema" in state.extra else combine(state.params, state.extra.get("stats", {}))


def plain(objective: Objective) -> Gradient:
    """Value and gradient of the loss of the whole batch."""

    def gradient(params, constants, columns, key):
        def value(params):
            outputs, stats = _apart(objective.encode)(_copies(params), constants, columns, key)
            value, metrics = objective.loss(params, outputs, objective.targets(constants, columns), key)
            return value, metrics | stats

        return jax.value_and_grad(value, has_aux=True)(params)

    return gradient


def _copies(params: Any) -> Any:
    """A copy [data ...] of each parameter for each part of `data`, on the devices of that part alone. No memory: there it is
    the parameter itself."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (_parts_of_data(), *x.shape)), params)


def _apart(encode: Callable) -> Callable:
    """`encode` with `_copies` of the parameters under `shard_map` over `data`: a copy has the gradient of the rows of its
    part, and no loop inside sums over `data`. XLA would leave that sum in the loop over layers. What it returns comes as
    (outputs, {"stats": ...} or {}): rows, and statistics of the whole batch, which `encode` itself took over `data`."""

    def told(params, constants, columns, key):
        outputs = dict(encode(params, constants, columns, key))
        stats = outputs.pop("stats", None)
        return outputs, {"stats": stats} if stats else {}

    def local(copies, constants, columns, key):
        return told(jax.tree.map(lambda x: x[0], copies), _varying(constants), columns, _varying(key))

    def apart(copies, constants, columns, key):
        if _parts_of_data() == 1:
            return told(jax.tree.map(lambda x: x[0], copies), constants, columns, key)
        rows = P("data")
        made = jax.shard_map(local, in_specs=(rows, P(), rows, P()), out_specs=(rows, P()), axis_names={"data"})
        return made(copies, constants, columns, key)

    return apart


def _parts_of_data() -> int:
    return jax.sharding.get_abstract_mesh().shape.get("data", 1)


def accumulated(objective: Objective, parts: int) -> Gradient:
    """The mean over `parts` of the batch of each part's loss and gradient: a batch `parts` times smaller as far as in-batch
    negatives go, in the memory of one part. It equals `plain` only for losses that are a mean over rows; or over what a row has
    several of, such as tokens, if the metric `weight` is how many a part has. Where a tower normalises by statistics of the
    batch each part does by its own, and the running ones follow their mean."""

    def gradient(params, constants, columns, key):
        def weighed(params, copies, part):
            outputs, stats = _apart(objective.encode)(copies, constants, part, key)
            value, metrics = objective.loss(params, outputs, objective.targets(constants, part), key)
            metrics = metrics | stats
            weight = jax.lax.stop_gradient(metrics.get("weight", jnp.ones_like(value)))
            return weight * value, (weight, jax.tree.map(lambda x: weight * x, metrics))

        pulled, copies = jax.value_and_grad(weighed, (0, 1), has_aux=True), _copies(params)
        add = lambda total, part: (jax.tree.map(jnp.add, total, pulled(params, copies, part)), None)
        pieces = split(columns, parts)
        shapes = jax.eval_shape(pulled, params, copies, jax.tree.map(lambda x: x[0], pieces))
        total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), pieces)
        (value, (weight, metrics)), (of_loss, of_copies) = total
        # The towers' gradients are summed over `data` here, once, and not in every part.
        grads = jax.tree.map(lambda x, each: x + each.sum(0), of_loss, of_copies)
        value, metrics, grads = jax.tree.map(lambda x: jnp.where(weight > 0, x / weight, x), (value, metrics, grads))
        return (value, metrics | ({"weight": weight} if "weight" in metrics else {})), grads

    return gradient


def cached(objective: Objective, chunks: int, mesh: Mesh) -> Gradient:
    """What `plain` gives, in the memory of one of `chunks` of the batch: GradCache (Gao et al. 2021, section 3).

    Every chunk is embedded without keeping activations; the loss sees all embeddings; then each chunk is embedded again, with
    the same dropout, and takes its share of the loss's gradient back to the parameters. Costs one forward pass more. No tower
    may normalise by statistics of the batch: a chunk has others.
    """

    def gradient(params, constants, columns, key):
        look = lambda part: (objective.encode(params, constants, part, key), objective.targets(constants, part))
        # By rows, as the batch is: left to itself XLA splits small embeddings over the width and moves them for the loss.
        by_rows = lambda tree: jax.lax.with_sharding_constraint(tree, sharding.rows(mesh))
        outputs, targets = by_rows(join(jax.lax.map(look, split(columns, chunks))))
        pulled = jax.value_and_grad(objective.loss, (0, 1), has_aux=True)
        found, (of_loss, cotangents) = pulled(params, outputs, targets, key)
        of_towers = _replayed(objective, chunks, mesh)(params, constants, columns, key, cotangents)
        return found, jax.tree.map(jnp.add, of_loss, of_towers)

    return gradient


def _replayed(objective: Objective, chunks: int, mesh: Mesh) -> Callable:
    """The gradient of `encode` against the cotangents of its outputs, chunk by chunk, summed over `data` once, at the end."""

    def total(params, constants, columns, key, cotangents):
        def replay(total, part_and_cotangent):
            part, cotangent = part_and_cotangent
            _, vjp = jax.vjp(lambda p: objective.encode(p, constants, part, key), params)
            return jax.tree.map(jnp.add, total, vjp(cotangent)[0]), None

        zero = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(replay, zero, split((columns, cotangents), chunks))[0]

    def local(params, constants, columns, key, cotangents):
        params, constants, key = _varying((params, constants, key))
        return jax.lax.psum(total(params, constants, columns, key, cotangents), "data")

    if mesh.shape["data"] == 1:
        return total
    rows = P("data")
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), rows, P(), rows), out_specs=P(), axis_names={"data"})


def _varying(tree: Any) -> Any:
    """What is the same on every part of `data` as what may differ: under `shard_map`, its gradient is then not yet summed."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), tree)


def split(tree: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B/parts, ...], interleaved, so that a batch split over devices stays so within every part."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join(tree: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def make(gradient: Gradient, tx: optax.GradientTransformation, schedule: Callable, seed: int, ema: float = 0.0) -> Callable:
    """`step(state, constants, columns) -> (state, metrics)`, not yet jitted.

    An update whose loss or gradient norm is not finite is skipped, on all devices alike: parameters and optimiser state stay
    as they were. Dropout is keyed by (seed, step) alone, so nothing random is stored. With `ema` each applied update moves the
    average, which began as the first parameters (so it needs no correction), by 1 - ema of the way to the new ones. Running
    statistics go MOMENTUM of the way to those of the batch.
    """

    def step(state: TrainState, constants: dict, columns: dict) -> tuple[TrainState, dict]:
        key = jax.random.bits(jax.random.fold_in(jax.random.key(seed), state.step), (), jnp.uint32)
        (loss, metrics), grads = gradient(state.params, constants, columns, key)
        seen = metrics.get("stats", {})
        metrics = {name: x for name, x in metrics.items() if name != "stats"}
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = bound(jax.tree.map(jnp.add, state.params, updates))
        keep = lambda new, old: jnp.where(finite, new, old)
        old = state.extra.get("stats", {})
        made, before = (params, opt_state, followed(old, seen)), (state.params, state.opt_state, old)
        params, opt_state, stats = jax.tree.map(keep, made, before)
        skipped = (~finite).astype(jnp.int32)
        counts = {"skipped": state.extra["skipped"] + skipped, "in_a_row": (state.extra["in_a_row"] + 1) * skipped}
        rate = schedule(state.step - state.extra["skipped"])
        metrics = {**metrics, "loss": loss, "grad_norm": norm, "learning_rate": rate, **counts}
        # In this form a parameter that never changes is its own average, to the bit.
        toward = lambda mean, new: mean + (1 - ema) * (new - mean)
        moved = lambda a, p: keep(toward(a, p), a)
        average = {"ema": jax.tree.map(moved, state.extra["ema"], combine(params, stats))} if ema else {}
        extra = counts | average | ({"stats": stats} if stats else {})
        return TrainState(state.step + 1, params, opt_state, extra), metrics

    return step


def followed(old: Mapping, seen: Mapping) -> dict:
    """Running statistics after a batch, of which `seen` holds those of the towers that it went through: torch's formula."""
    known = {name: x for name, x in old.items() if name in seen}
    move = lambda x, batch: followed(x, batch) if isinstance(x, Mapping) else (1 - MOMENTUM) * x + MOMENTUM * batch
    return {**old, **{name: move(x, seen[name]) for name, x in known.items()}}


def jitted(step: Callable, shardings: TrainState) -> Callable:
    """The step compiled for the mesh of `shardings`. The state is donated: its memory becomes the new state's."""
    # Without out_shardings XLA is free to gather the new state, and does.
    seen = sharding.in_sight(jax.tree.leaves(shardings)[0].mesh, step)
    return jax.jit(seen, donate_argnums=0, out_shardings=(shardings, None))
