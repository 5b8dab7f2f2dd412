"""Writes ONNX graphs node by node: weights in their storage precision, the layers that policies are made of.

Weights stored as floats are computed with in float32 unless the graph is made for another precision: each goes through
a Cast, which ONNX Runtime folds away when it loads the file. With int8 storage the products of wide rows are computed
in int8 and all else in float32; with int4 storage, products with weights of 4 bits. Two dialects: `fused` uses ONNX
Runtime's own operators (domain com.microsoft), otherwise only operators of opset 17.

A graph computed in 16 bits keeps in float32 what does not bear them: the residual, the statistics of norms, rotary
embeddings, logits, and the products named in `float32_products`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from segzero_rt.errors import ExportError
from segzero_rt.graph_spec import GraphSpec, TensorSpec
from segzero_rt.operators import DOMAIN

from .disk import disk_error
from .lazy_weight import Weight
from .operators import SIDES_DIVIDED_BY, operator_function
from .precisions import COMPUTED, EXPLICIT_STORAGES, POLICY_STORAGES, QUANTIZED_STORAGES
from .precisions import STORAGES as STORAGES
from .weight_encoding import BLOCK, FLOATS, FloatEncoding, Int4Encoding, Int8Encoding, Stored
from .weight_store import InlineStore, WeightStore, external_tensor

OPSET = 17
FLOAT8_OPSET = 19
"""The first whose QuantizeLinear knows floats of 8 bits, and scales of 16."""
FLOAT4_OPSET = 23
"""The first whose DequantizeLinear knows floats of 4 bits."""
TRT11_OPSET = 24
"""The first with `TensorScatter`. TensorRT reads it from 10.15 on."""
_IR_VERSIONS = {OPSET: 8, FLOAT8_OPSET: 9, FLOAT4_OPSET: 11, TRT11_OPSET: 12}
"""The file format that came with each."""
_AXES_AS_INPUT_OPSET = 18
"""From there on reductions take their axes as an input, and Split wants to be told into how many parts."""
MICROSOFT = "com.microsoft"
INT8_FROM_WIDTH = 64
"""Narrower rows take as long to be quantised as their product saves: 48 gained nothing, 96 halved it (VNNI, AMX)."""
_QUICK_GELU = 1.702
"""The factor with which a sigmoid comes near to the normal distribution."""
_TANH_GELU_SLOPE, _TANH_GELU_CUBE = (2 / math.pi) ** 0.5, 0.044715
INT8_COMPUTE = 4
"""MatMulNBits' accuracy level at which the other factor is rounded to 8 bits as it comes."""


