"""The pieces of ONNX graphs that towers are built of: constants, one node, projections of float32 or int8, norms, activations.

Knows no architecture. Every method adds nodes and gives the name of what the last one makes, to be read by others.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embedjax.config.errors import ConfigError

OPSET = 17
"""The oldest that has LayerNormalization: read by every onnxruntime since 1.12, and so by the servers that carry older ones."""
LARGEST = 2**31 - 2**24
"""Bytes of weights that one file holds: Protocol Buffers end at 2 GiB."""


def library(name: str = "onnx") -> Any:
    """The package of a name, of the extra `onnx`. Raises ConfigError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} is not installed: pip install 'embedjax[onnx]'") from error


class Graph:
    """An ONNX graph that grows, over parameters by their paths: {"blocks/0/attn/query/kernel": float32 [D F], ...}; kernels and
    tables may be of int8 with a scale beside them ("kernel_scale"), as `int8.py` makes them."""

    def __init__(self, params: Mapping[str, np.ndarray]):
        self.onnx, self.params = library(), params
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._rounded: dict[str, tuple[str, str]] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One node; the name of its output."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """An array of the file, written once a name."""
        if name not in self.constants:
            array = np.ascontiguousarray(np.asarray(value, dtype))
            self.constants[name] = self.onnx.numpy_helper.from_array(array.reshape(np.shape(value)), name)
        return name

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(f"number {value!r}", value)

    def integers(self, *values: int) -> str:
        """An int64 vector, such as axes or a shape."""
        return self.constant(f"integers {values}", values, np.int64)

    def param(self, path: str) -> str:
        """A parameter as it is stored."""
        return self.constant(path, self.params[path], self.params[path].dtype)

    def linear(self, x: str, path: str) -> str:
        """x W + b, of a kernel and perhaps a bias at a path."""
        kernel = f"{path}/kernel"
        if self.params[kernel].dtype == np.int8:
            y = self._product_int8(x, kernel)
        else:
            y = self.op("MatMul", x, self.param(kernel))
        return self.op("Add", y, self.param(f"{path}/bias")) if f"{path}/bias" in self.params else y

    def _product_int8(self, x: str, kernel: str) -> str:
        """As `ops.product_int8`: rows rounded by their largest number, so that a text's vector does not depend on those beside
        it, as it would by DynamicQuantizeLinear. Rows are of uint8 around 128: x86 has no product of two signed bytes."""
        if x not in self._rounded:
            largest = self.op("ReduceMax", self.op("Abs", x), axes=[-1], keepdims=1)
            scale = self.op("Div", self.op("Max", largest, self.number(1e-30)), self.number(127.0))
            whole = self.op("Add", self.op("Round", self.op("Div", x, scale)), self.number(128.0))
            self._rounded[x] = self.op("Cast", whole, to=self.onnx.TensorProto.UINT8), scale
        rounded, scale = self._rounded[x]
        zero = self.constant("zero", 128, np.uint8)
        sums = self.op("Cast", self.op("MatMulInteger", rounded, self.param(kernel), zero), to=self.onnx.TensorProto.FLOAT)
        return self.op("Mul", self.op("Mul", sums, scale), self.param(f"{kernel}_scale"))

    def rows(self, path: str, ids: str) -> str:
        """Rows of the table at a path, by id."""
        found = self.op("Gather", self.param(f"{path}/embedding"), ids)
        if self.params[f"{path}/embedding"].dtype != np.int8:
            return found
        scale = self.op("Unsqueeze", self.op("Gather", self.param(f"{path}/embedding_scale"), ids), self.integers(-1))
        return self.op("Mul", self.op("Cast", found, to=self.onnx.TensorProto.FLOAT), scale)

    def norm(self, x: str, path: str, eps: float) -> str:
        """Layer normalisation over the last axis."""
        bias = [self.param(f"{path}/bias")] if f"{path}/bias" in self.params else []
        return self.op("LayerNormalization", x, self.param(f"{path}/scale"), *bias, axis=-1, epsilon=eps)

    def activation(self, x: str, name: str) -> str:
        """One of `ops.ACTIVATIONS`."""
        times = lambda a, b: self.op("Mul", a, b)
        match name:
            case "gelu":  # in the form that onnxruntime knows as one operation
                grown = self.op("Add", self.op("Erf", self.op("Div", x, self.number(math.sqrt(2.0)))), self.number(1.0))
                return times(times(x, grown), self.number(0.5))
            case "gelu_tanh":
                cube = times(self.op("Pow", x, self.number(3.0)), self.number(0.044715))
                inner = times(self.op("Add", x, cube), self.number(math.sqrt(2 / math.pi)))
                return times(times(x, self.number(0.5)), self.op("Add", self.op("Tanh", inner), self.number(1.0)))
            case "quick_gelu":
                return times(x, self.op("Sigmoid", times(x, self.number(1.702))))
            case "silu":
                return times(x, self.op("Sigmoid", x))
            case "relu":
                return self.op("Relu", x)
        raise ConfigError(f"activation {name!r} has no form in ONNX here")

    def heads(self, x: str, count: int, width: int, *, transpose: bool = False) -> str:
        """[B L D] -> [B H L K], or [B H K L] with `transpose`."""
        parted = self.op("Reshape", x, self.integers(0, 0, count, width // count))
        return self.op("Transpose", parted, perm=[0, 2, 3, 1] if transpose else [0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str, bias: str, *, width: int, heads: int) -> str:
        """softmax(q k' / sqrt(K) + bias) v of q and v [B H L K] and k [B H K L], heads joined: [B L D]."""
        scores = self.op("Div", self.op("MatMul", q, k), self.number(math.sqrt(width // heads)))
        mixed = self.op("MatMul", self.op("Softmax", self.op("Add", scores, bias), axis=-1), v)
        return self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.integers(0, 0, width))

    def model(self, outputs: Mapping[str, tuple[str, Sequence[Any]]], metadata: Mapping[str, str]) -> Any:
        """The model of `input_ids` and `attention_mask`, int64 [batch, sequence], and of outputs {name: (what the graph calls
        it, its shape)}, float32."""
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        for name, (inner, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [inner], [name]))
        shape = ["batch", "sequence"]
        graph = helper.make_graph(
            self.nodes,
            "encoder",
            [helper.make_tensor_value_info(name, kinds.INT64, shape) for name in ("input_ids", "attention_mask")],
            [helper.make_tensor_value_info(name, kinds.FLOAT, list(axes)) for name, (_, axes) in outputs.items()],
            list(self.constants.values()),
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="embedjax")
        helper.set_model_props(made, dict(metadata))
        return made

    @property
    def size(self) -> int:
        """Bytes of all constants."""
        return sum(len(constant.raw_data) for constant in self.constants.values())
