"""What the preflight reads of a machine, on recorded files and a driver that answers as recorded devices do."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from segzero_rt.errors import BackendError
from segzero_rt.preflight.gpu import Gpu, read_gpus
from segzero_rt.preflight.machine import parse_driver, parse_infer_version, parse_jetpack, read_machine

# First lines of the file on an Orin Nano and a Thor developer kit, and the boards' names in their device trees.
ORIN_RELEASE = (
    "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, DATE: Thu Sep 18 22:54:44"
)
THOR_RELEASE = (
    "# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic, EABI: aarch64, DATE: Wed Dec 31 00:15:19"
)
ORIN_MODEL = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug 16 21:39:15 UTC 2024\nGCC version: 12\n"
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
UUID = "0011223344556677-8899aabbccddeeff".replace("-", "")


class Driver:
    """libcuda and NVML as far as the preflight asks them; `status` is what `cuInit` says."""

    def __init__(self, *gpus: Gpu, status: int = 0, cuda: int = 12060) -> None:
        self.gpus, self.status, self.cuda = gpus, status, cuda

    def __call__(self, name: str) -> Driver:
        if name == "libcuda.so.1" or (name == "libnvidia-ml.so.1" and not self.gpus[0].integrated):
            return self
        raise OSError(f"{name}: cannot open shared object file")

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.cuda
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = self.gpus[device.value].name.encode()
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: Any) -> int:
        out._obj.value = self.gpus[device.value].memory_bytes
        return 0

    def cuDeviceGetUuid(self, out: Any, device: Any) -> int:
        out[:] = bytes.fromhex(UUID)
        return 0

    def cuDeviceGetAttribute(self, out: Any, number: int, device: Any) -> int:
        gpu = self.gpus[device.value]
        major, minor = gpu.capability.split(".")
        out._obj.value = {75: int(major), 76: int(minor), 18: gpu.integrated, 16: gpu.multiprocessors}[number]
        return 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, out: Any) -> int:
        out._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, out: Any) -> int:
        out._obj.value = index + 1
        return 0

    def nvmlDeviceGetUUID(self, device: Any, out: Any, size: int) -> int:
        out.value = f"GPU-{UUID[:8]}-{UUID[8:12]}-{UUID[12:16]}-{UUID[16:20]}-{UUID[20:]}".encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: Any, out: Any) -> int:
        out._obj.free = self.gpus[device.value - 1].free_bytes or 0
        return 0


ADA = Gpu(
    name="NVIDIA RTX 4090",
    capability="8.9",
    multiprocessors=128,
    memory_bytes=24 << 30,
    integrated=False,
    free_bytes=20 << 30,
)
ORIN = Gpu(name="Orin", capability="8.7", multiprocessors=8, memory_bytes=8 << 30, integrated=True)


def no_driver(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file: No such file or directory")


def none_installed(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def recorded(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_jetson_is_read(tmp_path: Path) -> None:
    files = {
        "etc/nv_tegra_release": f"{ORIN_RELEASE}\n# KERNEL_VARIANT: oot\n",
        "proc/device-tree/model": ORIN_MODEL,
        "proc/meminfo": "MemTotal:        7802824 kB\nMemFree:          999999 kB\nMemAvailable:    5242880 kB\n",
    }
    machine = read_machine(
        recorded(tmp_path, files), load=Driver(ORIN), version_of=none_installed, architecture="aarch64"
    )
    assert str(machine.jetpack) == "JetPack 6, Jetson Linux 36.4.7"
    assert machine.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert machine.gpus == (ORIN,) and machine.cuda == "12.6"
    assert machine.memory_bytes == 7802824 * 1024
    assert machine.gpu_free_bytes == machine.memory_available_bytes == 5 << 30, "it shares the system's memory"
    assert machine.driver is None and machine.tensorrt == {}


def test_a_workstation_is_read(tmp_path: Path) -> None:
    files = {"proc/driver/nvidia/version": DRIVER, "proc/meminfo": "MemTotal: 1024 kB\nMemAvailable: 512 kB\n"}
    versions = {"tensorrt-cu13": "11.4.0.106", "tensorrt-rtx-cu13": "1.7.1.116"}

    def version_of(name: str) -> str:
        return versions[name] if name in versions else none_installed(name)

    machine = read_machine(recorded(tmp_path, files), load=Driver(ADA, cuda=13000), version_of=version_of)
    assert machine.gpus == (ADA,) and machine.gpu_free_bytes == 20 << 30
    assert machine.driver == "560.35.03" and machine.cuda == "13.0"
    assert machine.tensorrt == {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}
    assert machine.model is None and machine.jetpack is None


def test_an_empty_machine_is_read(tmp_path: Path) -> None:
    machine = read_machine(tmp_path, load=no_driver, version_of=none_installed)
    assert machine.gpus == () and machine.gpu_free_bytes is None and machine.memory_available_bytes is None
    assert machine.model is None and machine.driver is None and machine.cuda is None and machine.gpu_problem is None


def test_jetpacks_own_tensorrt_is_asked_for_its_version(tmp_path: Path) -> None:
    """Its Python module belongs to the system's interpreter; in a virtual environment there is the library alone."""

    class Infer:
        def getInferLibVersion(self) -> int:
            return 100300

    def load(name: str) -> Any:
        return Infer() if name == "libnvinfer.so.10" else no_driver(name)

    assert read_machine(tmp_path, load=load, version_of=none_installed).tensorrt == {"tensorrt": "10.3.0"}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param(100, (), id="no-device"),
        pytest.param(803, None, id="driver-that-does-not-fit-its-kernel"),
    ],
)
def test_a_driver_that_has_nothing_to_say(status: int, expected: tuple[Gpu, ...] | None, tmp_path: Path) -> None:
    driver = Driver(ADA, status=status)
    if expected is not None:
        assert read_gpus(driver) == expected
        return
    with pytest.raises(BackendError, match="cuInit says 803"):
        read_gpus(driver)
    machine = read_machine(tmp_path, load=driver, version_of=none_installed)
    assert machine.gpus == () and "803" in (machine.gpu_problem or "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(ORIN_RELEASE, "JetPack 6, Jetson Linux 36.4.7", id="orin"),
        pytest.param(THOR_RELEASE, "JetPack 7, Jetson Linux 38.4.0", id="thor"),
        pytest.param("# R35 (release), REVISION: 3.1, GCID: 32827747", "JetPack 5, Jetson Linux 35.3.1", id="xavier"),
        pytest.param("# R99 (release), REVISION: 1.0", "JetPack, Jetson Linux 99.1.0", id="not-known-yet"),
        pytest.param("", "None", id="empty"),
        pytest.param("# something else", "None", id="another-text"),
    ],
)
def test_jetpack_is_told_from_jetson_linux(text: str, expected: str) -> None:
    assert str(parse_jetpack(text)) == expected
    assert parse_jetpack(None) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [(DRIVER, "560.35.03"), (OPEN_DRIVER, "580.65.06"), ("", None), ("NVRM version: none\n", None), (None, None)],
    ids=["closed", "open", "empty", "no-number", "absent"],
)
def test_the_driver_is_told_from_its_kernel_module(text: str | None, expected: str | None) -> None:
    assert parse_driver(text) == expected


@pytest.mark.parametrize(
    ("number", "expected"), [(100300, "10.3.0"), (101501, "10.15.1"), (110401, "11.4.1"), (8601, "8.6.1")]
)
def test_tensorrt_numbers(number: int, expected: str) -> None:
    assert parse_infer_version(number) == expected
