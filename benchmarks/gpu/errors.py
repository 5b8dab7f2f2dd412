"""What ends a step of the GPU check other than by its figures."""

from __future__ import annotations

from segzero_rt.errors import SegZeroError


class GpuCheckError(SegZeroError):
    """Something that the check needs is missing or wrong; the message says what to do."""


class NotHereError(GpuCheckError):
    """A measurement that this machine cannot have, and that nobody need mend: no TensorRT, no energy meter."""
