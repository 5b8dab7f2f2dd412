"""Operators of domain "segzero": what each computes, as a function of ONNX Runtime's operators that a graph carries.

Where `segzero_rt.operators` has compiled kernels for the processor, ONNX Runtime runs those; elsewhere it puts the
function's nodes in the operator's place when it loads the graph, and runs what it would have run without all this.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, helper

from segzero_rt.operators import DOMAIN

from .lazy_weight import Weight

if TYPE_CHECKING:
    from .graph_builder import GraphBuilder

MICROSOFT = "com.microsoft"
SIDES_DIVIDED_BY = 16
"""Of layers and heads that the kernels take."""


@functools.cache
def operator_function(name: str, opset: int) -> FunctionProto:
    """The function of an operator, one of `OPERATORS`."""
    inputs, attributes, nodes = _FUNCTIONS[name]
    return helper.make_function(
        DOMAIN,
        name,
        list(inputs),
        ["y"],
        [_node(*one) for one in nodes],
        [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)],
        list(attributes),
    )


Layer = tuple[str, Weight, Weight]
"""Name, weight (of a linear layer [out, in], as PyTorch keeps it) and bias."""


def mlp(builder: GraphBuilder, x: str, norm: Layer, layers: Sequence[Layer], epsilon: float, operator: str) -> str:
    """Adds `x + second(gelu(first(norm(x))))` as one operator, by rows.

    Args:
        operator: "Int8Mlp", or with weights that are stored as floats "Mlp" or "SplitMlp".
    """
    name, scale, shift = norm
    inputs = [x, builder.weight(f"{name}.weight", scale), builder.weight(f"{name}.bias", shift)]
    for name, weight, bias in layers:
        if operator == "Int8Mlp":
            inputs.extend(builder.int8_weight(name, weight))
        else:
            inputs.append(builder.weight(f"{name}.weight", weight.array().T))
        inputs.append(builder.weight(f"{name}.bias", bias))
    return builder.operator(operator, inputs, epsilon=epsilon)


def gated_mlp(builder: GraphBuilder, x: str, norm: tuple[str, Weight], layers: Sequence[Layer], epsilon: float) -> str:
    """Adds `x + down(silu(gate(norm(x))) * up(norm(x)))` as one operator, by rows, in int8.

    Args:
        norm: name and weight of a root-mean-square norm.
        layers: gate, up and down.
    """
    inputs = [x, builder.weight(*norm, dtype="float32")]
    for name, weight, bias in layers:
        inputs += [*builder.int8_weight(name, weight), builder.weight(f"{name}.bias", bias)]
    return builder.operator("Int8GatedMlp", inputs, epsilon=epsilon)


def uses_operators(path: Path) -> bool:
    """Whether a graph's file holds any."""
    return any(node.domain == DOMAIN for node in onnx.load(str(path), load_external_data=False).graph.node)


_Node = tuple[str, str, str, str, dict[str, Any]]
"""Domain, operator, inputs, outputs, attributes; an attribute of the function as its name behind "@"."""


def _node(domain: str, operator: str, inputs: str, outputs: str, attributes: dict[str, Any]) -> NodeProto:
    names = [name.strip("-") for name in inputs.split()]
    node = helper.make_node(operator, names, outputs.split(), domain=domain)
    for name, value in attributes.items():
        if isinstance(value, str):
            kind = AttributeProto.INT if value == "@num_heads" else AttributeProto.FLOAT
            node.attribute.append(AttributeProto(name=name, ref_attr_name=value[1:], type=kind))
        else:
            node.attribute.append(helper.make_attribute(name, value))
    return node


