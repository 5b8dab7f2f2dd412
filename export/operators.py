"""Operators of domain "segzero": what each computes, as a function of ONNX Runtime's operators that a graph carries.

Where `segzero_rt.operators` has compiled kernels for the processor, ONNX Runtime runs those; elsewhere it puts the
function's nodes in the operator's place when it loads the graph, and runs what it would have run without all this.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, helper

from segzero_rt.operators import DOMAIN

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
_SUM: _Node = ("", "Add", "x added", "y", {})
_GELU: _Node = (MICROSOFT, "Gelu", "wide", "hidden", {})
_FUNCTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[_Node, ...]]] = {
    "Mlp": (
        ("x", "norm_scale", "norm_bias", "weight1", "bias1", "weight2", "bias2"),
        ("epsilon",),
        (
            _NORM,
            ("", "Gemm", "normed weight1 bias1", "wide", {}),
            _GELU,
            ("", "Gemm", "hidden weight2 bias2", "added", {}),
            _SUM,
        ),
    ),
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
