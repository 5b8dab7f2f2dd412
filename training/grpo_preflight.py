"""What stops a run before anything is rendered, read or loaded: settings that this machine, this number of processes or
this folder cannot go on with. Found here it costs seconds, later minutes of rendering or of loading a large policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState

from segzero_rt.errors import DatasetError, SegZeroError

from .grpo_presets import GrpoPreset, Vllm
from .grpo_processor import load_processor
from .rows import ROWS_NAME, TrainingRow

RUN_NAME = "run.json"
_TOLD = 4
"""Differences that an error names."""


def check_before_rows(preset: GrpoPreset, *, out: Path, policy: str, given: Sequence[Path | None] = ()) -> None:
    """Refuses what can be told from the settings alone.

    Args:
        preset: with all changes.
        out: the run's folder, which may hold an earlier run.
        policy: folder or hub name of the policy to start from.
        given: folders of rows that will be read; None where rows are rendered.

    Raises:
        DatasetError: a folder of rows has none, or none is given and the preset renders none.
        SegZeroError: no policy, libraries that are missing, processes that do not fit, or `out` holds another run.
    """
    for folder in given:
        if folder is None and not preset.num_rows:
            raise DatasetError(
                f"expected rows for preset {preset.name}: give --data and --validation (segzero train prepare)"
            )
        if folder is not None and not (folder / ROWS_NAME).is_file():
            raise DatasetError(
                f"expected a folder of training rows (segzero train prepare), found no {folder / ROWS_NAME}"
            )
    check_processes(preset, PartialState().num_processes)
    check_libraries(preset)
    check_claim(out, settings_of(preset, policy))
    load_processor(policy)


def check_processes(preset: GrpoPreset, num_processes: int) -> None:
    """Raises `SegZeroError` unless a step can be shared out among so many processes."""
    if preset.base_share and num_processes > 1:
        raise SegZeroError("expected one process with a base share, whose weights are whole; give --base-share 0")
    if preset.num_runs > 1 and num_processes > 1:
        raise SegZeroError("expected one process with several runs, whose weights' mean is taken; give --runs 1")
    preset.accumulation_steps(num_processes)
    if preset.vllm is Vllm.COLOCATE and num_processes % preset.vllm_tensor_parallel:
        raise SegZeroError(
            f"expected processes in groups of {preset.vllm_tensor_parallel}, on which vLLM shares out the policy, got "
            f"{num_processes}; start them with accelerate launch --num_processes, or sample without it: --vllm off"
        )


def check_libraries(preset: GrpoPreset) -> None:
    """Raises `SegZeroError` where a library that the preset needs is not installed."""
    if preset.vllm is not None and find_spec("vllm") is None:
        raise SegZeroError(
            f"expected vLLM to sample for preset {preset.name}, it is not installed: pip install vllm, or sample with "
            "transformers: --vllm off (slower)"
        )
    if preset.lora is not None and preset.lora.four_bit and find_spec("bitsandbytes") is None:
        raise SegZeroError(
            "expected bitsandbytes for 4-bit weights, it is not installed: pip install segzero-rt[qlora]"
        )


def settings_of(
    preset: GrpoPreset, policy: str, rows: Sequence[TrainingRow] = (), eval_rows: Sequence[TrainingRow] = ()
) -> dict[str, Any]:
    """What a run goes on with only if it is the same, as JSON; without rows, what is known before they are read."""
    settings: dict[str, Any] = {"policy": policy, "preset": asdict(preset)}
    if rows:
        settings |= {"num_rows": len(rows), "rows_sha256": _digest(rows), "validation_sha256": _digest(eval_rows)}
    settings = json.loads(json.dumps(settings))
    return settings


def check_claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Raises `SegZeroError`, naming what differs, where `out` holds a run with other settings.

    What a run of an earlier version did not write down is not compared.
    """
    path = out / RUN_NAME
    if not path.is_file():
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SegZeroError(f"expected {path} to hold a run's settings: {error}; choose another --out") from error
    if not isinstance(earlier, dict):
        raise SegZeroError(f"expected {path} to hold a run's settings, got no JSON object; choose another --out")
    if differing := list(_differences(earlier, settings)):
        more = f" and {len(differing) - _TOLD} more" if len(differing) > _TOLD else ""
        raise SegZeroError(
            f"expected {out} to hold a run with these settings, it was begun with {'; '.join(differing[:_TOLD])}{more} "
            f"({path}); go on with those settings, or choose another --out"
        )


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes `out` the folder of a run with these settings.

    Raises:
        SegZeroError: as `check_claim`.
    """
    path = out / RUN_NAME
    with PartialState().main_process_first():
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            temporary.replace(path)
    check_claim(out, settings)


def _differences(earlier: Mapping[str, Any], settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if name not in earlier:
            continue
        if isinstance(value, dict) and isinstance(earlier[name], dict):
            yield from _differences(earlier[name], value, f"{prefix}{name}.")
        elif earlier[name] != value:
            yield f"{prefix}{name} {json.dumps(earlier[name]):.60} instead of {json.dumps(value):.60}"


def _digest(rows: Sequence[TrainingRow]) -> str:
    """Of everything in rows but where their pictures lie."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.to_json(row.image.name), sort_keys=True).encode())
    return digest.hexdigest()
