"""How weights lie in the files: as floats, or rounded to 8 or 4 bits with scales. Each encoding reads by pieces.

Scales are kept so that rounding is done with the very numbers that will be multiplied back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from segzero_rt.errors import ExportError

from .lazy_weight import Floats, Weight

BLOCK = 32
"""Numbers along a row that share one scale in 4 bits: what ONNX Runtime's kernels are made for."""

FLOAT8, HIGHEST_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn), 448.0
FLOAT4 = np.dtype(ml_dtypes.float4_e2m1fn)

FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One tensor of a file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        elements = int(np.prod(self.shape, dtype=np.int64))
        return -(-elements // 2) if self.dtype == FLOAT4 else elements * self.dtype.itemsize

    @property
    def element(self) -> int:
        """ONNX's number of the type."""
        return int(helper.np_dtype_to_tensor_dtype(self.dtype))

    def proto(self) -> TensorProto:
        """The tensor without its numbers."""
        return TensorProto(name=self.name, data_type=self.element, dims=self.shape)


class Encoding(ABC):
    """A weight on its way into a file: one tensor, or numbers and their scales."""

    def __init__(self, path: str, weight: Weight, tensors: tuple[Stored, ...]) -> None:
        self.path = path
        self.weight = weight
        self.tensors = tensors
        self.lossless = True
        """False once a number was rounded; certain only after `pieces` has come to its end."""

    @abstractmethod
    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive parts of each tensor, with the tensor's index; all parts of one come before those of the next.

        Raises:
            ExportError: a number is not finite, or does not fit.
        """

    def _checked(self, values: Floats) -> Floats:
        largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
        if not np.isfinite(largest):
            raise ExportError(f"expected finite weights, got {largest} in {self.path}; the checkpoint is damaged")
        return values


class FloatEncoding(Encoding):
    """Floats as they are, or rounded to 16 bits.

    Args:
        dtype: one of `FLOATS`.
        transposed: of a matrix [out, in], write [in, out], as MatMul takes it.
    """

    def __init__(self, path: str, weight: Weight, *, name: str, dtype: str, transposed: bool = False) -> None:
        shape = weight.shape[::-1] if transposed else weight.shape
        super().__init__(path, weight, (Stored(name=name, dtype=FLOATS[dtype], shape=shape),))
        self._dtype = FLOATS[dtype]
        self._transposed = transposed

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        for values in [self.weight.array()] if self._transposed or not self.weight.shape else self.weight.chunks():
            stored = self._round(self._checked(values))
            yield 0, np.ascontiguousarray(stored.T) if self._transposed else stored

    def _round(self, values: Floats) -> np.ndarray:
        if self._dtype == np.float32:
            return values
        if self._dtype == np.float16:
            largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
            if largest > float(np.finfo(np.float16).max):
                raise ExportError(
                    f"expected weights that fit into float16, got {largest} in {self.path}; store it as float32"
                )
        stored, exact = _as_16_bits(values, self._dtype)
        self.lossless = self.lossless and exact
        return stored


def _as_16_bits(values: Floats, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """Rounded to nearest, and whether nothing was lost; by PyTorch, which is several times faster at it than NumPy."""
    import torch

    source = torch.from_numpy(np.ascontiguousarray(values))
    stored = source.to(torch.float16 if dtype == np.float16 else torch.bfloat16)
    exact = torch.equal(stored.to(torch.float32), source)
    return stored.view(torch.int16).numpy().view(dtype), exact


class Int8Encoding(Encoding):
    """Numbers [in, out] in 8 bits, and one scale for each output."""

    def __init__(self, path: str, weight: Weight, *, name: str, scale_name: str) -> None:
        out, width = weight.shape
        numbers = Stored(name=name, dtype=np.dtype(np.int8), shape=(width, out))
        super().__init__(path, weight, (numbers, Stored(name=scale_name, dtype=FLOATS["float32"], shape=(out,))))

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        numbers = np.empty(self.tensors[0].shape, dtype=np.int8)
        scales = np.empty(self.tensors[1].shape, dtype=np.float32)
        start = 0
        for values in self.weight.chunks():
            rows = slice(start, start := start + len(values))
            scales[rows] = np.maximum(np.abs(self._checked(values)).max(axis=1), 1e-12).astype(np.float32) / 127
            numbers[:, rows] = np.rint(values / scales[rows, None]).astype(np.int8).T
        self.lossless = False
        yield 0, numbers
        yield 1, scales


class Float8Encoding(Encoding):
    """Numbers [in, out] as float8 e4m3fn, and one scale for each output.

    Args:
        scale_dtype: of the scales, and so of what the numbers stand for: "float32" or "float16".
    """

    def __init__(self, path: str, weight: Weight, *, name: str, scale_name: str, scale_dtype: str = "float32") -> None:
        out, width = weight.shape
        numbers = Stored(name=name, dtype=FLOAT8, shape=(width, out))
        super().__init__(path, weight, (numbers, Stored(name=scale_name, dtype=FLOATS[scale_dtype], shape=(out,))))

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        codes = np.empty(self.tensors[0].shape, dtype=np.uint8)
        scales = np.empty(self.tensors[1].shape, dtype=self.tensors[1].dtype)
        start = 0
        for values in self.weight.chunks():
            rows = slice(start, start := start + len(values))
            scales[rows] = float8_scale(np.abs(self._checked(values)).max(axis=1), scales.dtype)
            steps: Floats = scales[rows, None].astype(np.float32)
            codes[:, rows] = as_float8(values / steps).view(np.uint8).T
        if not np.isfinite(scales).all():
            raise ExportError(f"expected weights whose scales fit into {scales.dtype}, got larger ones in {self.path}")
        self.lossless = False
        yield 0, codes.view(FLOAT8)
        yield 1, scales


def float8_scale(largest: Floats, dtype: np.dtype) -> np.ndarray:
    """What float8's numbers are multiplied by to reach magnitudes up to `largest`.

    Never a subnormal number of `dtype`, which have few bits, and which devices may take for 0: smaller values than that
    use the lower end of float8's range, where it is as exact.
    """
    return np.maximum(np.asarray(largest) / HIGHEST_FLOAT8, np.finfo(dtype).smallest_normal).astype(dtype)


def as_float8(values: Floats) -> np.ndarray:
    """Rounded to the nearest float8 e4m3fn, ties to even, beyond its range to its largest; NaN stays NaN."""
    import torch  # twice as fast as ml_dtypes

    held = torch.from_numpy(np.ascontiguousarray(values)).clamp(-HIGHEST_FLOAT8, HIGHEST_FLOAT8)
    codes: np.ndarray = held.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    rounded: np.ndarray = codes.view(FLOAT8)
    return rounded


class Int4Encoding(Encoding):
    """Numbers in 4 bits, two to a byte, as MatMulNBits takes them, and one float16 scale for each `BLOCK` of a row.

    The number of a block that lies farthest from 0 becomes -8 and is kept exactly; rounding is to nearest.
    """

    def __init__(self, path: str, weight: Weight, *, name: str, scale_name: str) -> None:
        out, width = weight.shape
        blocks = -(-width // BLOCK)
        super().__init__(
            path,
            weight,
            (
                Stored(name=name, dtype=np.dtype(np.uint8), shape=(out, blocks, BLOCK // 2)),
                Stored(name=scale_name, dtype=FLOATS["float16"], shape=(out, blocks)),
            ),
        )

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        self.lossless = False
        scales = []
        for values in self.weight.chunks():
            numbers, scale = _four_bits(self._checked(values), self.path)
            scales.append(scale)
            yield 0, numbers
        yield 1, np.concatenate(scales)


def _four_bits(values: Floats, path: str) -> tuple[np.ndarray, np.ndarray]:
    """[rows, width] to numbers uint8 [rows, blocks, BLOCK / 2] and scales float16 [rows, blocks]."""
    import torch

    rows, width = values.shape
    blocks = -(-width // BLOCK)
    padded = torch.nn.functional.pad(torch.from_numpy(values), (0, blocks * BLOCK - width)).view(rows, blocks, BLOCK)
    low, high = padded.aminmax(dim=2)
    scale = (torch.where(high > -low, high, low) / -8).to(torch.float16)
    if not bool(torch.isfinite(scale).all()):
        raise ExportError(f"expected weights whose scales fit into float16, got up to {high.max()} in {path}")
    step = scale.to(torch.float32)
    inverse = torch.where(step == 0, 0.0, 1.0 / step)  # a block of zeros stays one
    numbers = (padded * inverse[:, :, None]).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    packed = numbers[:, :, 0::2] | (numbers[:, :, 1::2] << 4)
    return packed.numpy(), scale.numpy()


def as_four_bits(values: Floats) -> Floats:
    """What is left of float32 [rows, width] once its numbers have 4 bits."""
    numbers, scales = _four_bits(values, "a weight")
    both = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*scales.shape, BLOCK).astype(np.float32)
    whole: Floats = ((both - 8) * scales[..., None].astype(np.float32)).reshape(len(values), -1)
    return whole[:, : values.shape[1]]
