"""Low-rank adapters (Hu et al. 2021): trained pairs A, B that are added to a tower's kernels before it is applied or written.

This is the only place where they meet the kernels: towers, losses and folders see plain kernels, W + alpha / rank * A B.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from embedjax.config import Lora
from embedjax.config.errors import ConfigError, nearest


def init(adapters: Mapping[str, Lora], encoder: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """{adapter: {path: ... {"kernel": {"a": [S D r], "b": [S r F]}}}} for the kernels [S D F] of an encoder that its regular
    expression finds. B is 0, so that it starts as no adapter; A is uniform in +-1/sqrt(D), as peft draws it.

    Raises ConfigError when one finds no kernel.
    """
    kernels = {path: leaf.shape for path, leaf in _leaves(encoder) if path.endswith("/kernel")}
    made = {}
    for i, name in enumerate(sorted(adapters)):
        adapter = adapters[name]
        paths = [path for path in sorted(kernels) if re.search(adapter.paths, path)]
        if not paths:
            known = f"the encoder has {', '.join(kernels) or 'none'}"
            raise ConfigError(f"adapter {name!r}: paths {adapter.paths!r} matches no kernel; {known}")
        keys = jax.random.split(jax.random.fold_in(key, i), len(paths))
        made[name] = {}
        for path, drawn in zip(paths, keys, strict=True):
            *lead, rows, columns = kernels[path]
            bound = 1 / math.sqrt(rows)
            a = jax.random.uniform(drawn, (*lead, rows, adapter.rank), jnp.float32, -bound, bound)
            _put(made[name], path, {"a": a, "b": jnp.zeros((*lead, adapter.rank, columns), jnp.float32)})
    return made


def chosen(adapters: Mapping[str, Lora], name: str = "") -> str | None:
    """The adapter of a name; without one the only one there is, else that called "default"; None for a tower without any.

    Raises ConfigError when the name is not known, or is needed.
    """
    if not adapters:
        return None
    if name and name not in adapters:
        raise ConfigError(f"there is no adapter {name!r}; {nearest(name, adapters)}")
    if not name and len(adapters) > 1 and "default" not in adapters:
        raise ConfigError(f"the tower has the adapters {', '.join(adapters)}; name one of them")
    return name or (next(iter(adapters)) if len(adapters) == 1 else "default")


def merged(params: Mapping[str, Any], adapters: Mapping[str, Lora], name: str | None) -> dict[str, Any]:
    """A tower's parameters with an adapter added to its kernels (Hu et al. 2021, equation 3), or none, and no other left.

    Differentiable in all of them; float32 products, also where float32 is not the default of the device.
    """
    plain = {part: value for part, value in params.items() if part != "lora"}
    if name is None:
        return plain
    scale = adapters[name].alpha / adapters[name].rank
    return {**plain, "encoder": _added(plain["encoder"], params["lora"][name], scale)}


def _added(kernel: Any, pair: Mapping[str, Any], scale: float) -> Any:
    if pair.keys() == {"a", "b"}:
        return kernel + scale * jnp.matmul(pair["a"], pair["b"], precision="highest")
    return {**kernel, **{part: _added(kernel[part], below, scale) for part, below in pair.items()}}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value
