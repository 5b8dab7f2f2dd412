"""Weights that an ONNX file keeps in files beside it: where they lie, read from its bytes without the ONNX package.

A graph names such a file itself, so that a bundle from anywhere could name any file of the machine. ONNX Runtime's own
checks differ from release to release; here every name is checked before a graph is loaded.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from segzero_rt.errors import BundleError, GraphError
from segzero_rt.manifest import check_relative_path

_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Fields, by number, through which a tensor can be reached in onnx.proto, and what they hold."""
_LOCATION = b"location"
"""The key of a file's name; whatever way a graph is encoded in, its characters stand in a row."""
_CHUNK_BYTES = 1 << 18
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_DEPTH = 64
"""Graphs inside attributes inside graphs: nothing real comes near."""


def check_external_data(path: Path) -> None:
    """Refuses a graph whose weights would be read from anywhere but plain files in the graph's own folder.

    Args:
        path: an ONNX file.

    Raises:
        GraphError: it is no ONNX file, names a file that is not there or not in its folder, or wants more of it than
            it has.
    """
    for entries in external_entries(path):
        location = entries.get("location", "")
        try:
            check_relative_path(location)
        except BundleError as error:
            raise GraphError(f"{path}: expected weights in files beside it, got the place {location[:80]!r}") from error
        data = path.parent / location
        if not data.is_file() or data.is_symlink() or data.resolve() != path.parent.resolve() / location:
            raise GraphError(f"{path}: expected its weights in a plain file {data}, got none; fetch the bundle again")
        end = _number(path, entries, "offset") + _number(path, entries, "length")
        if end > data.stat().st_size:
            raise GraphError(
                f"{path}: expected {end} bytes of weights in {data}, got {data.stat().st_size}; fetch the bundle again"
            )


def graph_bytes(path: Path) -> int:
    """Size of a graph with the files that hold its weights.

    Raises:
        GraphError: as `check_external_data`.
    """
    check_external_data(path)
    beside = {entries.get("location", "") for entries in external_entries(path)}
    return path.stat().st_size + sum((path.parent / location).stat().st_size for location in beside)


def external_entries(path: Path) -> Iterator[dict[str, str]]:
    """For each tensor that is kept outside, the entries by which the graph names its place.

    Raises:
        GraphError: the file cannot be read, or is no ONNX file.
    """
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            if _mentions_a_location(view):  # almost no graph does, and taking one apart takes many times longer
                yield from _tensors(view, "model", path, 0)
    except (OSError, ValueError) as error:
        raise GraphError(f"expected a readable graph at {path}, got: {error}") from error


def _mentions_a_location(data: memoryview) -> bool:
    overlap = len(_LOCATION) - 1
    return any(
        _LOCATION in bytes(data[start : start + _CHUNK_BYTES + overlap]) for start in range(0, len(data), _CHUNK_BYTES)
    )


def _tensors(data: memoryview, kind: str, path: Path, depth: int) -> Iterator[dict[str, str]]:
    if depth > _MAX_DEPTH:
        raise GraphError(f"expected a graph at {path}, got one that is {depth} levels deep")
    entries: dict[str, str] = {}
    for number, part in _fields(data, path):
        inner = _MESSAGES[kind].get(number)
        if inner == "entry":
            fields = dict(_fields(part, path))
            key, value = (bytes(fields.get(field, b"")).decode("utf-8", "replace") for field in (1, 2))
            entries[key] = value
        elif inner is not None:
            yield from _tensors(part, inner, path, depth + 1)
    if entries:
        yield entries


def _fields(data: memoryview, path: Path) -> Iterator[tuple[int, memoryview]]:
    """Number and contents of every field of bytes; numbers are passed over."""
    place, end = 0, len(data)
    while place < end:
        tag, place = _varint(data, place, path)
        kind = tag & 7
        if kind == _VARINT:
            _, place = _varint(data, place, path)
        elif kind == _BYTES:
            length, place = _varint(data, place, path)
            if place + length > end:
                raise _no_graph(path)
            yield tag >> 3, data[place : place + length]
            place += length
        elif kind in _FIXED_BYTES:
            place += _FIXED_BYTES[kind]
        else:
            raise _no_graph(path)
    if place != end:
        raise _no_graph(path)


def _varint(data: memoryview, place: int, path: Path) -> tuple[int, int]:
    value = shift = 0
    while place < len(data) and shift < 64:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise _no_graph(path)


def _number(path: Path, entries: dict[str, str], key: str) -> int:
    text = entries.get(key, "0")
    if not text.isascii() or not text.isdigit():
        raise GraphError(f"{path}: expected a number as {key} of its weights, got {text[:40]!r}")
    return int(text)


def _no_graph(path: Path) -> GraphError:
    return GraphError(f"expected a readable graph at {path}, got bytes that are none; fetch the bundle again")
