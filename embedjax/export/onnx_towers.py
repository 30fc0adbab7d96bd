"""Token ids -> token vectors as ONNX graphs, a function a family; the same arithmetic as the towers of `models/families`.

CLIP's and SigLIP's towers have none: their texts are served beside pictures, which other formats hold.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from embedjax.config import Bert, DistilBert, ModernBert, Mpnet, Roberta, Static
from embedjax.export.onnx_graph import Graph
from embedjax.models.attention import rope_table
from embedjax.models.families import mpnet
from embedjax.models.layers import MASKED


def _length(g: Graph) -> str:
    """The length of the texts, int64 [1]."""
    return g.op("Slice", g.op("Shape", "input_ids"), g.integers(1), g.integers(2))


def _first_rows(g: Graph, name: str, length: str) -> str:
    """The first rows of a constant. By Slice: of Gather by Range onnxruntime makes another graph, which it then cannot run."""
    return g.op("Slice", name, g.integers(0), length, g.integers(0))


def _padding(g: Graph) -> str:
    """What hides padding, [B 1 1 L]."""
    mask = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=g.onnx.TensorProto.FLOAT), g.integers(1, 2))
    return g.op("Mul", g.op("Sub", g.number(1.0), mask), g.number(MASKED))


def _counted(g: Graph, pad_id: int) -> str:
    """`layers.counted_positions`."""
    here = g.op("Cast", g.op("Not", g.op("Equal", "input_ids", g.integers(pad_id))), to=g.onnx.TensorProto.INT64)
    counted = g.op("CumSum", here, g.constant("axis", 1, np.int64))
    return g.op("Add", g.op("Mul", counted, here), g.integers(pad_id))


def _offsets(g: Graph) -> str:
    """Key place less query place, int64 [L L]."""
    ends = g.constant("zero place", 0, np.int64), g.op("Squeeze", _length(g)), g.constant("one place", 1, np.int64)
    places = g.op("Range", *ends)
    return g.op("Sub", g.op("Unsqueeze", places, g.integers(0)), g.op("Unsqueeze", places, g.integers(1)))


def _post_norm(g: Graph, arch: Any, x: str, bias: str) -> str:
    """`layers.PostNormBlock`, all of them."""
    for n in range(arch.depth):
        part = lambda name, n=n: f"blocks/{n}/{name}"
        q = g.heads(g.linear(x, part("attn/query")), arch.heads, arch.width)
        k = g.heads(g.linear(x, part("attn/key")), arch.heads, arch.width, transpose=True)
        v = g.heads(g.linear(x, part("attn/value")), arch.heads, arch.width)
        mixed = g.linear(g.attend(q, k, v, bias, width=arch.width, heads=arch.heads), part("attn/out"))
        x = g.norm(g.op("Add", mixed, x), part("attn_norm"), arch.norm_eps)
        inner = g.activation(g.linear(x, part("up")), arch.activation)
        x = g.norm(g.op("Add", g.linear(inner, part("down")), x), part("mlp_norm"), arch.norm_eps)
    return x


def _bert(g: Graph, arch: Bert | Roberta | DistilBert) -> str:
    x = g.rows("tokens", "input_ids")
    if isinstance(arch, Roberta):
        x = g.op("Add", x, g.rows("positions", _counted(g, arch.pad_id)))
    else:
        x = g.op("Add", x, _first_rows(g, g.param("positions/embedding"), _length(g)))
    if "types/embedding" in g.params:
        x = g.op("Add", x, g.constant("type", g.params["types/embedding"][0]))
    return _post_norm(g, arch, g.norm(x, "norm", arch.norm_eps), _padding(g))


def _mpnet(g: Graph, arch: Mpnet) -> str:
    x = g.op("Add", g.rows("tokens", "input_ids"), g.rows("positions", _counted(g, arch.pad_id)))
    farthest = mpnet.FARTHEST
    table = g.params["relative/embedding"][np.asarray(mpnet.buckets(farthest + 1, arch.relative_buckets))]  # [L L H]
    by_offset = g.constant("relative", np.concatenate([table[farthest, :farthest], table[0]]))  # from -farthest to farthest
    far, near = (g.constant(f"offset {end}", end, np.int64) for end in (farthest, -farthest))
    offset = g.op("Add", g.op("Max", g.op("Min", _offsets(g), far), near), far)
    relative = g.op("Transpose", g.op("Gather", by_offset, offset), perm=[2, 0, 1])
    bias = g.op("Add", _padding(g), g.op("Unsqueeze", relative, g.integers(0)))
    return _post_norm(g, arch, g.norm(x, "norm", arch.norm_eps), bias)


def _modernbert(g: Graph, arch: ModernBert) -> str:
    """`layers.PreNormGatedBlock` and what differs between layers."""
    length, padding = _length(g), _padding(g)
    tables = {"global": arch.global_theta, "local": arch.local_theta}
    ropes = {}
    for kind, theta in tables.items():
        pair = zip(("cos", "sin"), rope_table(arch.positions, arch.width // arch.heads, theta), strict=True)
        ropes[kind] = [_first_rows(g, g.constant(f"{name} {kind}", np.asarray(table)), length) for name, table in pair]
    outside = g.op("Greater", g.op("Abs", _offsets(g)), g.constant("half window", arch.local_window // 2, np.int64))
    window = g.op("Mul", g.op("Cast", outside, to=g.onnx.TensorProto.FLOAT), g.number(MASKED))
    biases = {"global": padding, "local": g.op("Add", padding, window)}
    x = g.norm(g.rows("tokens", "input_ids"), "norm", arch.norm_eps)
    for n in range(arch.depth):
        part = lambda name, n=n: f"blocks/{n}/{name}"
        kind = "local" if n % arch.global_every else "global"
        y = g.norm(x, part("attn_norm"), arch.norm_eps) if n else x
        q, k, v = (g.heads(g.linear(y, part(f"attn/{name}")), arch.heads, arch.width) for name in ("query", "key", "value"))
        q, k = _rotate(g, q, ropes[kind]), g.op("Transpose", _rotate(g, k, ropes[kind]), perm=[0, 1, 3, 2])
        mixed = g.attend(q, k, v, biases[kind], width=arch.width, heads=arch.heads)
        x = g.op("Add", g.linear(mixed, part("attn/out")), x)
        up = g.linear(g.norm(x, part("mlp_norm"), arch.norm_eps), part("up"))
        half = lambda start, up=up: g.op("Slice", up, g.integers(start), g.integers(start + arch.mlp), g.integers(-1))
        inner = g.op("Mul", g.activation(half(0), arch.activation), half(arch.mlp))
        x = g.op("Add", g.linear(inner, part("down")), x)
    return g.norm(x, "final_norm", arch.norm_eps)


def _rotate(g: Graph, x: str, rope: list[str]) -> str:
    """`attention.rotate`."""
    cos, sin = rope
    low, high = g.op("Split", x, axis=-1), f"Split_{len(g.nodes) - 1} high"
    g.nodes[-1].output.append(high)
    turned = g.op("Concat", g.op("Neg", high), low, axis=-1)
    return g.op("Add", g.op("Mul", x, cos), g.op("Mul", turned, sin))


def _static(g: Graph, arch: Static) -> str:
    return g.rows("tokens", "input_ids")


TOWERS: dict[type, Callable[[Graph, Any], str]] = {
    Bert: _bert,
    Roberta: _bert,
    DistilBert: _bert,
    Mpnet: _mpnet,
    ModernBert: _modernbert,
    Static: _static,
}
