"""A tower of texts as an ONNX program: encoder, pooling, projections and length 1, where ONNX readers look for it.

FOLDER/onnx/model.onnx lies in a sentence-transformers folder, whose tokenizer and settings it shares: `sentence_embedding` is
what text-embeddings-inference answers with, `last_hidden_state` what sentence-transformers (backend="onnx") pools by itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embedjax.config import Tower
from embedjax.config.errors import ConfigError
from embedjax.export import onnx_graph
from embedjax.export.onnx_graph import Graph, library
from embedjax.export.onnx_towers import TOWERS

PLACE = "onnx/model.onnx"


def check(tower: Tower) -> None:
    """Raises ConfigError for a tower that has no ONNX form here, or without the package onnx."""
    if type(tower.arch) not in TOWERS:
        known = ", ".join(kind.__name__ for kind in TOWERS)
        raise ConfigError(f"{type(tower.arch).__name__} has no ONNX program here; those of {known} have, others stablehlo")
    library()


def write(folder: Path, tower: Tower, params: Mapping[str, np.ndarray], weights: str) -> None:
    """Writes FOLDER/onnx/model.onnx of a resolved tower, its parameters given by path and layer ("encoder/blocks/0/...",
    "dense/0/..."); above 2 GiB the weights lie in model.onnx_data beside it. `weights` is what is said of them."""
    encoder = {path.removeprefix("encoder/"): value for path, value in params.items() if path.startswith("encoder/")}
    graph = Graph(encoder | {path: value for path, value in params.items() if path.startswith("dense/")})
    assert tower.arch is not None
    tokens = TOWERS[type(tower.arch)](graph, tower.arch)
    outputs = {
        "last_hidden_state": (tokens, ["batch", "sequence", tower.arch.width]),
        "sentence_embedding": (_head(graph, tower, tokens), ["batch", tower.width]),
    }
    model, path = graph.model(outputs, {"weights": weights, "max_length": str(tower.max_length)}), folder / PLACE
    path.parent.mkdir(parents=True)
    apart = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": f"{path.name}_data"}
    graph.onnx.save(model, str(path), **(apart if graph.size > onnx_graph.LARGEST else {}))
    graph.onnx.checker.check_model(str(path))


NODES = {"tanh": "Tanh", "relu": "Relu"}
"""The operators of a projection's activation."""


def _head(g: Graph, tower: Tower, tokens: str) -> str:
    """`heads.pool`, `heads.project` and `heads.normalize`."""
    x = _pool(g, tokens, str(tower.pooling))
    for n, spec in enumerate(tower.dense or ()):
        before, x = x, g.linear(x, f"dense/{n}")
        x = g.op(NODES[spec.activation], x) if spec.activation in NODES else x
        if spec.residual:
            own = f"dense/{n}/residual"
            x = g.op("Add", x, g.linear(before, own) if f"{own}/kernel" in g.params else before)
    return g.op("LpNormalization", x, axis=-1, p=2) if tower.normalize else x


def _pool(g: Graph, tokens: str, pooling: str) -> str:
    mask = g.op("Cast", "attention_mask", to=g.onnx.TensorProto.FLOAT)
    counted = g.op("CumSum", mask, g.constant("axis", 1, np.int64))
    column = lambda x: g.op("Unsqueeze", x, g.integers(2))
    total = lambda x, **keep: g.op("ReduceSum", x, g.integers(1), keepdims=0, **keep)
    if pooling == "max":
        hidden = g.op("Mul", g.op("Sub", g.number(1.0), mask), g.number(float(np.finfo(np.float32).min)))
        return g.op("ReduceMax", g.op("Add", tokens, column(hidden)), axes=[1], keepdims=0)
    first = lambda x: g.op("Equal", counted, x)
    weights: dict[str, Any] = {
        "mean": lambda: mask,
        "weightedmean": lambda: g.op("Mul", mask, counted),
        "cls": lambda: _here(g, mask, first(g.number(1.0))),
        "lasttoken": lambda: _here(g, mask, first(g.op("ReduceMax", counted, axes=[1], keepdims=1))),
    }
    weight = weights[pooling]()
    summed = total(g.op("Mul", tokens, column(weight)))
    length = g.op("Max", g.op("ReduceSum", weight, g.integers(1), keepdims=1), g.number(1e-9))
    return g.op("Div", summed, length)


def _here(g: Graph, mask: str, where: str) -> str:
    """1 at the one token that is pooled: it is counted so and is no padding."""
    return g.op("Mul", mask, g.op("Cast", where, to=g.onnx.TensorProto.FLOAT))


def read(folder: Path) -> Any:
    """The onnxruntime session of a folder's program, on the CPU. Raises ConfigError when it is damaged or there is none."""
    runtime, path = library("onnxruntime"), folder / PLACE
    try:
        options = runtime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")  # x86 without VNNI would let int8 sums overflow
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ConfigError(f"{path} cannot be read by onnxruntime: {' '.join(str(error).split())[:200]}") from error


def run(session: Any, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The vectors of a column of texts, float32 [N E]."""
    inputs = {"input_ids": columns["ids"].astype(np.int64), "attention_mask": columns["mask"].astype(np.int64)}
    return session.run(["sentence_embedding"], inputs)[0]
