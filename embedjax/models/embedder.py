"""A tower and its head: token ids -> embeddings. Pure init and apply over a tree of parameters; holds none itself."""

import dataclasses
import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt32

from embedjax import config
from embedjax.config.errors import ConfigError
from embedjax.config.late import Late
from embedjax.config.model import Architecture, ClipText, Dense, Dtype, PoolingName, SiglipText
from embedjax.models.families import family_of
from embedjax.models.heads import PLACES, init_projections, normalize, pool, project
from embedjax.models.image import ImageEmbedder, build_image_embedder
from embedjax.models.ops import by_rows
from embedjax.models.output import Output, Want, spread

__all__ = ["Embedder", "ImageEmbedder", "Output", "Want", "build_embedder"]


@dataclasses.dataclass(frozen=True)
class Embedder:
    """How one tower turns token ids into embeddings."""

    arch: Architecture
    pooling: PoolingName = "mean"
    include_prompt: bool = True
    dense: tuple[Dense, ...] = ()
    normalize: bool = True
    compute: Dtype = "float32"
    remat: bool = False
    layers: Literal["auto", "scan", "unroll"] = "auto"
    late: Late | None = None
    """How tokens are compared, for a tower of token vectors; None for one vector a text."""
    still: int = dataclasses.field(default=0, repr=False)
    """First layers without gradient; decides no number, and is left out of what tells models apart."""

    @property
    def width(self) -> int:
        """Size of an embedding (E)."""
        return self.dense[-1].features if self.dense else self.arch.width

    @property
    def tower(self) -> nn.Module:
        """The Linen module under `params["encoder"]`."""
        how = {"compute": self.compute, "remat": self.remat, "layers": self.layers, "still": self.still}
        return family_of(self.arch).Tower(self.arch, **how)

    def init(self, key: Array) -> dict[str, Any]:
        """Random float32 parameters {"encoder": ..., "dense": {"0": ...}}, "dense" only if there are projections."""
        encoder_key, dense_key = jax.random.split(key)
        ids_BL = jnp.zeros((1, 1), jnp.int32)
        params = {"encoder": self.tower.init(encoder_key, ids_BL, ids_BL == 0)["params"]}
        return params | ({"dense": init_projections(dense_key, self.arch.width, self.dense)} if self.dense else {})

    def apply(
        self,
        params: dict[str, Any],
        column: dict[str, Array],
        *,
        row: Int[Array, "B"] | None = None,
        key: UInt32[Array, ""] | None = None,
        want: tuple[Want, ...] = ("pooled",),
    ) -> Output:
        """Embed a column {"ids" int32 [B ... L], "mask" bool, optionally "pool" bool: the tokens to pool; for late interaction
        "score" bool: the tokens that are compared}.

        `key` draws dropout, None drops nothing. `row` numbers the texts of the first axis in the global batch, so that a chunk
        of a batch drops as the whole would; default 0, 1, ... Further axes count on: text [b, k] of [B K L] is row b * K + k.
        A text's result depends on that text and its row alone. Raises ConfigError when L exceeds the tower's positions.
        """
        ids = column["ids"]
        lead, texts = ids.shape[:-1], math.prod(ids.shape[:-1])
        flat = {name: column[name].reshape(texts, ids.shape[-1]) for name in ("ids", "mask", "pool", "score") if name in column}
        row_N = jnp.arange(texts) if row is None else spread(row, texts // ids.shape[0])
        tower: Any = self.tower  # Linen's apply is typed for every kind of module at once
        how: dict[str, Any] = {"row_B": row_N, "key": key, "want_layers": "layers" in want}
        seen = flat
        if want == ("pooled",) and self.pooling in PLACES and isinstance(self.arch, ClipText | SiglipText):
            pool_BL = flat.get("pool", flat["mask"])  # the last layer need not make what is not pooled
            how["only_B"] = PLACES[self.pooling](pool_BL)
            seen = {"mask": pool_BL.any(1, keepdims=True)}
        tokens, each = tower.apply({"params": params["encoder"]}, flat["ids"], flat["mask"], **how)
        pooled = self._head(params, tokens, seen).reshape(*lead, self.width) if "pooled" in want else None
        unflatten = lambda x, axes: x.reshape(*axes, *lead, *x.shape[-2:])
        return Output(
            pooled=pooled,
            tokens=unflatten(tokens, ()) if "tokens" in want else None,
            vectors=unflatten(self._vectors(params, tokens, flat), ()) if "vectors" in want else None,
            layers=None if each is None else unflatten(each, each.shape[:1]),
        )

    def pool(self, params: dict[str, Any], tokens: Float[Array, "*B L D"], column: dict[str, Array]) -> Float[Array, "*B E"]:
        """The embeddings of a column from token vectors, such as an earlier layer's."""
        flat = {name: x.reshape(-1, x.shape[-1]) for name, x in column.items()}
        return self._head(params, tokens.reshape(-1, *tokens.shape[-2:]), flat).reshape(*tokens.shape[:-2], self.width)

    def _head(self, params: dict[str, Any], tokens_BLD: Array, flat: dict[str, Array]) -> Array:
        pool_BL = flat.get("pool", flat["mask"])
        pooled_BD = by_rows(pool(tokens_BLD, flat["mask"], pool_BL, self.pooling))
        x_BE = by_rows(project(params.get("dense", {}), pooled_BD, self.dense))
        return normalize(x_BE) if self.normalize else x_BE

    def _vectors(self, params: dict[str, Any], tokens_BLD: Array, flat: dict[str, Array]) -> Array:
        """Khattab & Zaharia 2020, section 3.2: projected, without what is not compared, of length 1."""
        x_BLE = by_rows(project(params.get("dense", {}), tokens_BLD.astype(jnp.float32), self.dense))
        return normalize(jnp.where(flat["score"][..., None], x_BLE, 0))


@overload
def build_embedder(tower: config.Tower) -> Embedder: ...
@overload
def build_embedder(tower: config.ImageTower) -> ImageEmbedder: ...
@overload
def build_embedder(tower: config.Tower | config.ImageTower) -> Embedder | ImageEmbedder: ...
def build_embedder(tower: config.Tower | config.ImageTower) -> Embedder | ImageEmbedder:
    """The embedder of a resolved tower (no field None). Raises ConfigError for one that is not."""
    if isinstance(tower, config.ImageTower):
        return build_image_embedder(tower)
    names = [field.name for field in dataclasses.fields(Embedder) if field.name != "still"]
    if unresolved := [name for name in names if getattr(tower, name) is None and name != "late"]:
        raise ConfigError(f"the tower is not resolved: {', '.join(unresolved)} is None; read it from its `init` folder first")
    return Embedder(**{name: getattr(tower, name) for name in names})