_NORM: _Node = ("", "LayerNormalization", "x norm_scale norm_bias", "normed", {"axis": -1, "epsilon": "@epsilon"})
# ONNX Runtime 1.31 crashes on its own SimplifiedLayerNormalization in a function; of these nodes it makes that one.
_ROOT_MEAN_SQUARE_NORM: tuple[_Node, ...] = (
    ("", "Constant", "", "two", {"value_float": 2.0}),
    ("", "Constant", "", "least", {"value_float": "@epsilon"}),
    ("", "Pow", "x two", "squares", {}),
    ("", "ReduceMean", "squares", "mean", {"axes": [-1], "keepdims": 1}),
    ("", "Add", "mean least", "above", {}),
    ("", "Sqrt", "above", "root", {}),
    ("", "Div", "x root", "divided", {}),
    ("", "Mul", "divided norm_scale", "normed", {}),
)
_SUM: _Node = ("", "Add", "x added", "y", {})
_GELU: _Node = (MICROSOFT, "Gelu", "wide", "hidden", {})
_Function = tuple[tuple[str, ...], tuple[str, ...], tuple[_Node, ...]]
"""Inputs, attributes, nodes."""
_FLOAT_MLP: _Function = (
    ("x", "norm_scale", "norm_bias", "weight1", "bias1", "weight2", "bias2"),
    ("epsilon",),
    (
        _NORM,
        ("", "Gemm", "normed weight1 bias1", "wide", {}),
        _GELU,
        ("", "Gemm", "hidden weight2 bias2", "added", {}),
        _SUM,
    ),
)
_FUNCTIONS: dict[str, _Function] = {
    "Mlp": _FLOAT_MLP,
    "SplitMlp": _FLOAT_MLP,
    "Int8Mlp": (
        ("x", "norm_scale", "norm_bias", "weight1", "scale1", "bias1", "weight2", "scale2", "bias2"),
        ("epsilon",),
        (
            _NORM,
            ("", "DynamicQuantizeLinear", "normed", "normed_8 step1 zero1", {}),
            (MICROSOFT, "MatMulIntegerToFloat", "normed_8 weight1 step1 scale1 zero1 - bias1", "wide", {}),
            _GELU,
            ("", "DynamicQuantizeLinear", "hidden", "hidden_8 step2 zero2", {}),
            (MICROSOFT, "MatMulIntegerToFloat", "hidden_8 weight2 step2 scale2 zero2 - bias2", "added", {}),
            _SUM,
        ),
    ),
    "Int8GatedMlp": (
        (
            *("x", "norm_scale", "gate_weight", "gate_scale", "gate_bias", "up_weight", "up_scale", "up_bias"),
            *("weight2", "scale2", "bias2"),
        ),
        ("epsilon",),
        (
            *_ROOT_MEAN_SQUARE_NORM,
            ("", "DynamicQuantizeLinear", "normed", "normed_8 step1 zero1", {}),
            (MICROSOFT, "MatMulIntegerToFloat", "normed_8 gate_weight step1 gate_scale zero1 - gate_bias", "gate", {}),
            (MICROSOFT, "MatMulIntegerToFloat", "normed_8 up_weight step1 up_scale zero1 - up_bias", "up", {}),
            (MICROSOFT, "QuickGelu", "gate", "opened", {"alpha": 1.0}),
            ("", "Mul", "opened up", "hidden", {}),
            ("", "DynamicQuantizeLinear", "hidden", "hidden_8 step2 zero2", {}),
            (MICROSOFT, "MatMulIntegerToFloat", "hidden_8 weight2 step2 scale2 zero2 - bias2", "added", {}),
            _SUM,
        ),
    ),
    "SplitLinear": (("x", "weight", "bias"), (), (("", "Gemm", "x weight bias", "y", {}),)),
    "SplitProduct": (("x", "weight"), (), (("", "MatMul", "x weight", "y", {}),)),
    "Attention": (
        ("query", "key", "value"),
        ("num_heads", "scale"),
        ((MICROSOFT, "MultiHeadAttention", "query key value", "y", {"num_heads": "@num_heads", "scale": "@scale"}),),
    ),
    "HeadAttention": (
        ("query", "key", "value"),
        ("num_heads", "scale"),
        (
            ("", "Constant", "", "factor", {"value_float": "@scale"}),
            ("", "Mul", "query factor", "scaled", {}),
            ("", "Transpose", "key", "turned", {"perm": [0, 2, 1]}),
            ("", "MatMul", "scaled turned", "scores", {}),
            ("", "Softmax", "scores", "shares", {"axis": -1}),
            ("", "MatMul", "shares value", "y", {}),
        ),
    ),
}
OPERATORS = tuple(_FUNCTIONS)
