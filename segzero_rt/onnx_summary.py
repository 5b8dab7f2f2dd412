"""What an ONNX file holds, read without the `onnx` package: its weights' shapes and types, operators, files beside it.

The runtime must know these before it loads a graph: how much memory the weights take, and which files an engine was
built from. Only the fields named here are read, and the weights' bytes are stepped over, so that a file of several GB
takes milliseconds. Field numbers: onnx.proto3 of ONNX 1.18.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from segzero_rt.errors import GraphError

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_OPERATOR, _NODE_DOMAIN = 4, 7
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_EXTERNAL = 1, 2, 13
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
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data)
    except (OSError, ValueError, IndexError) as error:  # an empty file, one that ends early, lengths beyond its end
        raise GraphError(f"expected an ONNX graph at {path}, got something else ({error}); export it again") from error


def _read(data: mmap.mmap) -> OnnxSummary:
    weights: list[Weight] = []
    operators: Counter[str] = Counter()
    external: set[str] = set()
    graphs = [span for field, span in _fields(data, 0, len(data)) if field == _MODEL_GRAPH and isinstance(span, tuple)]
    if len(graphs) != 1:
        raise ValueError("it holds no graph")
    for field, span in _fields(data, *graphs[0]):
        if field == _GRAPH_NODE and isinstance(span, tuple):
            operators[_operator(data, *span)] += 1
        elif field == _GRAPH_INITIALIZER and isinstance(span, tuple):
            weight, location = _weight(data, *span)
            weights.append(weight)
            external.update(location)
    return OnnxSummary(weights=tuple(weights), operators=operators, external_files=frozenset(external))


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
