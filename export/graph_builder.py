"""Writes ONNX graphs node by node: weights in their storage precision, the layers that policies are made of.

Weights stored as floats are computed with in float32: each goes through a Cast, which ONNX Runtime folds away when it
loads the file. With int8 storage the products of wide rows are computed in int8 and all else in float32. Two dialects:
`fused` uses ONNX Runtime's own operators (domain com.microsoft), otherwise only operators of opset 17.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from segzero_rt.errors import ExportError
from segzero_rt.graph_spec import GraphSpec, TensorSpec

OPSET = 17
IR_VERSION = 8
MICROSOFT = "com.microsoft"
STORAGES = ("float16", "float32", "int8")
INT8_FROM_WIDTH = 64
"""Narrower rows take as long to be quantised as their product saves: 48 gained nothing, 96 halved it (VNNI, AMX)."""


class GraphBuilder:
    """One graph in the making. Tensors are named by the path of the scopes that they were made in."""

    def __init__(self, spec: GraphSpec, *, storage: str = "float16", fused: bool = True) -> None:
        if storage not in STORAGES:
            raise ExportError(f"expected weights stored as {', '.join(STORAGES)}, got {storage!r}")
        if storage == "int8" and not fused:
            raise ExportError("expected flavour ort for int8 weights, got portable; its operators know floats alone")
        self.spec = spec
        self.storage = storage
        self.fused = fused
        self.lossless = True
        """False once a weight was rounded to be stored."""
        self._path: list[str] = []
        self._used: dict[str, int] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._quantized: dict[str, list[str]] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Everything made inside is named `.../name/...`."""
        self._path.append(name)
        yield
        self._path.pop()

    def node(
        self, op: str, inputs: Sequence[str], *, output: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Adds a node with one output and returns that output's name."""
        return self.nodes(op, inputs, [output or self._fresh(op)], domain=domain, **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Adds a node with the named outputs; an empty name leaves that output out."""
        name = next(output for output in outputs if output) + ":" + op
        self._nodes.append(helper.make_node(op, list(inputs), list(outputs), name=name, domain=domain, **attributes))
        return list(outputs)

    def name(self, hint: str) -> str:
        """A fresh tensor name in the current scope."""
        return self._fresh(hint)

    def constant(self, values: Any, dtype: str = "int64") -> str:
        """A small constant; equal ones are stored once."""
        array = np.asarray(values, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def weight(self, name: str, values: np.ndarray, *, exact: bool = False) -> str:
        """A weight in the storage precision, given back as float32.

        Args:
            exact: store float32 whatever the graph's storage is.

        Raises:
            ExportError: a value is not finite, or does not fit into float16.
        """
        values = np.ascontiguousarray(values, dtype=np.float32)
        largest = float(np.abs(values).max(initial=0.0))
        if not np.isfinite(largest):
            raise ExportError(f"expected finite weights, got {largest} in {name}; the checkpoint is damaged")
        path = "/".join([*self._path, name])
        if exact or self.storage == "float32":
            self._initializers.append(numpy_helper.from_array(values, path))
            return path
        if largest > float(np.finfo(np.float16).max):
            raise ExportError(f"expected weights that fit into float16, got {largest} in {path}; store it as float32")
        stored = values.astype(np.float16)
        self.lossless &= bool(np.array_equal(stored, values))
        self._initializers.append(numpy_helper.from_array(stored, path + ":float16"))
        return self.as_float32(path + ":float16", path)

    def external_weight(self, name: str, shape: tuple[int, int], location: str) -> str:
        """A weight whose bytes are the whole of the file `location` beside the graph, in the storage precision."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(float_storage(self.storage)))
        tensor = TensorProto(name=name, data_type=element, dims=shape, data_location=TensorProto.EXTERNAL)
        length = int(np.prod(shape)) * np.dtype(float_storage(self.storage)).itemsize
        for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        self._initializers.append(tensor)
        return name

    def as_float32(self, x: str, output: str | None = None) -> str:
        """Casts from the storage precision to the one that is computed in."""
        return self.node("Cast", [x], output=output, to=TensorProto.FLOAT)

    def linear(
        self, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None = None, *, flat: bool = False
    ) -> str:
        """`x @ weight.T + bias`, with `weight` as PyTorch keeps it: [out, in].

        Args:
            flat: `x` has two axes, so that one Gemm can do product and bias.
        """
        if self.storage == "int8" and weight.shape[1] >= INT8_FROM_WIDTH:
            return self._quantized_linear(x, name, weight, bias)
        stored = self.weight(f"{name}.weight", weight.T)
        if bias is None:
            return self.node("MatMul", [x, stored])
        if flat:
            return self.node("Gemm", [x, stored, self.weight(f"{name}.bias", bias)])
        return self.node("Add", [self.node("MatMul", [x, stored]), self.weight(f"{name}.bias", bias)])

    def _quantized_linear(self, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        """Weights as int8 with one scale per output; `x` is quantised as it comes, once for all products of it.

        Where `x` has one product alone, ONNX Runtime makes both nodes one, `DynamicQuantizeMatMul`.
        """
        path = "/".join([*self._path, name])
        scale = np.maximum(np.abs(weight).max(axis=1), 1e-12).astype(np.float32) / 127
        rounded = np.round(weight / scale[:, None]).astype(np.int8)
        self.lossless = False
        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(rounded.T), f"{path}.weight:int8"))
        if x not in self._quantized:
            parts = [self._fresh(f"{name}.input:{part}") for part in ("uint8", "scale", "zero")]
            self._quantized[x] = self.nodes("DynamicQuantizeLinear", [x], parts)
        values, step, zero = self._quantized[x]
        inputs = [values, f"{path}.weight:int8", step, self.weight(f"{name}.scale", scale, exact=True), zero]
        if bias is not None:
            inputs += ["", self.weight(f"{name}.bias", bias)]
        return self.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)

    def attention(self, query: str, key: str, value: str, *, num_heads: int, head_dim: int) -> str:
        """Softmax attention of every query with every key, [batch, rows, heads * head_dim] each; no mask."""
        if self.fused:
            return self.node("MultiHeadAttention", [query, key, value], domain=MICROSOFT, num_heads=num_heads)
        perms = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        query, key, value = (
            self.node("Transpose", [self.reshape(part, [0, 0, num_heads, head_dim])], perm=perm)
            for part, perm in zip((query, key, value), perms, strict=True)
        )
        scaled = self.node("Mul", [query, self.constant(head_dim**-0.5, "float32")])
        shares = self.node("Softmax", [self.node("MatMul", [scaled, key])], axis=-1)
        mixed = self.node("Transpose", [self.node("MatMul", [shares, value])], perm=[0, 2, 1, 3])
        return self.reshape(mixed, [0, 0, num_heads * head_dim])

    def rms_norm(self, x: str, name: str, weight: np.ndarray, epsilon: float) -> str:
        """Root-mean-square norm over the last axis."""
        scale = self.weight(name, weight)
        if self.fused:
            return self.node("SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=epsilon, stash_type=1)
        square = self.node("Mul", [x, x])
        mean = self.node("ReduceMean", [square], axes=[-1], keepdims=1)
        root = self.node("Sqrt", [self.node("Add", [mean, self.constant(epsilon, "float32")])])
        return self.node("Mul", [self.node("Div", [x, root]), scale])

    def add_rms_norm(
        self, x: str, residual: str, name: str, weight: np.ndarray, epsilon: float, bias: np.ndarray | None = None
    ) -> tuple[str, str]:
        """Returns (norm of `x + bias + residual`, that sum)."""
        biases = [] if bias is None else [self.weight(f"{name}.added_bias", bias)]
        if not self.fused:
            x = self.node("Add", [x, *biases]) if biases else x
            total = self.node("Add", [x, residual])
            return self.rms_norm(total, name, weight, epsilon), total
        outputs = [self._fresh("normed"), "", "", self._fresh("residual")]
        inputs = [x, residual, self.weight(name, weight), *biases]
        self.nodes("SkipSimplifiedLayerNormalization", inputs, outputs, domain=MICROSOFT, epsilon=epsilon)
        return outputs[0], outputs[3]

    def silu(self, x: str) -> str:
        """`x * sigmoid(x)`."""
        if self.fused:
            return self.node("QuickGelu", [x], domain=MICROSOFT, alpha=1.0)
        return self.node("Mul", [x, self.node("Sigmoid", [x])])

    def gelu(self, x: str) -> str:
        """Exact GELU, `x * (1 + erf(x / sqrt 2)) / 2`."""
        if self.fused:
            return self.node("Gelu", [x], domain=MICROSOFT)
        erf = self.node("Erf", [self.node("Mul", [x, self.constant(2**-0.5, "float32")])])
        half = self.node("Mul", [x, self.constant(0.5, "float32")])
        return self.node("Mul", [half, self.node("Add", [erf, self.constant(1.0, "float32")])])

    def reshape(self, x: str, shape: Sequence[int] | str) -> str:
        """Reshape to numbers (0 keeps a length, -1 infers one) or to a computed shape."""
        return self.node("Reshape", [x, shape if isinstance(shape, str) else self.constant(list(shape))])

    def lengths(self, x: str, *axes: int) -> str:
        """The lengths of the given axes of `x` as an int64 vector."""
        return self.node("Gather", [self.node("Shape", [x]), self.constant(list(axes))])

    def rotate(self, x: str, cos: str, sin: str) -> str:
        """Rotary embedding over the last axis, halves paired: cos and sin hold half the axis and broadcast to it."""
        first, second = self.nodes("Split", [x], [self._fresh("first"), self._fresh("second")], axis=-1)
        rotated = [
            self.node("Sub", [self.node("Mul", [first, cos]), self.node("Mul", [second, sin])]),
            self.node("Add", [self.node("Mul", [second, cos]), self.node("Mul", [first, sin])]),
        ]
        return self.node("Concat", rotated, axis=-1)

    def model(self) -> onnx.ModelProto:
        """The finished model, with inputs and outputs as the spec has them."""
        graph = helper.make_graph(
            self._nodes,
            self.spec.name,
            [_value_info(tensor) for tensor in self.spec.inputs],
            [_value_info(tensor) for tensor in self.spec.outputs],
            self._initializers,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model = helper.make_model(graph, opset_imports=opsets, producer_name="segzero-rt")
        model.ir_version = IR_VERSION
        return model

    def save(self, path: Path) -> None:
        """Writes the model to a temporary name, then renames it."""
        temporary = path.with_name(path.name + ".part")
        temporary.write_bytes(self.model().SerializeToString())
        temporary.replace(path)

    def _fresh(self, hint: str) -> str:
        path = "/".join([*self._path, hint])
        count = self._used.get(path, 0)
        self._used[path] = count + 1
        return f"{path}_{count}" if count else path


def float_storage(storage: str) -> str:
    """What is stored of tensors that are no matrices of products: token tables, norms, biases."""
    return "float32" if storage == "float32" else "float16"


def _value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, element, list(tensor.shape))
