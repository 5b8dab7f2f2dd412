"""Times on the device: events around the work where there is a GPU, the host's clock elsewhere. Medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

_WARM_UPS = 3


class Clock:
    """Times one call on a device.

    Args:
        device: "cuda" or "cpu".
        stream: the driver's number of the stream that the work is put on; PyTorch's current one by default.
    """

    def __init__(self, device: str, stream: int | None = None) -> None:
        self._cuda = device == "cuda"
        self._stream = stream

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds of one call, all that it started on the stream included."""
        if not self._cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        import torch

        stream: Any = torch.cuda.current_stream()
        if self._stream is not None:
            stream = torch.cuda.ExternalStream(self._stream)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def seconds_each(clock: Clock, call: Callable[[], object], rounds: int) -> float:
    """Median seconds of a call, after some that do not count."""
    return statistics.median(all_seconds(clock, call, rounds))


def all_seconds(clock: Clock, call: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each call, after some that do not count."""
    for _ in range(_WARM_UPS):
        clock(call)
    return [clock(call) for _ in range(rounds)]
