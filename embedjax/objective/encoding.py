"""The texts of a batch through their towers: the columns a loss sees, each as vectors, and what is drawn from a step's key."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from embedjax.config import Layers, Model, Pooled, Set
from embedjax.config.errors import ConfigError, nearest
from embedjax.models.embedder import Embedder
from embedjax.objective.kinds import combine

# What is drawn from the key that also draws dropout has a number of its own.
LAYERS, PREFIXES = 1, 2


def texts(task: Set, model: Model, embedders: Mapping[str, Embedder]) -> Callable:
    """The `encode` of a loss of vectors: outputs {"anchor": [B E], "positive": [B 1+K E]}, as far as the set has these columns;
    with `layers` in the loss also "layers", the same at n earlier layers: {"anchor": [B n E], ...}."""
    loss = task.loss
    embed = encoder(model, embedders, loss.layers if isinstance(loss, Pooled) else None)

    def encode(params, constants, columns, key):
        towers = combine(params.get("towers", {}), constants.get("towers", {}))
        return embed(towers, candidates(columns), columns["row"], key)

    return encode


def candidates(columns: dict) -> dict[str, dict]:
    """The text columns with positives and hard negatives as one: {"anchor": [B L], "positive": [B 1+K L]}."""
    documents = [{name: x[:, None] for name, x in columns["positive"].items()}] if "positive" in columns else []
    documents += [columns["negative"]] if "negative" in columns else []
    join = lambda *parts: jnp.concatenate(parts, 1)
    return {"anchor": columns["anchor"], **({"positive": jax.tree.map(join, *documents)} if documents else {})}


def drawn(key: UInt32[Array, ""] | None, what: int, count: int, wanted: int) -> Int[Array, "n"]:
    """`wanted` of the numbers below `count`, ascending, any set of them equally likely; 0 stands for all. No key is key 0."""
    if not 0 < wanted < count:
        return jnp.arange(count)
    made = jax.random.fold_in(jax.random.key(jnp.uint32(0) if key is None else key), what)
    return jnp.sort(jnp.argsort(jax.random.bits(made, (count,)))[:wanted])


def encoder(model: Model, embedders: Mapping[str, Embedder], layers: Layers | None = None) -> Callable:
    """Encodes columns `{name: {"ids": [B L] | [B C L], ...}}`; those of one tower and length go through it in one call."""

    def encode(towers, columns, row, key):
        groups: dict[tuple, list[str]] = {}
        for name, column in columns.items():
            groups.setdefault((model.tower_of(name), column["ids"].shape[-1], frozenset(column)), []).append(name)
        outputs: dict[str, Any] = {}
        for place, ((tower, length, _), names) in enumerate(groups.items()):
            stacked = [{k: x.reshape(x.shape[0], -1, length) for k, x in columns[name].items()} for name in names]
            widths = [part["ids"].shape[1] for part in stacked]
            whole = {k: jnp.concatenate([part[k] for part in stacked], 1) for k in stacked[0]}
            # Groups share row numbers, so each has its own key: equal masks for a row's texts would correlate them.
            salted = None if key is None else key + jnp.uint32((place * 0x9E3779B9) & 0xFFFFFFFF)
            found = _embed(embedders[tower], towers[tower], whole, row, salted, key, layers)
            start = 0
            for name, width in zip(names, widths, strict=True):
                shape = columns[name]["ids"].shape[:-1]
                outputs[name] = found[0][:, start : start + width].reshape(*shape, -1)
                if layers:
                    each = found[1][:, start : start + width]
                    outputs.setdefault("layers", {})[name] = each.reshape(*shape, *each.shape[2:])
                start += width
        return outputs

    return encode


def _embed(embedder: Embedder, params, column, row, key, step_key, layers: Layers | None) -> tuple[Array, ...]:
    """The vectors [B C E] of a column [B C L], and if asked for those of the layers that the step draws [B C n E]."""
    out = embedder.apply(params, column, row=row, key=key, want=("pooled", *(("layers",) if layers else ())))
    assert out.pooled is not None
    if not layers:
        return (out.pooled,)
    assert out.layers is not None
    chosen = drawn(step_key, LAYERS, embedder.arch.depth, layers.per_step)
    earlier = [embedder.pool(params, tokens, column) for tokens in out.layers[chosen]]
    return out.pooled, jnp.stack(earlier, -2)


def frozen_tower(what: str, name: str, texts: tuple[str, ...], model: Model, embedders: Mapping[str, Embedder]) -> Callable:
    """`(constants, columns) -> outputs`: the vectors of these columns by a frozen tower, which must tokenize as theirs do.

    `what` calls it in errors. Raises ConfigError for a tower that is not there or reads other tokens.
    """
    if name not in model.towers:
        raise ConfigError(f"the loss's {what} {name!r} is no tower; {nearest(name, model.towers)}")
    tower = model.towers[name]
    pieces = lambda t: (t.tokenizer or t.init, t.arch and t.arch.vocab_size, t.lowercase)
    for column in texts:
        other = model.towers[model.tower_of(column)]
        if pieces(other) != pieces(tower):
            raise ConfigError(
                f"{what} {name!r} must share the tokenizer of tower {model.tower_of(column)!r}, whose columns it reads: "
                f"they have {tower.tokenizer or tower.init!r} and {other.tokenizer or other.init!r}"
            )
    embed = encoder(Model(model.towers, dict.fromkeys(("anchor", "positive"), name)), embedders)

    def encode(constants, columns):
        if name not in constants.get("towers", {}):
            raise ConfigError(f'{what} {name!r} is trained; add "^towers/{name}/" to optim.freeze')
        found = candidates(columns)
        outputs = embed(constants["towers"], {column: found[column] for column in texts}, columns["row"], None)
        return jax.lax.stop_gradient(outputs)

    return encode


def require(task: Set, needed: Iterable[str], optional: Iterable[str]) -> None:
    """Raises ConfigError for a column that the loss of a set needs and has not, or does not know."""
    needed, optional = set(needed), set(optional)
    kinds = {name.rstrip("0123456789").rstrip("_") for name in task.names}
    loss = type(task.loss).__name__
    for name in sorted(needed - kinds):
        raise ConfigError(f"set {task.name!r}: {loss} needs column {name!r}; columns are {sorted(task.names)}")
    for name in sorted(kinds - needed - optional):
        raise ConfigError(f"set {task.name!r}: {loss} knows no column {name!r}; {nearest(name, needed | optional)}")
