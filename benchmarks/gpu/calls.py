"""The calls of a day with a GPU: which load each carries, which stages it runs, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import GpuCheckError
from .stages import Stage

CALL_MINUTES = 10.0
_SPARE_MINUTES = 0.5
"""Of each call, for its start and for writing results."""
_PROGRAM = "python3 -m benchmarks.gpu_check run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One command on the GPU's machine."""

    carry: str | None
    """The load that goes with it."""
    stages: tuple[str, ...]
    """None: pieces are kept and nothing runs."""
    minutes: float

    @property
    def command(self) -> str:
        pieces = f" --pieces {self.carry}" if self.carry else ""
        if not self.stages:
            return f"{_PROGRAM}{pieces} --receive-only"
        return f"{_PROGRAM} {' '.join(self.stages)}{pieces}"

    def shown(self) -> str:
        """One line for people."""
        carried = f", carrying {self.carry}" if self.carry else ""
        return f"about {self.minutes:.1f} minutes{carried}: {self.command}"


def plan_calls(stages: Sequence[Stage], loads: Sequence[str], *, minutes: float = CALL_MINUTES) -> list[Call]:
    """All loads but the last come by themselves; the last one comes with the first stages.

    Stages stay in order and are put into one call as long as they fit its time; one that is longer by itself is named
    in as many calls as it takes, since a call goes on where the one before it ended.

    Raises:
        GpuCheckError: a step that no call has the time for.
    """
    room = minutes - _SPARE_MINUTES
    calls = [Call(carry=load, stages=(), minutes=_SPARE_MINUTES) for load in loads[:-1]]
    carry = loads[-1] if loads else None
    named: list[str] = []
    used = 0.0
    for stage in stages:
        for step in stage.steps:
            if step.minutes > room:
                raise GpuCheckError(
                    f"expected steps of up to {room} minutes, {stage.name} has {step.name} of {step.minutes}; part it"
                )
            if used + step.minutes > room:
                calls.append(Call(carry=carry, stages=tuple(named), minutes=used + _SPARE_MINUTES))
                carry, named, used = None, [], 0.0
            if stage.name not in named:
                named.append(stage.name)
            used += step.minutes
    if named:
        calls.append(Call(carry=carry, stages=tuple(named), minutes=used + _SPARE_MINUTES))
    return calls
