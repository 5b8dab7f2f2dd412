"""What the manifest says of an engine: what it was built from, by what, for what, and whether it was ever run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segzero_rt.errors import BundleError

TARGETS = ("tensorrt", "tensorrt-rtx")
"""Libraries that engines are built with; also the names of the backends that run them."""

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]
"""Smallest, most usual and largest shape of an input."""


def platform_name() -> str:
    """Operating system and architecture of this machine, such as "linux-aarch64"."""
    return f"{platform.system()}-{platform.machine()}".lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileRecord:
    """One optimisation profile: the shapes that an engine serves, and is fastest at."""

    name: str
    """What it is for, such as "prefill" or "decode"."""
    shapes: Mapping[str, ShapeRange]
    """Every input with a dynamic axis."""

    def __post_init__(self) -> None:
        for tensor, (least, usual, most) in self.shapes.items():
            ordered = len(least) == len(usual) == len(most) and all(
                0 <= low <= middle <= high for low, middle, high in zip(least, usual, most, strict=True)
            )
            if not ordered:
                raise BundleError(
                    f"manifest.json: profile {self.name}: expected least <= usual <= most of {tensor}, "
                    f"got {least}, {usual}, {most}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """One engine of a bundle."""

    file: str
    """Path inside the bundle; its size and hash stand among the manifest's files."""
    graph: str
    """Path inside the bundle of the ONNX graph that it was built from."""
    graph_sha256: str
    """Of that graph and of the weights beside it; see `graph_digest`."""
    target: str
    """One of `TARGETS`."""
    library_version: str
    compute_capabilities: tuple[str, ...]
    """Devices that it was built for, such as "8.7"; empty where it serves every device that the library knows."""
    platform: str
    """`platform_name` of where it was built."""
    options: Mapping[str, Any]
    """`BuildOptions` that differ from engine to engine."""
    profiles: tuple[ProfileRecord, ...]
    precisions: Mapping[str, int]
    """Layers of the parsed network by the type that they compute in."""
    gate: Mapping[str, Any]
    """`status` and figures of the comparison with ONNX Runtime; `not_run` where the engine could not be run."""
    build_seconds: float

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BundleError(
                f"manifest.json: engines: expected a target of {', '.join(TARGETS)}, got {self.target[:40]!r}; "
                "a newer segzero-rt may know it"
            )
        if not self.profiles:
            raise BundleError(f"manifest.json: engines: expected at least one profile of {self.graph}, got none")

    def replaces(self, other: EngineRecord) -> bool:
        """Whether both are for the same place, so that only the newer one is kept."""
        place = (other.graph, other.target, other.compute_capabilities, other.platform)
        return (self.graph, self.target, self.compute_capabilities, self.platform) == place

    def same_build(self, other: EngineRecord) -> bool:
        """Whether building again would give what is there: same graph, library, device, options and profiles."""
        mine = (self.graph_sha256, self.library_version, dict(self.options), self.profiles)
        return self.replaces(other) and mine == (
            *(other.graph_sha256, other.library_version),
            *(dict(other.options), other.profiles),
        )
