"""An image tower and its head: pixels -> embeddings. Pure init and apply over a tree of parameters, as `embedder.py` for texts.

Decodes, cuts and scales nothing: pictures come as squares of bytes.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt32

from embedjax.config.errors import ConfigError
from embedjax.config.image import Augment, ImageArchitecture, ImageTower, Pixels, Vit
from embedjax.config.model import Dense, Dtype
from embedjax.models.augment import jitter, jitters
from embedjax.models.families import family_of
from embedjax.models.heads import init_projections, normalize, project
from embedjax.models.ops import by_rows
from embedjax.models.output import Output, Want, spread


@dataclasses.dataclass(frozen=True)
class ImageEmbedder:
    """How one tower turns pictures into embeddings."""

    arch: ImageArchitecture
    pixels: Pixels = Pixels()
    augment: Augment = Augment()
    dense: tuple[Dense, ...] = ()
    normalize: bool = True
    compute: Dtype = "float32"
    remat: bool = False
    layers: Literal["auto", "scan", "unroll"] = "auto"
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
        picture = jnp.zeros((1, self.arch.image, self.arch.image, 3))
        params = {"encoder": self.tower.init(encoder_key, picture)["params"]}
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
        """Embed a column {"pixels": uint8 [B ... H W 3]}.

        `key` draws dropout, the patches that are left out and the colours; None changes nothing. `row` numbers the pictures of
        the first axis in the global batch, as the texts of `Embedder.apply`: a picture's result depends on that picture and
        its row alone, unless the tower normalises by statistics of the batch: it does where `params` holds no running ones.
        Raises ConfigError for pictures of another size than the tower's.
        """
        *lead, H, W, C = column["pixels"].shape
        count = math.prod(lead)
        row_N = jnp.arange(count) if row is None else spread(row, count // lead[0])
        x_NHWC = self.numbers(column["pixels"].reshape(count, H, W, C), row=row_N, key=key)
        tower: Any = self.tower  # Linen's apply is typed for every kind of module at once
        encoder = params["encoder"]
        how = {"row_B": row_N, "key": key, "want_layers": "layers" in want}
        alone = {"pooled_alone": want == ("pooled",)} if isinstance(self.arch, Vit) else {}
        tokens, each, *seen = tower.apply({"params": encoder}, x_NHWC, **how, **alone)
        unflatten = lambda x, axes: x.reshape(*axes, *lead, *x.shape[-2:])
        return Output(
            pooled=self._head(params, tokens).reshape(*lead, self.width) if "pooled" in want else None,
            tokens=unflatten(tokens, ()) if "tokens" in want else None,
            layers=None if each is None else unflatten(each, each.shape[:1]),
            stats={"encoder": seen[0]} if any(seen) else None,
        )

    def numbers(
        self, bytes_NHWC: Array, *, row: Int[Array, "N"], key: UInt32[Array, ""] | None = None
    ) -> Float[Array, "N H W 3"]:
        """Pictures as the tower sees them: of [0, 1], with a key their colours varied, less the mean, by the deviation."""
        x_NHWC = by_rows(bytes_NHWC).astype(jnp.float32) / 255
        if key is not None and jitters(self.augment):
            x_NHWC = jitter(x_NHWC, self.augment, key, row)
        mean, std = (jnp.array(values, jnp.float32).reshape(1, 1, 1, -1) for values in (self.pixels.mean, self.pixels.std))
        return (x_NHWC - mean) / std

    def pool(self, params: dict[str, Any], tokens: Float[Array, "*B L D"], column: dict[str, Array]) -> Float[Array, "*B E"]:
        """The embeddings of pictures from their tokens, such as an earlier layer's."""
        return self._head(params, tokens.reshape(-1, *tokens.shape[-2:])).reshape(*tokens.shape[:-2], self.width)

    def _head(self, params: dict[str, Any], tokens_BLD: Array) -> Array:
        pooled_BD = by_rows(family_of(self.arch).pool(self.arch, params["encoder"], tokens_BLD, compute=self.compute))
        x_BE = by_rows(project(params.get("dense", {}), pooled_BD, self.dense))
        return normalize(x_BE) if self.normalize else x_BE


def build_image_embedder(tower: ImageTower) -> ImageEmbedder:
    """The embedder of a resolved tower (no field None). Raises ConfigError for one that is not."""
    names = [field.name for field in dataclasses.fields(ImageEmbedder) if field.name != "still"]
    if unresolved := [name for name in names if getattr(tower, name) is None]:
        raise ConfigError(f"the tower is not resolved: {', '.join(unresolved)} is None; read it from its `init` folder first")
    return ImageEmbedder(**{name: getattr(tower, name) for name in names})
