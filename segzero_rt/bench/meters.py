"""Energy and device memory while something runs, from whatever the machine offers; nothing where it tells nothing.

NVML (NVIDIA's driver) counts millijoules and tells memory in use; Jetsons have `tegrastats` instead, which prints the
module's power; Intel and AMD processors count microjoules in `/sys/class/powercap`, often for root alone.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from segzero_rt.preflight.gpu import Loader

_NVML = "libnvidia-ml.so.1"
_POWERCAP = Path("/sys/class/powercap")
_SAMPLE_S = 0.05
_TEGRASTATS_MS = 100

Counter = Callable[[], float]
"""Joules since some moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a `Meter` saw."""

    joules: dict[str, float]
    """By source: "nvml", "tegrastats" (the whole module), "rapl" (the processor's packages)."""
    device_peak_bytes: int | None
    """Most memory in use on the first device, all processes together."""

    def to_json(self, num_questions: int) -> dict[str, Any]:
        per_question = {name: joules / num_questions for name, joules in self.joules.items()}
        return {"joules_per_question": per_question or None, "device_peak_memory_bytes": self.device_peak_bytes}


class Meter:
    """Measures while it is entered; `reading` afterwards. Counts what else the machine does as well."""

    def __init__(self, *, load: Loader = ctypes.CDLL, powercap: Path = _POWERCAP) -> None:
        self._nvml = _Nvml.open(load)
        self._counters: dict[str, Counter] = {}
        if self._nvml is not None and self._nvml.energy_j() is not None:
            nvml = self._nvml
            self._counters["nvml"] = lambda: nvml.energy_j() or 0.0
        if zones := readable_zones(powercap):
            self._counters["rapl"] = lambda: sum(zone_joules(zone) for zone in zones)
        self._tegrastats = shutil.which("tegrastats")
        self.reading = Reading(joules={}, device_peak_bytes=None)

    def __enter__(self) -> Meter:
        self._before = {name: read() for name, read in self._counters.items()}
        self._peak_bytes: int | None = None
        self._watts: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._sample_memory, daemon=True)] if self._nvml else []
        self._process: subprocess.Popen[str] | None = None
        if self._tegrastats:
            command = [self._tegrastats, "--interval", str(_TEGRASTATS_MS)]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._threads.append(threading.Thread(target=self._read_power, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        for thread in self._threads:
            thread.join()
        # A counter that has run over its end says less than before; its figure would be wrong, so there is none.
        joules = {name: read() - self._before[name] for name, read in self._counters.items()}
        joules = {name: value for name, value in joules.items() if value >= 0}
        if len(self._watts) > 1:
            joules["tegrastats"] = integrate(self._watts)
        self.reading = Reading(joules=joules, device_peak_bytes=self._peak_bytes)

    def _sample_memory(self) -> None:
        assert self._nvml is not None, "started with NVML alone"
        while not self._stop.wait(_SAMPLE_S):
            used = self._nvml.used_bytes()
            self._peak_bytes = used if used is None else max(self._peak_bytes or 0, used)

    def _read_power(self) -> None:
        assert self._process is not None and self._process.stdout is not None, "started with tegrastats alone"
        for line in self._process.stdout:
            if (watts := tegrastats_watts(line)) is not None:
                self._watts.append((time.monotonic(), watts))


def integrate(watts: list[tuple[float, float]]) -> float:
    """Joules under (second, watt) samples, by trapezoids."""
    return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in itertools.pairwise(watts))


def tegrastats_watts(line: str) -> float | None:
    """The module's power in a line of `tegrastats`; None where it has none.

    Orin and Thor print `VDD_IN 5123mW/5040mW` (now / mean), AGX Orin the rails that add up to it, as JetPack 4 did
    without a unit: `VDD_IN 5123/5040`.
    """
    rails = {
        name: float(now) for name, now in re.findall(r"\b(VDD_\w+|VIN_SYS_5V0|POM_5V_IN|VIN) (\d+)(?:mW)?/\d+", line)
    }
    for whole in ("VDD_IN", "POM_5V_IN", "VIN"):
        if whole in rails:
            return rails[whole] / 1e3
    return sum(rails.values()) / 1e3 if rails else None


def readable_zones(powercap: Path) -> list[Path]:
    """Packages whose energy this user may read; their parts are in them already."""
    zones = []
    for zone in sorted(powercap.glob("*-rapl:*")):
        if zone.name.count(":") == 1:
            try:
                zone_joules(zone)
            except (OSError, ValueError):
                continue
            zones.append(zone)
    return zones


def zone_joules(zone: Path) -> float:
    """The counter of one package."""
    return int((zone / "energy_uj").read_text(encoding="ascii")) / 1e6


class _Nvml:
    """The first device, through the driver's library."""

    class _Memory(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    def __init__(self, library: Any, device: ctypes.c_void_p) -> None:
        self._library, self._device = library, device

    @classmethod
    def open(cls, load: Loader) -> _Nvml | None:
        try:
            library = load(_NVML)
        except OSError:
            return None
        device = ctypes.c_void_p()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
            return None
        return cls(library, device)

    def energy_j(self) -> float | None:
        """None where the device does not count (before Volta)."""
        millijoules = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(millijoules))
        return None if failed else millijoules.value / 1e3

    def used_bytes(self) -> int | None:
        memory = self._Memory()
        failed = self._library.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory))
        return None if failed else int(memory.used)
