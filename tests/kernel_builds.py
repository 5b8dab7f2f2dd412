"""The kernels' builds as parameters of tests. The host's is skipped only where there is no C++ compiler.

"cuda_on_host" is the device's: the same launch wrappers, and the same kernels compiled by g++, see host_device.py. It
shows everything but what only a real device does, so that each test over `BUILDS` also runs on "cuda", marked `gpu`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from host_device import HostDriver

from segzero_rt.device import Device
from segzero_rt.kernels import backend
from segzero_rt.kernels.backend import Kernels, resolve_kernels
from segzero_rt.kernels.build import build_once, cache_folder, compiled, find_compiler, installed_module
from segzero_rt.kernels.device_kernels import DeviceKernels
from segzero_rt.kernels.sources import source_digest

TESTS = Path(__file__).resolve().parent
ON_HOST = "cuda_on_host"
NEEDS_COMPILER = pytest.mark.skipif(
    find_compiler() is None and installed_module() is None, reason="there is no C++ compiler (g++, c++ or CXX)"
)
ONLY_COMPILER = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler (g++, c++ or CXX)")
DEVICE_BUILDS = [pytest.param(ON_HOST, marks=ONLY_COMPILER), pytest.param("cuda", marks=pytest.mark.gpu)]
BUILDS = [pytest.param("reference"), pytest.param("host", marks=NEEDS_COMPILER), *DEVICE_BUILDS]
COMPILED_BUILDS = BUILDS[1:]
"""To be held to the reference."""
_FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def kernel_build(name: str) -> Kernels:
    """The build of that name, "cuda_on_host" too."""
    return device_on_host() if name == ON_HOST else resolve_kernels(name)


@functools.cache
def device_on_host() -> Kernels:
    """A device's build on the host; compiled once per state of the sources."""
    return Kernels(name="cuda", detail="compiled by g++, for tests", device=kernels_on(Device(HostDriver())))


def kernels_on(device: Device) -> DeviceKernels:
    """The kernels compiled by g++ on a device in host memory."""
    return DeviceKernels(device, code=lambda source: str(_library()).encode())


@functools.cache
def _library() -> Path:
    compiler = find_compiler()
    assert compiler is not None
    digest = hashlib.sha256(repr((_FLAGS, compiler, source_digest())).encode())
    for name in ("cuda_on_host.hpp", "kernels_on_host.cpp"):
        digest.update((TESTS / name).read_bytes())
    command = [compiler, *_FLAGS, "-shared", str(TESTS / "kernels_on_host.cpp")]
    target = cache_folder() / f"kernels_on_host_{digest.hexdigest()[:24]}.so"
    return build_once(target, compiler, lambda built: compiled([*command, "-o", str(built)]))


def forget_choice() -> None:
    """Lets this process choose its build of the kernels anew."""
    backend.chosen_kernels.cache_clear()
    backend.answer_reader.cache_clear()
    backend._ready_device.cache_clear()


@contextmanager
def forced_kernels(name: str) -> Iterator[None]:
    """Within it, this process uses the build of that name."""
    with pytest.MonkeyPatch.context() as patch:
        if name == ON_HOST:
            patch.setattr(backend, "open_device", device_on_host)
        patch.setenv(backend.KERNELS_VARIABLE, "cuda" if name == ON_HOST else name)
        forget_choice()
        yield
    forget_choice()