class GraphBuilder:
    """One graph in the making. Tensors are named by the path of the scopes that they were made in.

    Args:
        spec: its inputs and outputs.
        storage: precision of the weights in the file, one of `POLICY_STORAGES`.
        fused: use ONNX Runtime's own operators.
        store: takes the weights; the model itself by default.
        computed: what products and attention are computed in, one of `COMPUTED`.
        float32_products: paths of products (such as "blocks.31/down") that stay in float32 whatever `computed` says.
        opset: `OPSET`, or one of the others above; `TRT11_OPSET` has operators that took several nodes before.
        split_products: in a `fused` graph, products of floats as operators of `operators.py`: on processors with AMX
            they take a third of the time, and twice the memory for their weights, and are off by some 5e-6.
    """

    def __init__(
        self,
        spec: GraphSpec,
        *,
        storage: str = "float16",
        fused: bool = True,
        store: WeightStore | None = None,
        computed: str = "float32",
        float32_products: Collection[str] = (),
        opset: int = OPSET,
        split_products: bool = False,
    ) -> None:
        check_precision(storage, computed, fused=fused)
        self.spec = spec
        self.storage = storage
        self.fused = fused
        self.computed = computed
        self.opset = opset
        self._split_products = split_products and fused and computed == "float32" and storage not in QUANTIZED_STORAGES
        self.hidden: dict[str, str] = {}
        """Tensors that hold the residual as a layer takes it in, by the layer's name."""
        self.store = store or InlineStore()
        self.products: set[str] = set()
        """Paths of all float products made so far: what may stand in `float32_products`."""
        self._float32_products = frozenset(float32_products)
        self._path: list[str] = []
        self._used: dict[str, int] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._quantized: dict[str, list[str]] = {}
        self._operators: dict[str, onnx.FunctionProto] = {}
        self._made: dict[str, str] = {}
        """What weights of a name in the file are called in the graph."""
        self._same_weights = False

    @property
    def lossless(self) -> bool:
        """False once a weight was rounded to be stored."""
        return self.store.lossless

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Everything made inside is named `.../name/...`."""
        self._path.append(name)
        yield
        self._path.pop()

    @contextmanager
    def same_weights(self, same: bool = True) -> Iterator[None]:
        """Weights that are made inside under names that were made before are those, and not stored twice."""
        before, self._same_weights = self._same_weights, self._same_weights or same
        yield
        self._same_weights = before

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

    def by_operators(self, *sides: int) -> bool:
        """Whether compiled operators may take layers with these sides: they round to 8 bits of mantissa."""
        return self.fused and self.storage in QUANTIZED_STORAGES and not any(side % SIDES_DIVIDED_BY for side in sides)

    def by_split_products(self, *sides: int) -> bool:
        """Whether products of floats with these sides are compiled operators that split them, see `split_products`."""
        return self._split_products and not any(side % SIDES_DIVIDED_BY for side in sides)

    def operator(self, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node of one of `operators.OPERATORS`, and to the graph what it computes."""
        self._operators[name] = operator_function(name, self.opset)
        return self.node(name, inputs, domain=DOMAIN, **attributes)

    def name(self, hint: str) -> str:
        """A fresh tensor name in the current scope."""
        return self._fresh(hint)

    def constant(self, values: Any, dtype: str = "int64") -> str:
        """A small constant; equal ones are stored once."""
        array = np.asarray(values, dtype=FLOATS[dtype] if dtype in FLOATS else np.dtype(dtype))
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def weight(self, name: str, values: np.ndarray | Weight, *, exact: bool = False, dtype: str = "") -> str:
        """A weight in the storage precision, given back in the one that is computed in.

        Args:
            exact: store float32, and give float32, whatever the graph's precisions are.
            dtype: what to give it back as, if not as `computed`.

        Raises:
            ExportError: a value is not finite, or does not fit into float16.
        """
        return self._float_weight(name, values, "float32" if exact else "", "float32" if exact else dtype)

    def _float_weight(
        self, name: str, values: np.ndarray | Weight, stored: str = "", dtype: str = "", *, transposed: bool = False
    ) -> str:
        stored, dtype = stored or float_storage(self.storage), dtype or self.computed
        path = "/".join([*self._path, name])
        file_name = path if stored == dtype else f"{path}:{stored}"
        if self._same_weights and file_name in self._made:
            return self._made[file_name]
        weight = values if isinstance(values, Weight) else Weight.of(values)
        encoding = FloatEncoding(path, weight, name=file_name, dtype=stored, transposed=transposed)
        self._initializers.extend(self.store.add(encoding))
        self._made[file_name] = path if stored == dtype else self.cast(file_name, dtype, path)
        return self._made[file_name]

    def external_weight(self, name: str, shape: tuple[int, int], location: str) -> str:
        """A weight whose bytes are the whole of the file `location` beside the graph, in the storage precision."""
        stored = Stored(name=name, dtype=FLOATS[float_storage(self.storage)], shape=shape)
        self._initializers.append(external_tensor(stored, location))
        return name

    def cast(self, x: str, dtype: str, output: str | None = None) -> str:
        """Casts to one of `COMPUTED`."""
        return self.node("Cast", [x], output=output, to=helper.np_dtype_to_tensor_dtype(FLOATS[dtype]))

    def as_float32(self, x: str, output: str | None = None) -> str:
        """Casts from the storage precision to float32."""
        return self.cast(x, "float32", output)

    def widened(self, x: str) -> str:
        """What was computed in `computed`, as float32."""
        return x if self.computed == "float32" else self.cast(x, "float32")

    def narrowed(self, x: str) -> str:
        """What is float32, as `computed`."""
        return x if self.computed == "float32" else self.cast(x, self.computed)

    def linear(
        self,
        x: str,
        name: str,
        weight: np.ndarray | Weight,
        bias: np.ndarray | Weight | None = None,
        *,
        flat: bool = False,
        bits: int = 0,
        in_floats: bool = False,
    ) -> str:
        """`x @ weight.T + bias`, with `weight` as PyTorch keeps it: [out, in].

        Args:
            flat: `x` has two axes, so that one Gemm can do product and bias.
            bits: 8 where 4 would cost too much; by default what the storage says.
            in_floats: whatever the storage.
        """
        weight = weight if isinstance(weight, Weight) else Weight.of(weight)
        if not in_floats and self.storage in QUANTIZED_STORAGES and weight.shape[1] >= INT8_FROM_WIDTH:
            four = self.storage == "int4" and bits != 8
            return self._four_bit_linear(x, name, weight, bias) if four else self._int8_linear(x, name, weight, bias)
        self.products.add("/".join([*self._path, name]))
        wide = self._stays_float32(name)
        dtype = "float32" if wide else self.computed
        x = self.cast(x, dtype) if wide else x
        stored = self._float_weight(f"{name}.weight", weight, dtype=dtype, transposed=True)
        if flat and self.by_split_products(*weight.shape):
            if bias is None:
                return self.operator("SplitProduct", [x, stored])
            return self.operator("SplitLinear", [x, stored, self.weight(f"{name}.bias", bias, dtype=dtype)])
        if bias is not None:
            added = self.weight(f"{name}.bias", bias, dtype=dtype)
            if flat:
                return self.node("Gemm", [x, stored, added])
            return self.node("Add", [self.node("MatMul", [x, stored]), added])
        return self.node("MatMul", [x, stored])

    def _int8_linear(self, x: str, name: str, weight: Weight, bias: np.ndarray | Weight | None) -> str:
        """Weights as int8 with one scale per output; `x` is quantised as it comes, once for all products of it.

        Where `x` has one product alone, ONNX Runtime makes both nodes one, `DynamicQuantizeMatMul`.
        """
        stored, scale = self.int8_weight(name, weight)
        if x not in self._quantized:
            parts = [self._fresh(f"{name}.input:{part}") for part in ("uint8", "scale", "zero")]
            self._quantized[x] = self.nodes("DynamicQuantizeLinear", [x], parts)
        values, step, zero = self._quantized[x]
        inputs = [values, stored, step, scale, zero]
        if bias is not None:
            inputs += ["", self.weight(f"{name}.bias", bias)]
        return self.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)

    def int8_weight(self, name: str, weight: Weight) -> tuple[str, str]:
        """A layer's weight as int8 [in, out], and its scales [out]."""
        path = "/".join([*self._path, name])
        stored, scale = f"{path}.weight:int8", f"{path}.scale"
        if not self._same_weights or stored not in self._made:
            self._initializers.extend(self.store.add(Int8Encoding(path, weight, name=stored, scale_name=scale)))
            self._made[stored] = stored
        return stored, scale

    def _four_bit_linear(self, x: str, name: str, weight: Weight, bias: np.ndarray | Weight | None) -> str:
        """Weights in 4 bits with one scale per block of a row; `x` is rounded to 8 bits as it comes."""
        path = "/".join([*self._path, name])
        encoding = Int4Encoding(path, weight, name=f"{path}.weight:int4", scale_name=f"{path}.scale:float16")
        self._initializers.extend(self.store.add(encoding))
        inputs = [x, f"{path}.weight:int4", self.as_float32(f"{path}.scale:float16", f"{path}.scale")]
        out, width = weight.shape
        product = self.node(
            "MatMulNBits",
            inputs,
            domain=MICROSOFT,
            K=width,
            N=out,
            bits=4,
            block_size=BLOCK,
            accuracy_level=INT8_COMPUTE,
        )
        return product if bias is None else self.node("Add", [product, self.weight(f"{name}.bias", bias)])

    def attention(self, query: str, key: str, value: str, *, num_heads: int, head_dim: int) -> str:
        """Softmax attention of every query with every key, [batch, rows, heads * head_dim] each; no mask."""
        if self.by_operators(head_dim):
            return self.operator("Attention", [query, key, value], num_heads=num_heads, scale=head_dim**-0.5)
        if self.fused:
            return self.node("MultiHeadAttention", [query, key, value], domain=MICROSOFT, num_heads=num_heads)
        perms = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        query, key, value = (
            self.node("Transpose", [self.reshape(part, [0, 0, num_heads, head_dim])], perm=perm)
            for part, perm in zip((query, key, value), perms, strict=True)
        )
        scaled = self.node("Mul", [query, self.constant(head_dim**-0.5, self.computed)])
        shares = self.node("Softmax", [self.node("MatMul", [scaled, key])], axis=-1)
        mixed = self.node("Transpose", [self.node("MatMul", [shares, value])], perm=[0, 2, 1, 3])
        return self.reshape(mixed, [0, 0, num_heads * head_dim])

    def rms_norm(self, x: str, name: str, weight: np.ndarray | Weight, epsilon: float) -> str:
        """Root-mean-square norm over the last axis, of float32."""
        scale = self.weight(name, weight, dtype="float32")
        if self.fused:
            return self.node("SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=epsilon, stash_type=1)
        if self.opset >= TRT11_OPSET:
            return self.narrowed(self.node("RMSNormalization", [x, scale], axis=-1, epsilon=epsilon))
        square = self.node("Mul", [x, x])
        mean = self.reduce("ReduceMean", square, -1, keepdims=1)
        root = self.node("Sqrt", [self.node("Add", [mean, self.constant(epsilon, "float32")])])
        return self.narrowed(self.node("Mul", [self.node("Div", [x, root]), scale]))

    def add_rms_norm(
        self,
        x: str,
        residual: str,
        name: str,
        weight: np.ndarray | Weight,
        epsilon: float,
        bias: np.ndarray | Weight | None = None,
    ) -> tuple[str, str]:
        """Returns (norm of `x + bias + residual`, that sum); the residual and the sum are float32."""
        # Three operators also where ONNX Runtime has one, SkipSimplifiedLayerNormalization, which takes it longer.
        x = self.widened(x)
        if bias is not None:
            x = self.node("Add", [x, self.weight(f"{name}.added_bias", bias, dtype="float32")])
        total = self.node("Add", [x, residual])
        return self.rms_norm(total, name, weight, epsilon), total

    def layer_norm(self, x: str, name: str, weight: Weight, bias: Weight, epsilon: float) -> str:
        """Layer norm over the last axis, of float32."""
        parts = [
            self.weight(f"{name}.{part}", values, dtype="float32")
            for part, values in (("weight", weight), ("bias", bias))
        ]
        return self.narrowed(self.node("LayerNormalization", [x, *parts], axis=-1, epsilon=epsilon))

    def add_layer_norm(
        self, x: str, residual: str, name: str, weight: Weight, epsilon: float, *, norm_bias: Weight, bias: Weight
    ) -> tuple[str, str]:
        """Returns (norm of `x + bias + residual`, that sum); the residual and the sum are float32."""
        added = self.weight(f"{name}.added_bias", bias, dtype="float32")
        total = self.node("Add", [self.node("Add", [self.widened(x), added]), residual])
        return self.layer_norm(total, name, weight, norm_bias, epsilon), total

    def silu(self, x: str) -> str:
        """`x * sigmoid(x)`."""
        if self.fused:
            return self.node("QuickGelu", [x], domain=MICROSOFT, alpha=1.0)
        return self.node("Mul", [x, self.node("Sigmoid", [x])])

    def quick_gelu(self, x: str) -> str:
        """`x * sigmoid(1.702 x)`."""
        if self.fused:
            return self.node("QuickGelu", [x], domain=MICROSOFT, alpha=_QUICK_GELU)
        return self.node(
            "Mul", [x, self.node("Sigmoid", [self.node("Mul", [x, self.constant(_QUICK_GELU, self.computed)])])]
        )

    def tanh_gelu(self, x: str) -> str:
        """GELU with its tanh, `x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`."""
        if self.fused:
            return self.node("FastGelu", [x], domain=MICROSOFT)
        cube = self.node("Mul", [self.node("Mul", [x, x]), x])
        bent = self.node("Add", [x, self.node("Mul", [cube, self.constant(_TANH_GELU_CUBE, self.computed)])])
        tanh = self.node("Tanh", [self.node("Mul", [bent, self.constant(_TANH_GELU_SLOPE, self.computed)])])
        half = self.node("Mul", [x, self.constant(0.5, self.computed)])
        return self.node("Mul", [half, self.node("Add", [tanh, self.constant(1.0, self.computed)])])

    def gated(self, gate: str, up: str, product: str) -> str:
        """`silu(gate) * up`, in float32 where the product that follows stays in it: the factor overflows before it."""
        gate = self.silu(gate)
        if self._stays_float32(product):
            gate, up = self.widened(gate), self.widened(up)
        return self.node("Mul", [gate, up])

    def gelu(self, x: str) -> str:
        """Exact GELU, `x * (1 + erf(x / sqrt 2)) / 2`."""
        if self.fused:
            return self.node("Gelu", [x], domain=MICROSOFT)
        erf = self.node("Erf", [self.node("Mul", [x, self.constant(2**-0.5, self.computed)])])
        half = self.node("Mul", [x, self.constant(0.5, self.computed)])
        return self.node("Mul", [half, self.node("Add", [erf, self.constant(1.0, self.computed)])])

    def reshape(self, x: str, shape: Sequence[int] | str) -> str:
        """Reshape to numbers (0 keeps a length, -1 infers one) or to a computed shape."""
        return self.node("Reshape", [x, shape if isinstance(shape, str) else self.constant(list(shape))])

    def reduce(self, op: str, x: str, axis: int, *, keepdims: int) -> str:
        """ReduceMean, ReduceMax, ... along one axis."""
        if self.opset >= _AXES_AS_INPUT_OPSET:
            return self.node(op, [x, self.constant([axis])], keepdims=keepdims)
        return self.node(op, [x], axes=[axis], keepdims=keepdims)

    def lengths(self, x: str, *axes: int) -> str:
        """The lengths of the given axes of `x` as an int64 vector."""
        return self.node("Gather", [self.node("Shape", [x]), self.constant(list(axes))])

    def rotate(self, x: str, cos: str, sin: str) -> str:
        """Rotary embedding over the last axis, halves paired: cos and sin hold half the axis and broadcast to it."""
        counted: dict[str, Any] = {"num_outputs": 2} if self.opset >= _AXES_AS_INPUT_OPSET else {}
        first, second = self.nodes("Split", [x], [self._fresh("first"), self._fresh("second")], axis=-1, **counted)
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
        opsets = [helper.make_opsetid("", self.opset)]
        if self._operators or any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        if self._operators:
            opsets.append(helper.make_opsetid(DOMAIN, 1))
        functions = list(self._operators.values())
        model = helper.make_model(graph, opset_imports=opsets, producer_name="segzero-rt", functions=functions)
        model.ir_version = _IR_VERSIONS[self.opset]
        return model

    def save(self, path: Path) -> None:
        """Writes the model to a temporary name, then renames it."""
        self.store.close()
        temporary = path.with_name(path.name + ".part")
        try:
            temporary.write_bytes(self.model().SerializeToString())
        except OSError as error:
            raise disk_error(error, path) from error
        temporary.replace(path)

    def _stays_float32(self, product: str) -> bool:
        return self.computed != "float32" and "/".join([*self._path, product]) in self._float32_products

    def _fresh(self, hint: str) -> str:
        path = "/".join([*self._path, hint])
        count = self._used.get(path, 0)
        self._used[path] = count + 1
        return f"{path}_{count}" if count else path


def float_storage(storage: str) -> str:
    """What is stored of tensors that are no matrices of products: token tables, norms, biases."""
    return storage if storage in FLOATS else "float16"


def check_precision(storage: str, computed: str, *, fused: bool) -> None:
    """Refuses what no graph can be: unknown names, and pairs that no operator of the dialect knows.

    Raises:
        ExportError: such a pair.
    """
    if storage not in POLICY_STORAGES:
        raise ExportError(f"expected weights stored as {', '.join(POLICY_STORAGES)}, got {storage!r}")
    if computed not in COMPUTED:
        raise ExportError(f"expected a graph computed in {', '.join(COMPUTED)}, got {computed!r}")
    if storage in EXPLICIT_STORAGES:
        raise ExportError(
            f"expected flavour portable or trt11 for {storage} weights, got ort; it has no such operators"
        )
    if storage in QUANTIZED_STORAGES and not fused:
        raise ExportError(f"expected flavour ort for {storage} weights, got another; those operators know floats alone")
    if computed != "float32" and fused:
        raise ExportError(f"expected flavour portable for a graph computed in {computed}, got ort; that is float32")
    if computed != "float32" and storage != computed:
        raise ExportError(f"expected weights stored as {computed}, as they are computed with, got {storage}")


def _value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, element, list(tensor.shape))
