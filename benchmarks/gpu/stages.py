"""The stages of the GPU check: what each measures or makes, in steps that run in a process of their own.

A step names a function of this package that takes a `Context` and returns figures as plain JSON types. What it expects
in minutes is for one datacentre GPU; a step begins only where so much of the call's time is left, and is ended when the
time is over. Finished steps are not run again (`running.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import GpuCheckError

DEVICES = ("cuda", "cpu")
SIZES = ("full", "tiny")

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What every step is told."""

    device: str
    """One of `DEVICES`."""
    size: str
    """"full" is what the tables ask for; "tiny" runs the same code in seconds, on any machine."""
    work: Path
    """Folder that stays from call to call: what was carried, installed and built."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES or self.size not in SIZES:
            raise GpuCheckError(
                f"expected a device of {', '.join(DEVICES)} and a size of {', '.join(SIZES)}, got {self.device} and "
                f"{self.size}"
            )

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def site(self) -> Path:
        """Where carried packages are installed; first on the path of every step."""
        return self.work / "site"

    @property
    def kept(self) -> Path:
        """Where pieces are kept."""
        return self.work / "pieces"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A part of a stage in a process of its own."""

    name: str
    function: str
    """"module:function" of this package, or "module:function:argument"."""
    minutes: float
    """Expected at full size."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 9:
            raise GpuCheckError(f"expected a step {self.name} of up to 9 minutes, got {self.minutes}; part it")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Steps with one result file."""

    name: str
    what: str
    steps: tuple[Step, ...]
    carried: tuple[str, ...] = ()
    """Beginnings of the names of carried files that it needs."""

    @property
    def minutes(self) -> float:
        return sum(step.minutes for step in self.steps)


_PYCUDA, _RUNTIME = "pycuda", "onnxruntime"


def _policy(name: str, like: str, graphs_minutes: float, minutes: float) -> Stage:
    """The stage of one published shape."""
    return Stage(
        name=name,
        what=f"{like}, random weights: PyTorch eager and compiled beside ONNX Runtime",
        carried=(_RUNTIME,),
        steps=(
            Step(name="graphs", function=f"policy:graphs:{like}", minutes=graphs_minutes),
            Step(name="pytorch eager", function=f"policy_pytorch:eager:{like}", minutes=minutes),
            Step(name="onnxruntime", function=f"policy_onnx:onnxruntime:{like}", minutes=minutes),
            Step(name="onnxruntime replayed", function=f"policy_onnx:onnxruntime:{like}:replay", minutes=minutes),
            Step(name="pytorch compiled", function=f"policy_pytorch:compiled:{like}", minutes=minutes + 1),
        ),
    )


STAGES: tuple[Stage, ...] = (
    Stage(
        name="install",
        what="puts carried files together, checks them and installs the packages among them",
        steps=(Step(name="packages", function="install:packages", minutes=4),),
    ),
    Stage(
        name="build",
        what="compiles the kernels for the processor and for the device present",
        carried=(_PYCUDA,),
        steps=(
            Step(name="host kernels", function="build:host_kernels", minutes=1),
            Step(name="device kernels", function="build:device_kernels", minutes=2),
        ),
    ),
    Stage(
        name="tests",
        what="runs the tests that are marked `gpu`",
        carried=(_PYCUDA, _RUNTIME),
        steps=(Step(name="gpu tests", function="marked_tests:run", minutes=5),),
    ),
    Stage(
        name="peaks",
        what="measures the memory's bandwidth and the rate of large products by type",
        steps=(Step(name="peaks", function="roofline:measure", minutes=0.5),),
    ),
    Stage(
        name="kernels",
        what="parser, masks, frames and tokens on the device: time, share of the bandwidth, the host's results",
        carried=(_PYCUDA, "model_outputs"),
        steps=(
            Step(name="parser, many replies", function="kernels_parser:many", minutes=0.5),
            Step(name="parser, one reply", function="kernels_parser:one", minutes=0.5),
            Step(name="parser, calls from Python", function="kernels_parser:batches", minutes=0.5),
            Step(name="parser, mutants", function="kernels_parser:fuzz", minutes=1),
            Step(name="masks", function="kernels_pictures:masks", minutes=0.5),
            Step(name="frames", function="kernels_pictures:frames", minutes=0.5),
            Step(name="tokens", function="kernels_tokens:measure", minutes=0.5),
        ),
    ),
    Stage(
        name="questions",
        what="questions from frame to masks on the device: host waits per token and per question, time",
        carried=(_PYCUDA, _RUNTIME, "bundle"),
        steps=(
            Step(name="cuda", function="resident:questions:cuda", minutes=0.5),
            Step(name="cuda replayed", function="resident:questions:cuda:replay", minutes=0.5),
        ),
    ),
    Stage(
        name="segmenter",
        what="SAM 2.1 large: PyTorch eager and compiled beside ONNX Runtime",
        carried=(_RUNTIME,),
        steps=(
            Step(name="graphs", function="segmenter:graphs", minutes=1),
            Step(name="pytorch eager", function="segmenter:eager", minutes=0.5),
            Step(name="onnxruntime", function="segmenter:onnxruntime", minutes=0.5),
            Step(name="onnxruntime replayed", function="segmenter:onnxruntime:replay", minutes=0.5),
            Step(name="pytorch compiled", function="segmenter:compiled", minutes=2),
        ),
    ),
    _policy("policy-3b", "qwen2.5-vl-3b", 2, 1),
    Stage(
        name="shipped",
        what="`segzero bench` of the small pair, in ONNX Runtime's CUDA provider and in engines where TensorRT is",
        carried=(_RUNTIME, "bundle"),
        steps=(
            Step(name="cuda, carried bundle", function="shipped:measure:cuda:carried", minutes=1.5),
            Step(name="cuda", function="shipped:measure:cuda", minutes=1.5),
            Step(name="engines", function="build:engines", minutes=4),
            Step(name="tensorrt", function="shipped:measure:tensorrt", minutes=1.5),
            Step(name="tensorrt, resident", function="resident:questions:tensorrt", minutes=0.5),
            Step(name="tensorrt-rtx", function="shipped:measure:tensorrt-rtx", minutes=1.5),
            Step(name="tensorrt-rtx, resident", function="resident:questions:tensorrt-rtx", minutes=0.5),
        ),
    ),
    _policy("policy-7b", "qwen2.5-vl-7b", 4, 1.5),
)


def choose(names: Sequence[str]) -> tuple[Stage, ...]:
    """Stages by name in their order; all where none is named.

    Raises:
        GpuCheckError: there is no such stage.
    """
    known = {stage.name for stage in STAGES}
    if unknown := [name for name in names if name not in known]:
        raise GpuCheckError(f"expected stages of {', '.join(stage.name for stage in STAGES)}, got {unknown[0]!r}")
    return tuple(stage for stage in STAGES if not names or stage.name in names)


def bind(step: Step, context: Context) -> Callable[[], Figures]:
    """What a step runs; imports its module."""
    module, name, *arguments = step.function.split(":")
    function = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)
    return lambda: function(context, *arguments)  # type: ignore[no-any-return]
