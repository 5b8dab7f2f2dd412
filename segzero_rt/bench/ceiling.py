"""The least time that each stage can take here: its work, counted on the graphs, over peaks measured on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segzero_rt.bench.child import run_child, serve
from segzero_rt.bench.peaks import Peaks, measure_peaks
from segzero_rt.bench.tasks import make_tasks
from segzero_rt.bench.work import StageWork, count_work
from segzero_rt.bundle import Bundle
from segzero_rt.graph import resolve_backend

_PER_REPLY = "decode"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """Peaks of the machine and work of the stages."""

    peaks: Peaks
    work: dict[str, StageWork]
    """By stage; "token" is one token of a reply in a run of its own."""

    @property
    def stages_ms(self) -> dict[str, float]:
        """The least time of each stage."""
        return {stage: work.ceiling_ms(self.peaks) for stage, work in self.work.items()}

    def fractions(self, apart_ms: Mapping[str, float], decoding: Mapping[str, float]) -> dict[str, float]:
        """Each stage's ceiling over what it took: 1 is the machine's limit.

        Args:
            apart_ms: what stages took with nothing beside them.
            decoding: mean `runs` of the decoder and tokens `drafted` per reply: guesses are computed as well, but a run
                reads the weights once for all of them.
        """
        least = self.stages_ms
        if "token" in self.work and decoding.get("runs"):
            runs = decoding["runs"]
            least[_PER_REPLY] = self.work["token"].ceiling_ms(
                self.peaks, runs=runs, tokens=runs + decoding.get("drafted", 0.0)
            )
        return {stage: least[stage] / took for stage, took in apart_ms.items() if stage in least and took > 0}

    def to_json(self) -> dict[str, Any]:
        return {
            "peaks": self.peaks.to_json(),
            "work": {stage: work.to_json() for stage, work in self.work.items()},
            "stages_ms": self.stages_ms,
        }


def measure_ceiling(settings: Mapping[str, Any]) -> Ceiling | str:
    """Counts and measures in a process of its own; the reason where that failed.

    Args:
        settings: "bundle" (a folder), "images" (as `make_tasks`), "backend" (of ONNX Runtime), "threads".
    """
    document = run_child(__name__, settings)
    if "problem" in document:
        return str(document["problem"])
    return Ceiling(
        peaks=Peaks.from_json(document["peaks"]),
        work={stage: StageWork(**work) for stage, work in document["work"].items()},
    )


def _measure(settings: dict[str, Any]) -> dict[str, Any]:
    backend = resolve_backend(settings["backend"])
    peaks = measure_peaks(backend, settings["threads"])
    task = next(make_tasks(settings["images"], 1))
    work = count_work(Bundle.open(settings["bundle"]), task, operators=backend.device == "cpu")
    return {"peaks": peaks.to_json(), "work": {stage: one.to_json() for stage, one in work.items()}}


if __name__ == "__main__":
    serve(_measure)
