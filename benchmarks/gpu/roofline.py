"""What the device can do at most, measured on the spot, and how much of that a measurement reached.

A ceiling is the larger of two times: the bytes that must move (each input read once, each output written once) over the
bandwidth of a large copy, and the operations over the rate of a large product of the same type.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from segzero_rt.commands.output_files import write_text

from .errors import GpuCheckError
from .stages import Context, Figures
from .timing import Clock, seconds_each

FILE = "peaks.json"
_COPY_BYTES = {"full": 4 << 30, "tiny": 8 << 20}
_SIDE = {"full": 8192, "tiny": 256}
_SIDE_FLOAT32 = {"full": 4096, "tiny": 256}
"""Products in plain float32 are twenty times slower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """Of one device."""

    bytes_per_second: float
    flops: dict[str, float] = field(default_factory=dict)
    """By type: "bfloat16", "float16", "float32", "tf32"."""

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0 or not all(rate > 0 for rate in self.flops.values()):
            raise GpuCheckError("expected positive rates, got others; measure the peaks again")

    def floor_s(self, num_bytes: float, operations: float = 0.0, dtype: str = "bfloat16") -> float:
        """Seconds that nothing can be below."""
        return max(num_bytes / self.bytes_per_second, operations / self.flops[dtype] if operations else 0.0)

    def reached(self, seconds: float, num_bytes: float, operations: float = 0.0, dtype: str = "bfloat16") -> Figures:
        """A measured time beside its ceiling.

        Returns:
            `floor_ms`, `share_of_ceiling` in [0, 1] but for what a cache gives, `bound_by`, `bytes_per_second` and
            `share_of_bandwidth`.

        Raises:
            GpuCheckError: no positive time.
        """
        if not seconds > 0:
            raise GpuCheckError(f"expected a time above 0, got {seconds}; measure again")
        floor = self.floor_s(num_bytes, operations, dtype)
        return {
            "milliseconds": seconds * 1e3,
            "floor_ms": floor * 1e3,
            "share_of_ceiling": floor / seconds,
            "bound_by": "arithmetic" if floor > num_bytes / self.bytes_per_second else "bandwidth",
            "counted_bytes": num_bytes,
            "bytes_per_second": num_bytes / seconds,
            "share_of_bandwidth": num_bytes / seconds / self.bytes_per_second,
        }


def measure(context: Context) -> Figures:
    """Bandwidth and rates of this device, kept for the other stages."""

    clock = Clock(context.device)
    count = _COPY_BYTES[context.size]
    rounds = 3 if context.tiny else 20
    copy_s = _copy_s(context, clock, count, rounds)
    flops = {dtype: _rate(context, clock, dtype, rounds) for dtype in ("bfloat16", "float16", "tf32", "float32")}
    peaks = Peaks(bytes_per_second=2 * count / copy_s, flops=flops)
    document = {"bytes_per_second": peaks.bytes_per_second, "flops": peaks.flops}
    write_text(context.work / FILE, json.dumps({"device": context.device, "size": context.size, **document}))
    return {**document, "copied_bytes": count, "product_side": _SIDE[context.size]}


def read_peaks(context: Context) -> Peaks:
    """The peaks of an earlier step on this device; measured now where there are none."""
    path = context.work / FILE
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        if (document["device"], document["size"]) == (context.device, context.size):
            return Peaks(bytes_per_second=document["bytes_per_second"], flops=document["flops"])
    document = measure(context)
    return Peaks(bytes_per_second=document["bytes_per_second"], flops=document["flops"])


def _copy_s(context: Context, clock: Clock, count: int, rounds: int) -> float:
    import torch

    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return seconds_each(clock, lambda: target.copy_(source), rounds)


def _rate(context: Context, clock: Clock, dtype: str, rounds: int) -> float:
    """Operations per second of a square product, on random numbers: zeros run faster than real data will."""
    import torch

    real: Any = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    side = (_SIDE_FLOAT32 if dtype == "float32" else _SIDE)[context.size]
    left, right = (torch.randn(side, side, device=context.device).to(real) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        return 2 * side**3 / seconds_each(clock, lambda: left @ right, rounds)
    finally:
        torch.set_float32_matmul_precision(before)
