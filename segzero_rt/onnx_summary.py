"""What an ONNX file holds, read without the `onnx` package: weights, operators, what they compute in, files beside it.

The runtime must know these before it loads a graph: how much memory the weights take, and which files an engine was
built from. Only the fields named here are read, and the weights' bytes are stepped over, so that a file of several GB
takes milliseconds. Field numbers: onnx.proto3 of ONNX 1.18.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from segzero_rt.errors import GraphError

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT = 1, 5, 11
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_OF_TENSOR, _TYPE_OF_ELEMENT = 1, 1
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    17: "float8",
    18: "float8",
    19: "float8",
    20: "float8",
    21: "uint4",
    22: "int4",
    23: "float4",
}
_FLOATS = frozenset({"float32", "float64", "float16", "bfloat16"})
_BITS = {
    "float64": 64,
    "int64": 64,
    "float32": 32,
    "int32": 32,
    "float16": 16,
    "bfloat16": 16,
    "uint4": 4,
    "int4": 4,
    "float4": 4,
}
"""Of one number; 8 for all other types."""


class Weight(NamedTuple):
    """One initializer."""

    dtype: str
    """numpy's name, or "bfloat16", "float8", "int4", "uint4", "float4"; the number of an unknown type."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return -(-self.elements * _BITS.get(self.dtype, 8) // 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxSummary:
    """What `read_summary` found."""

    weights: tuple[Weight, ...]
    operators: Counter[str]
    """Operator to how often; those of another domain than ONNX's as "domain:operator"."""
    external_files: frozenset[str]
    """Names of files beside the graph that hold weights."""

    @property
    def weight_bytes(self) -> int:
        """Of all weights, as they are stored."""
        return sum(weight.num_bytes for weight in self.weights)

    def elements(self, *dtypes: str) -> int:
        """How many numbers of these types the weights hold."""
        return sum(weight.elements for weight in self.weights if weight.dtype in dtypes)


def read_summary(path: Path) -> OnnxSummary:
    """Reads one ONNX file.

    Raises:
        GraphError: it cannot be read, or is no ONNX model.
    """
    return _mapped(path, _read)


def computed_types(path: Path) -> dict[str, str]:
    """What each named node of a graph computes in: the type of the first of its inputs that is a float.

    Types follow the graph's own inputs, weights and casts; nodes of integers alone, and those within functions, are
    left out.

    Raises:
        GraphError: it cannot be read, or is no ONNX model.
    """
    return _mapped(path, _node_types)


_Result = TypeVar("_Result")


def _mapped(path: Path, read: Callable[[mmap.mmap], _Result]) -> _Result:
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read(data)
    except (OSError, ValueError, IndexError) as error:  # an empty file, one that ends early, lengths beyond its end
        raise GraphError(f"expected an ONNX graph at {path}, got something else ({error}); export it again") from error


def _graph(data: mmap.mmap) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Fields of the model's graph."""
    graphs = [span for field, span in _fields(data, 0, len(data)) if field == _MODEL_GRAPH and isinstance(span, tuple)]
    if len(graphs) != 1:
        raise ValueError("it holds no graph")
    return _fields(data, *graphs[0])


def _read(data: mmap.mmap) -> OnnxSummary:
    weights: list[Weight] = []
    operators: Counter[str] = Counter()
    external: set[str] = set()
    for field, span in _graph(data):
        if field == _GRAPH_NODE and isinstance(span, tuple):
            operators[_operator(data, *span)] += 1
        elif field == _GRAPH_INITIALIZER and isinstance(span, tuple):
            weight, location = _weight(data, *span)
            weights.append(weight)
            external.update(location)
    return OnnxSummary(weights=tuple(weights), operators=operators, external_files=frozenset(external))


