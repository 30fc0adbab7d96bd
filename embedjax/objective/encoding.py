"""The texts of a batch through their towers: the columns a loss sees, each as vectors, and what is drawn from a step's key."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from embedjax.config import ImageTower, Layers, Model, Pixels, Pooled, Set, Static, Tower
from embedjax.config.errors import ConfigError, nearest
from embedjax.models.embedder import Embedder
from embedjax.objective.kinds import combine
from embedjax.sharding import path_of

# What is drawn from the key that also draws dropout has a number of its own.
LAYERS, PREFIXES = 1, 2


def texts(task: Set, model: Model, embedders: Mapping[str, Embedder]) -> Callable:
    """The `encode` of a loss of vectors: outputs {"anchor": [B E], "positive": [B 1+K E]}, as far as the set has these columns;
    with `layers` in the loss also "layers", the same at n earlier layers: {"anchor": [B n E], ...}; and where a tower has
    normalised by statistics of the batch "stats", by the paths of the running ones: {"towers": {tower: {"encoder": ...}}}.
    Late interaction has the vectors of tokens: {"anchor": [B L E], "positive": [B 1+K L E]}."""
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
    """Encodes columns of texts `{name: {"ids": [B L] | [B C L], ...}}` and pictures `{name: {"pixels": [B (C) H W 3]}}`; those
    of one tower and size go through it in one call."""

    def encode(towers, columns, row, key):
        groups: dict[tuple, list[str]] = {}
        for name, column in columns.items():
            groups.setdefault((model.tower_of(name), item_shape(column), frozenset(column)), []).append(name)
        outputs: dict[str, Any] = {}
        for place, ((tower, item, _), names) in enumerate(groups.items()):
            stacked = [{k: x.reshape(x.shape[0], -1, *item) for k, x in columns[name].items()} for name in names]
            widths = [next(iter(part.values())).shape[1] for part in stacked]
            whole = {k: jnp.concatenate([part[k] for part in stacked], 1) for k in stacked[0]}
            # Groups share row numbers, so each has its own key: equal masks for a row's texts would correlate them.
            salted = None if key is None else key + jnp.uint32((place * 0x9E3779B9) & 0xFFFFFFFF)
            embed = _embed_tokens if model.is_late(tower) else functools.partial(_embed, layers=layers, step_key=key)
            found, seen = embed(embedders[tower], towers[tower], whole, row, salted)
            if seen:  # pictures have one size, so no tower is called twice
                outputs.setdefault("stats", {"towers": {}})["towers"][tower] = seen
            start = 0
            for name, width in zip(names, widths, strict=True):
                leaf = next(iter(columns[name].values()))
                shape = leaf.shape[: leaf.ndim - len(item)]
                outputs[name] = found[0][:, start : start + width].reshape(*shape, *found[0].shape[2:])
                if layers:
                    each = found[1][:, start : start + width]
                    outputs.setdefault("layers", {})[name] = each.reshape(*shape, *each.shape[2:])
                start += width
        return outputs

    return encode


def item_shape(column: Mapping[str, Array]) -> tuple[int, ...]:
    """The shape of one text, (L,), or one picture, (H, W, 3), of a column."""
    return column["pixels"].shape[-3:] if "pixels" in column else column["ids"].shape[-1:]


def _embed_tokens(embedder: Embedder, params, column, row, key) -> tuple[tuple[Array, ...], Any]:
    """The vectors [B C L E] of the tokens of a column [B C L]; there are no statistics."""
    out = embedder.apply(params, column, row=row, key=key, want=("vectors",))
    assert out.vectors is not None
    return (out.vectors,), None


def _embed(embedder: Embedder, params, column, row, key, step_key, layers: Layers | None) -> tuple[tuple[Array, ...], Any]:
    """The vectors [B C E] of a column [B C L], and if asked for those of the layers that the step draws [B C n E]; and the
    statistics of the batch, if the tower took them."""
    out = embedder.apply(params, column, row=row, key=key, want=("pooled", *(("layers",) if layers else ())))
    assert out.pooled is not None
    if not layers:
        return (out.pooled,), out.stats
    assert out.layers is not None
    chosen = drawn(step_key, LAYERS, embedder.arch.depth, layers.per_step)
    earlier = [embedder.pool(params, tokens, column) for tokens in out.layers[chosen]]
    return (out.pooled, jnp.stack(earlier, -2)), out.stats


def frozen_towers(what: str, towers: Mapping[str, str], task: Set, model: Model, embedders: Mapping[str, Embedder]) -> Callable:
    """`(constants, columns) -> outputs`: the vectors of a set's columns by frozen towers, {column: tower}. They read the tokens
    and pictures that were made for the columns' own towers, as far as these read, so they must tokenize, prompt and cut as
    those do.

    `what` calls them in errors. Raises ConfigError for a tower that is not there or would read other tokens or pictures; when
    it is called, for one of which a part is trained.
    """
    for column, name in towers.items():
        if name not in model.towers:
            raise ConfigError(f"the loss's {what} {name!r} is no tower; {nearest(name, model.towers)}")
        _require_equal_inputs(what, name, column, task, model)
    embed = encoder(Model(model.towers, dict(towers)), embedders)

    def encode(constants, columns):
        for name in dict.fromkeys(towers.values()):
            _require_whole(what, name, constants.get("towers", {}).get(name, {}), embedders[name])
        found = candidates(columns)
        outputs = embed(constants["towers"], {column: found[column] for column in towers}, columns["row"], None)
        return jax.lax.stop_gradient(outputs)

    return encode


def _require_equal_inputs(what: str, name: str, column: str, task: Set, model: Model) -> None:
    theirs, ours = model.towers[name], model.towers[model.tower_of(column)]
    if isinstance(theirs, ImageTower) != isinstance(ours, ImageTower):
        kind = lambda tower: "pictures" if isinstance(tower, ImageTower) else "texts"
        raise ConfigError(f"{what} {name!r} is a tower of {kind(theirs)}, but column {column!r} holds {kind(ours)}")
    if isinstance(theirs, ImageTower):
        _require_equal_pictures(what, name, theirs, model.tower_of(column), ours)
    else:
        _require_equal_tokens(what, name, column, task, model)


def _require_equal_pictures(what: str, name: str, theirs: ImageTower, own: str, ours: Tower | ImageTower) -> None:
    """Mean and deviation may differ: they are taken of the bytes by each tower."""
    assert isinstance(ours, ImageTower)
    fields = ("fit", "shorter", "interpolation")
    parts = lambda tower: (tower.arch and tower.arch.image, *(getattr(tower.pixels or Pixels(), field) for field in fields))
    if parts(theirs) != parts(ours):
        raise ConfigError(
            f"{what} {name!r} reads the pictures of tower {own!r}, so they must share their size and what of `pixels` cuts and "
            f"scales; they have {parts(theirs)} and {parts(ours)}"
        )


def _require_equal_tokens(what: str, name: str, column: str, task: Set, model: Model) -> None:
    own = model.tower_of(column)
    parts = {
        "the tokenizer": lambda tower: (tower.tokenizer or tower.init, tower.arch and tower.arch.vocab_size, tower.lowercase),
        "special tokens, which static tables do without": lambda tower: type(tower.arch) is Static,
        "what late interaction adds to texts": lambda tower: tower.late,
        "padding that counts as any token": lambda tower: bool(tower.arch and tower.arch.fills),
        f"the prompt of column {column!r}": lambda tower: _prompt(tower, tower.prompt_for(column, task.prompt)),
    }
    for part, of in parts.items():
        theirs, ours = of(model.towers[name]), of(model.towers[own])
        if theirs != ours:
            shown = "" if isinstance(ours, bool) else f"; they have {theirs!r} and {ours!r}"
            raise ConfigError(f"{what} {name!r} reads the tokens of tower {own!r}, so they must share {part}{shown}")


def _prompt(tower: Tower, name: str | None) -> tuple[str, bool]:
    """The text of a prompt, and whether it is pooled."""
    text = (tower.prompts or {}).get(name or "", "")
    return text, not text or tower.include_prompt is not False


def _require_whole(what: str, name: str, params: Mapping, embedder: Embedder) -> None:
    """Raises ConfigError unless the constants hold all that the tower needs."""
    paths = lambda tree: {path_of(key) for key, _ in jax.tree_util.tree_leaves_with_path(tree)}
    if paths(jax.eval_shape(embedder.init, jax.random.key(0))) - paths(params):
        raise ConfigError(f'{what} {name!r} is trained; add "^towers/{name}/" to optim.freeze')


def require(task: Set, needed: Iterable[str], optional: Iterable[str]) -> None:
    """Raises ConfigError for a column that the loss of a set needs and has not, or does not know."""
    needed, optional = set(needed), set(optional)
    kinds = {name.rstrip("0123456789").rstrip("_") for name in task.names}
    loss = type(task.loss).__name__
    for name in sorted(needed - kinds):
        raise ConfigError(f"set {task.name!r}: {loss} needs column {name!r}; columns are {sorted(task.names)}")
    for name in sorted(kinds - needed - optional):
        raise ConfigError(f"set {task.name!r}: {loss} knows no column {name!r}; {nearest(name, needed | optional)}")
