"""Times of kernels without the host's part: a run of them recorded as a CUDA graph and replayed.

A launch from Python takes longer than a small kernel. Recorded, kernels follow each other on the device alone; what is
left between two of them (a microsecond or so) counts with the kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from segzero_rt.device import Device

_WARM_UPS = 3
_HOST = 0
"""The stream of a device that is the host's memory, as tests have it: nothing can be recorded there."""


def seconds_each_run(device: Device, enqueue: Callable[[int], None], *, runs: int, rounds: int) -> list[float]:
    """Seconds of one run on the device, of each round.

    Args:
        device: whose stream the work is put on; it must not be waited for, nor asked for memory, while that is done.
        enqueue: puts run number i on the stream, i from 0 to `runs`, so that runs may take turns among inputs.
        runs: of one recording.
        rounds: replays that count.
    """

    def everything() -> None:
        for index in range(runs):
            enqueue(index)

    everything()  # compiles, loads and allocates what it needs
    device.synchronize()
    replay = everything if device.stream_handle == _HOST else _recorded(device, everything)
    seconds = []
    for _ in range(_WARM_UPS + rounds):
        start = time.perf_counter()
        before = device.record()
        replay()
        after = device.record()
        device.synchronize()
        elapsed = time.perf_counter() - start
        if device.stream_handle != _HOST:
            elapsed = device.elapsed_ms(before, after) / 1e3
        seconds.append(elapsed / runs)
    return seconds[_WARM_UPS:]


def median_run(device: Device, enqueue: Callable[[int], None], *, runs: int, rounds: int) -> float:
    """The median of `seconds_each_run`."""
    return statistics.median(seconds_each_run(device, enqueue, runs=runs, rounds=rounds))


def _recorded(device: Device, work: Callable[[], None]) -> Callable[[], None]:
    """What replays the work, on the same stream."""
    import torch

    stream: Any = torch.cuda.ExternalStream(device.stream_handle)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"), device.current():
        work()

    def replay() -> None:
        with torch.cuda.stream(stream):
            graph.replay()

    return replay
