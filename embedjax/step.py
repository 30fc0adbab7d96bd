"""The training step: state, gradient (plain or accumulated), update. The only jitted entry of training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from embedjax.objective import Objective, bound

Gradient = Callable[..., tuple[tuple[jax.Array, dict], Any]]


class TrainState(NamedTuple):
    """What a checkpoint holds. `step` counts batches, skipped ones included; the schedule counts applied updates.

    `extra`: `skipped`, steps whose loss or gradient was not finite, and `in_a_row`, how many of them were the latest.
    """

    step: jax.Array
    params: dict
    opt_state: Any
    extra: dict


def init_state(params: dict, tx: optax.GradientTransformation) -> TrainState:
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(zero(), params, tx.init(params), {"skipped": zero(), "in_a_row": zero()})


def plain(objective: Objective) -> Gradient:
    """Value and gradient of the loss of the whole batch."""

    def gradient(params, constants, columns, key):
        def value(params):
            outputs = objective.encode(params, constants, columns, key)
            return objective.loss(params, outputs, objective.targets(constants, columns))

        return jax.value_and_grad(value, has_aux=True)(params)

    return gradient


def accumulated(objective: Objective, parts: int) -> Gradient:
    """The mean over `parts` of the batch of each part's loss and gradient: a batch `parts` times smaller as far as in-batch
    negatives go, in the memory of one part. It equals `plain` only for losses that are a mean over rows."""
    of_part = plain(objective)

    def gradient(params, constants, columns, key):
        def add(total, part):
            return jax.tree.map(jnp.add, total, of_part(params, constants, part, key)), None

        pieces = split(columns, parts)
        shapes = jax.eval_shape(of_part, params, constants, jax.tree.map(lambda x: x[0], pieces), key)
        total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), pieces)
        return jax.tree.map(lambda x: x / parts, total)

    return gradient


def split(tree: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B/parts, ...], interleaved, so that a batch split over devices stays so within every part."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def make(gradient: Gradient, tx: optax.GradientTransformation, schedule: Callable, seed: int) -> Callable:
    """`step(state, constants, columns) -> (state, metrics)`, not yet jitted.

    An update whose loss or gradient norm is not finite is skipped, on all devices alike: parameters and optimiser state stay
    as they were. Dropout is keyed by (seed, step) alone, so nothing random is stored.
    """

    def step(state: TrainState, constants: dict, columns: dict) -> tuple[TrainState, dict]:
        key = jax.random.bits(jax.random.fold_in(jax.random.key(seed), state.step), (), jnp.uint32)
        (loss, metrics), grads = gradient(state.params, constants, columns, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = bound(jax.tree.map(jnp.add, state.params, updates))
        keep = lambda new, old: jnp.where(finite, new, old)
        params, opt_state = jax.tree.map(keep, (params, opt_state), (state.params, state.opt_state))
        skipped = (~finite).astype(jnp.int32)
        extra = {"skipped": state.extra["skipped"] + skipped, "in_a_row": (state.extra["in_a_row"] + 1) * skipped}
        rate = schedule(state.step - state.extra["skipped"])
        metrics = {**metrics, "loss": loss, "grad_norm": norm, "learning_rate": rate, **extra}
        return TrainState(state.step + 1, params, opt_state, extra), metrics

    return step


def jitted(step: Callable, shardings: TrainState) -> Callable:
    """The step compiled for the mesh of `shardings`. The state is donated: its memory becomes the new state's."""
    # Without out_shardings XLA is free to gather the new state, and does.
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
