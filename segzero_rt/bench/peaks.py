"""What this machine can do at most, measured on the spot: products a second by type, and bytes a second from memory.

Products run in ONNX Runtime on graphs of one large product, on the backend and with the threads of the bench itself, so
that the peak is that of the library which every stage uses. The graphs are written here byte by byte (onnx.proto3 of
ONNX 1.18), since the runtime does without the `onnx` package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segzero_rt.bench.onnx_session import device_value, open_session
from segzero_rt.graph import Backend

_FLOAT32, _UINT8, _INT8, _INT32, _FLOAT16 = 1, 2, 3, 6, 10
_IR_VERSION, _OPSET = 8, 17
_SIDES = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied: long enough to reach the peak, short enough to repeat."""
_TYPES = {"cpu": ("float32", "int8", "float16"), "cuda": ("float32", "float16")}
READ_SIZES = (2 << 20, 8 << 20, 32 << 20, 128 << 20)
"""Bytes that are read over and over: small weights stay in some cache between two runs, large ones come from memory."""
_VECTOR_BYTES = 1 << 14
_SECONDS = 0.25
_LEAST_RUNS = 8
"""However long they take: where others work on the machine, a moment holds one run, and that one may be theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """Best of the runs that fit into a moment, per type of number."""

    flops: dict[str, float]
    """Operations a second (a product and a sum are two) in "float32", "int8" or "float16"."""
    read_rates: dict[int, float]
    """Bytes a second by how many bytes are read again and again (`READ_SIZES`): the best of copying, reading, and a
    vector times a matrix, and no less than for anything larger."""

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the largest size."""
        return self.read_rates[max(self.read_rates)]

    def bandwidth_of(self, num_bytes: float) -> float:
        """Bytes a second for a stage that reads so many, from wherever they stay between its runs."""
        return self.read_rates[
            max((size for size in self.read_rates if size <= num_bytes), default=min(self.read_rates))
        ]

    def to_json(self) -> dict[str, Any]:
        rates = {str(size): rate for size, rate in self.read_rates.items()}
        return {"flops": self.flops, "bandwidth": self.bandwidth, "read_rates": rates}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Peaks:
        """The reverse of `to_json`."""
        rates = {int(size): rate for size, rate in document["read_rates"].items()}
        return cls(flops=dict(document["flops"]), read_rates=rates)


def measure_peaks(backend: Backend, threads: int) -> Peaks:
    """Takes some seconds and half a gigabyte: for a process of its own.

    Raises:
        GraphError: the backend cannot run a single product.
    """
    side = _SIDES[backend.device]
    flops = {
        kind: 2.0 * side**3 / _best_s(_product(backend, threads, kind, side, side, side))
        for kind in _TYPES[backend.device]
    }
    flops["float16"] = max(flops["float16"], flops["float32"])  # a CPU computes it by casting, which is no peak
    rates: dict[int, float] = {}
    for size in sorted(READ_SIZES, reverse=True):
        inner = _VECTOR_BYTES // 4
        found = [size / _best_s(_product(backend, threads, "float32", 1, inner, size // _VECTOR_BYTES))]
        if backend.device == "cpu":
            found += _memory_rates(size, threads)
        rates[size] = max([*found, *rates.values()])
    return Peaks(flops=flops, read_rates=rates)


def _product(backend: Backend, threads: int, kind: str, rows: int, inner: int, columns: int) -> Callable[[], None]:
    """[rows, inner] times a constant [inner, columns], its buffers where the backend computes."""
    left, right = (_UINT8, _INT8) if kind == "int8" else (_FLOAT16, _FLOAT16) if kind == "float16" else (1, 1)
    dtype = {"int8": np.uint8, "float16": np.float16}.get(kind, np.float32)
    rng = np.random.default_rng(0)
    weight = np.resize(rng.integers(-60, 60, 8191, np.int8), (inner, columns))  # drawing them all would take seconds
    constant = weight if kind == "int8" else (weight / np.float32(60)).astype(dtype)
    operator, result = ("MatMulInteger", _INT32) if kind == "int8" else ("MatMul", left)
    model = product_model(operator, rows, constant, types=(left, right, result))
    session = open_session(model, backend, threads)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", device_value(rng.integers(0, 2, (rows, inner)).astype(dtype), backend))
    binding.bind_output("y", backend.device)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _memory_rates(size: int, threads: int) -> list[float]:
    """Copying (half of `size` read, half written) and reading, each thread its own part of one array."""
    source = np.ones(size // 8, np.float32)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

        def read() -> None:
            list(pool.map(lambda part: (part[0].max(), part[1].max()), parts))

        return [size / _best_s(copy), size / _best_s(read)]


def _best_s(run: Callable[[], object]) -> float:
    run()
    took: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(took) < _LEAST_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return min(took)


def product_model(operator: str, rows: int, weight: NDArray[Any], *, types: tuple[int, int, int]) -> bytes:
    """An ONNX file of y[rows, N] = x[rows, K] times a constant [K, N].

    Args:
        operator: "MatMul" or "MatMulInteger".
        types: ONNX's numbers for the types of x, the constant and y.
    """
    left, right, result = types
    inner, columns = weight.shape
    node = _text(1, "x") + _text(1, "w") + _text(2, "y") + _text(4, operator)
    constant = _varints(1, inner) + _varints(1, columns) + _varints(2, right) + _text(8, "w")
    constant += _bytes(9, weight.tobytes())
    graph = _bytes(1, node) + _text(2, "product") + _bytes(5, constant)
    graph += _bytes(11, _value("x", left, (rows, inner))) + _bytes(12, _value("y", result, (rows, columns)))
    return _varints(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _text(1, "") + _varints(2, _OPSET))


def _value(name: str, kind: int, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_bytes(1, _varints(1, length)) for length in shape)
    return _text(1, name) + _bytes(2, _bytes(1, _varints(1, kind) + _bytes(2, dims)))


def _varints(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
