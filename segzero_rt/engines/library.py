"""TensorRT (10.3 and later, 11) and TensorRT-RTX behind one door: found by name, asked what they can do.

What a library can do is read from the names that it has, never from its version: JetPack 6 stays at 10.3, an RTX
workstation counts from 1, and names were added and taken away between. Versions are recorded, not compared.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from segzero_rt.engines.record import TARGETS
from segzero_rt.errors import BackendError

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
HARDWARE_LEVELS = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
"""Names on the command line to names in the library."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One of the two libraries, as it is installed here."""

    target: str
    """One of `TARGETS`."""
    module: Any
    """The Python module; its names are the same in both, as far as they exist."""

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def builds_ahead(self) -> bool:
        """Builds for devices that are not here, and therefore times no kernels: TensorRT-RTX alone, since 1.0."""
        return hasattr(self.module.IBuilderConfig, "set_compute_capability")

    @property
    def has_timing_cache(self) -> bool:
        """TensorRT-RTX has the calls still, and warns that they do nothing."""
        return not self.builds_ahead

    @property
    def hardware_levels(self) -> tuple[str, ...]:
        """Names of `HARDWARE_LEVELS` that are there; 10.3 has "ampere-plus" alone."""
        level = self.module.HardwareCompatibilityLevel
        return tuple(name for name, member in HARDWARE_LEVELS.items() if hasattr(level, member))

    @property
    def has_attention(self) -> bool:
        """Knows an attention layer (10.14), which refuses float32 unless it may be taken apart."""
        return hasattr(self.module.LayerType, "ATTENTION_INPUT")

    @property
    def tells_validity(self) -> bool:
        """Says of a file, before it is loaded, whether it would run on this device: TensorRT-RTX."""
        return hasattr(self.module.Runtime, "get_engine_validity")

    def capability_names(self) -> tuple[str, ...]:
        """Compute capabilities that can be built for by name, such as "8.9"; empty where there is no choice."""
        if not self.builds_ahead:
            return ()
        members = [name for name in dir(self.module.ComputeCapability) if name.startswith("SM") and name[2:].isdigit()]
        return tuple(f"{name[2:-1]}.{name[-1]}" for name in sorted(members, key=lambda name: int(name[2:])))

    def __str__(self) -> str:
        return f"{self.target} {self.version}"


def find_library(target: str) -> Library:
    """Imports the library of a target.

    Raises:
        BackendError: unknown target, or its library is not installed or lacks its own shared objects.
    """
    if target not in TARGETS:
        raise BackendError(f"expected a target of {', '.join(TARGETS)}, got {target[:40]!r}")
    try:
        module = importlib.import_module(_MODULES[target])
        missing = [name for name in ("Builder", "OnnxParser", "IBuilderConfig") if not hasattr(module, name)]
    except (ImportError, OSError, RuntimeError) as error:  # its wheels raise all three where a shared object is missing
        reason = " ".join(str(error).split())[:200]
        raise BackendError(
            f"expected {_MODULES[target]} for target {target}, which cannot be loaded: {reason}; "
            f"install segzero-rt[{target}], or on a Jetson JetPack's own packages"
        ) from error
    if missing:
        raise BackendError(
            f"expected the full {_MODULES[target]}, got one without {', '.join(missing)}; "
            f"install segzero-rt[{target}] instead of its lean or dispatch runtime"
        )
    return Library(target=target, module=module)


class Complaints:
    """What a library's logger heard, by severity; made by `listen`."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def first_error(self) -> str:
        """The first error on one line, or a sentence that there was none."""
        return self.errors[0] if self.errors else "it gave no reason"


def listen(library: Library) -> tuple[Any, Complaints]:
    """A logger for `library` that keeps errors and warnings instead of printing them, and what it keeps them in."""
    base: Any = library.module.ILogger
    complaints = Complaints()

    class Listener(base):  # type: ignore[misc]  # the module is known when this runs
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.Severity.ERROR, base.Severity.INTERNAL_ERROR):
                complaints.errors.append(" ".join(message.split()))
            elif severity == base.Severity.WARNING:
                complaints.warnings.append(" ".join(message.split()))

    return Listener(), complaints