def _node_types(data: mmap.mmap) -> dict[str, str]:
    types: dict[str, str] = {}
    nodes: list[tuple[int, int]] = []
    for field, span in _graph(data):
        if not isinstance(span, tuple):
            continue
        if field == _GRAPH_NODE:
            nodes.append(span)  # weights and inputs may stand behind them
        elif field == _GRAPH_INITIALIZER:
            parts = dict(_fields(data, *span))
            types[_text(data, parts.get(_TENSOR_NAME, 0))] = _TYPES.get(_number(parts.get(_TENSOR_TYPE)), "")
        elif field == _GRAPH_INPUT:
            parts = dict(_fields(data, *span))
            types[_text(data, parts.get(_VALUE_NAME, 0))] = _element_type(data, parts.get(_VALUE_TYPE))
    found: dict[str, str] = {}
    for span in nodes:
        inputs, outputs, name, to = _wiring(data, span)
        computed = next((types[one] for one in inputs if types.get(one) in _FLOATS), "")
        types.update(dict.fromkeys(outputs, to or computed))
        if name and computed:
            found[name] = computed
    return found


def _wiring(data: mmap.mmap, span: tuple[int, int]) -> tuple[list[str], list[str], str, str]:
    """A node's inputs, outputs and name, and the type that it casts to, if it does."""
    names: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_NAME: [], _NODE_OPERATOR: []}
    to = ""
    for field, value in _fields(data, *span):
        if field in names:
            names[field].append(_text(data, value))
        elif field == _NODE_ATTRIBUTE and isinstance(value, tuple):
            parts = dict(_fields(data, *value))
            if _text(data, parts.get(_ATTRIBUTE_NAME, 0)) == "to":
                to = _TYPES.get(_number(parts.get(_ATTRIBUTE_INT)), "")
    cast = to if "Cast" in names[_NODE_OPERATOR] else ""
    return names[_NODE_INPUT], names[_NODE_OUTPUT], "".join(names[_NODE_NAME]), cast


def _element_type(data: mmap.mmap, span: int | tuple[int, int] | None) -> str:
    """Of a graph's input; "" where it is no tensor."""
    for inner in (_TYPE_OF_TENSOR, _TYPE_OF_ELEMENT):
        if not isinstance(span, tuple):
            return ""
        span = dict(_fields(data, *span)).get(inner)
    return _TYPES.get(_number(span), "")


def _number(value: int | tuple[int, int] | None) -> int:
    return value if isinstance(value, int) else 0


def _operator(data: mmap.mmap, start: int, end: int) -> str:
    parts = {
        field: _text(data, span) for field, span in _fields(data, start, end) if field in (_NODE_OPERATOR, _NODE_DOMAIN)
    }
    name, domain = parts.get(_NODE_OPERATOR, ""), parts.get(_NODE_DOMAIN, "")
    return f"{domain}:{name}" if domain else name


def _weight(data: mmap.mmap, start: int, end: int) -> tuple[Weight, list[str]]:
    shape: list[int] = []
    kind = 0
    external: list[str] = []
    for field, value in _fields(data, start, end):
        if field == _TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else _packed(data, *value)
        elif field == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif field == _TENSOR_EXTERNAL and isinstance(value, tuple):
            entry = {key: _text(data, span) for key, span in _fields(data, *value)}
            if entry.get(_ENTRY_KEY) == "location":
                external.append(entry.get(_ENTRY_VALUE, ""))
    return Weight(_TYPES.get(kind, str(kind)), tuple(shape)), external


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Number and value of each field: a number, or where the field's bytes start and end."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"field {field} has the unknown wire type {wire}")
        if at + length > end:
            raise ValueError(f"field {field} reaches beyond its end")
        yield field, (at, at + length)
        at += length


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is longer than ten bytes")


def _packed(data: mmap.mmap, start: int, end: int) -> list[int]:
    numbers: list[int] = []
    while start < end:
        number, start = _varint(data, start)
        numbers.append(number)
    return numbers


def _text(data: mmap.mmap, span: int | tuple[int, int]) -> str:
    return "" if isinstance(span, int) else bytes(data[slice(*span)]).decode(errors="replace")
