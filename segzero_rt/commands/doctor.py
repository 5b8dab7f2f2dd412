"""`segzero doctor [BUNDLE]`: what this machine can run, whether the bundle is whole, and why not, if not."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segzero_rt.commands.output import print_document, printable
from segzero_rt.errors import SegZeroError

if TYPE_CHECKING:  # `--help` must not import numpy
    from segzero_rt.bundle import Bundle
    from segzero_rt.engines.record import EngineRecord

NAME = "doctor"
HELP = "tell what this machine can run, and check a bundle"

_EPILOG = """examples:
  segzero doctor
  segzero doctor my-bundle --json
  segzero doctor my-bundle --preflight

The bundle's files are compared with its manifest, its need of memory with what is free, and the number types of its
graphs with what the device has; only then are they loaded, and a question is asked about a grey picture. --preflight
stops before anything is loaded and adds what to expect of Jetson modules: predictions from published figures, not
measurements.
exit status: 0 the bundle runs here, 2 it does not (the report says why)"""

# What the CPU backend's kernels make use of, by the kernel's names for them (x86 flags, ARM features).
_CPU_FEATURES = (
    "avx2",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)
_OPTIONAL_PARTS = {
    "export": ("torch", "transformers", "onnx"),
    "train": ("torch", "transformers", "tqdm"),
    "eval": ("pyarrow", "pycocotools"),
    "cuda": ("pycuda",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx",),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "bundle", metavar="BUNDLE", nargs="?", help="a bundle's folder (default: the embedded `tabletop`)"
    )
    parser.add_argument("--backend", default="auto", metavar="NAME", help="try this backend (default: auto)")
    parser.add_argument(
        "--preflight", action="store_true", help="load nothing: machine, integrity, memory plan, Jetson predictions"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def execute(arguments: argparse.Namespace) -> int:
    report = examine(arguments.bundle, arguments.backend, preflight_only=arguments.preflight)
    if arguments.json:
        print_document(report)
    else:
        _print_report(report)
    for problem in report["problems"]:
        line = json.dumps({"status": "error", "error": {"type": SegZeroError.__name__, "message": problem}})
        print(line if arguments.json else f"segzero: {problem}", file=sys.stderr)
    return 0 if report["runs"] else 2


def examine(bundle_path: str | None = None, backend: str = "auto", *, preflight_only: bool = False) -> dict[str, Any]:
    """The report: machine, backends, parts, bundle, preflight, trial, problems, and `runs`: whether all of it works.

    With `preflight_only` the trial is None, and `runs` says that nothing speaks against it.
    """
    from segzero_rt.environment import environment_card
    from segzero_rt.preflight.machine import read_machine
    from segzero_rt.preflight.report import plan_report

    problems: list[str] = []
    found = read_machine()
    machine = environment_card() | {
        "cpu_features": _cpu_features(),
        "memory_available_bytes": found.memory_available_bytes,
        "jetpack": None if found.jetpack is None else str(found.jetpack),
        "model": found.model,
        "gpus": [dataclasses.asdict(gpu) for gpu in found.gpus],
        "driver": found.driver,
        "cuda": found.cuda,
        "tensorrt": found.tensorrt,
    }
    if found.gpu_problem:
        problems.append(printable(found.gpu_problem))
    bundle = _examine_bundle(bundle_path, problems)
    preflight = None
    if not problems:
        preflight = plan_report(_opened(bundle_path), found, problems, with_predictions=preflight_only, backend=backend)
    trial = None if problems or preflight_only else _try(bundle_path, backend, problems)
    return {
        "machine": machine,
        "backends": _backends(),
        "kernels": _kernels(problems),
        "operators": _operators(problems),
        "parts": {name: all(map(_is_installed, modules)) for name, modules in _OPTIONAL_PARTS.items()},
        "bundle": bundle,
        "preflight": preflight,
        "trial": trial,
        "problems": [*dict.fromkeys(problems)],  # a trial meets what was found before it
        "runs": not problems,
    }


def _kernels(problems: list[str]) -> dict[str, str] | None:
    """The build of the kernels that is used here and why; None beside a problem where a forced one cannot be had."""
    from segzero_rt.kernels.backend import resolve_kernels

    try:
        chosen = resolve_kernels()
    except SegZeroError as error:
        problems.append(printable(str(error)))
        return None
    return {"name": chosen.name, "detail": printable(chosen.detail)}


def _operators(problems: list[str]) -> dict[str, str] | None:
    """What graphs' own operators run as and why; None beside a problem where a forced build cannot be had."""
    from segzero_rt.operators.library import resolve_operators

    try:
        chosen = resolve_operators()
    except SegZeroError as error:
        problems.append(printable(str(error)))
        return None
    return {"name": chosen.name, "detail": printable(chosen.detail)}


def _backends() -> dict[str, dict[str, Any]]:
    from segzero_rt.graph import BACKENDS, resolve_backend

    found: dict[str, dict[str, Any]] = {}
    for name in BACKENDS:
        if name == "auto":
            continue
        try:
            found[name] = {"available": True, "detail": f"ONNX Runtime {resolve_backend(name).version}"}
        except SegZeroError as error:
            found[name] = {"available": False, "detail": printable(str(error))}
    return found


def _opened(path: str | None) -> Bundle:
    from segzero_rt.bundle import Bundle

    return Bundle.open(path, verify="size")  # its hashes were compared a moment ago


def _examine_bundle(path: str | None, problems: list[str]) -> dict[str, Any]:
    from segzero_rt.bundle import EMBEDDED, Bundle

    start = time.perf_counter()
    where = str(EMBEDDED if path is None else path)
    try:
        bundle = Bundle.open(path)
    except SegZeroError as error:
        problems.append(printable(str(error)))
        return {"path": where, "intact": False}
    manifest = bundle.manifest
    return {
        "path": where,
        "intact": True,
        "name": manifest.name,
        "format_version": manifest.format_version,
        "created_by": manifest.created_by,
        "answer_format": manifest.answer_format,
        "policy": {"family": manifest.policy.family, "flavour": manifest.policy.flavour},
        "segmenter": {"family": manifest.segmenter.family},
        "num_files": len(manifest.files),
        "num_bytes": bundle.num_bytes,
        "gates": dict(manifest.gates),
        "memory_bytes": dict(manifest.memory_bytes),
        "engines": [_engine_line(engine) for engine in manifest.engines],
        "check_ms": round((time.perf_counter() - start) * 1e3, 1),
    }


def _try(path: str | None, backend: str, problems: list[str]) -> dict[str, Any] | None:
    """Loads the bundle and asks it one thing; a few tokens are enough to run every graph of the policy."""
    import numpy as np

    from segzero_rt.answer import Prompt
    from segzero_rt.environment import peak_memory_bytes
    from segzero_rt.pipeline import SegZero

    grey = np.full((64, 64, 3), 128, np.uint8)
    start = time.perf_counter()
    try:
        pipeline = SegZero.load(path, backend=backend)
        load_ms = (time.perf_counter() - start) * 1e3
        start = time.perf_counter()
        pipeline(grey, "a cup", max_new_tokens=4)
        pipeline.segment(grey, [Prompt(box_xyxy=(8, 8, 56, 56))])
    except SegZeroError as error:
        problems.append(printable(str(error)))
        return None
    return {
        "backend": str(pipeline.policy.backend),
        "load_ms": round(load_ms, 1),
        "run_ms": round((time.perf_counter() - start) * 1e3, 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _cpu_features() -> list[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return []
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return [feature for feature in _CPU_FEATURES if feature in value.split()]
    return []


def _print_report(report: dict[str, Any]) -> None:
    from segzero_rt.preflight.report import plan_rows

    rows = [*_machine_rows(report), *_bundle_rows(report["bundle"]), *plan_rows(report["preflight"])]
    rows += _trial_rows(report["trial"])
    rows.append(("runs here", "yes" if report["runs"] else "no"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _machine_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    machine = report["machine"]
    features = " ".join(machine["cpu_features"]) or "no vector instructions seen"
    rows = [
        ("python", machine["python"]),
        ("system", f"{machine['system']}, {machine['architecture']}"),
        ("cpu", f"{machine['cpu'] or 'unknown'}, {machine['cores']} cores, {features}"),
        ("memory", f"{_mib(machine['memory_available_bytes'])} available of {_mib(machine['memory_bytes'])}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in machine["packages"].items())),
    ]
    rows += [(name, machine[name]) for name in ("model", "jetpack", "driver", "cuda") if machine[name]]
    rows += [("gpu", _gpu_row(gpu)) for gpu in machine["gpus"]] or [("gpu", "none that CUDA knows")]
    rows += [(target, version) for target, version in machine["tensorrt"].items()]
    for name, backend in report["backends"].items():
        rows.append((f"backend {name}", f"{'yes' if backend['available'] else 'no'}: {backend['detail']}"))
    for part in ("kernels", "operators"):
        if report[part]:
            rows.append((part, f"{report[part]['name']}: {report[part]['detail']}"))
    rows.append(("extras", ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in report["parts"].items())))
    return rows


def _gpu_row(gpu: dict[str, Any]) -> str:
    memory = "the system's memory" if gpu["integrated"] else _mib(gpu["memory_bytes"])
    return f"{printable(gpu['name'])}, compute capability {gpu['capability']}, {memory}"


def _bundle_rows(bundle: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("bundle", bundle["path"])]
    if bundle["intact"]:
        size = f"{bundle['num_files']} intact, {_mib(bundle['num_bytes'])}, checked in {bundle['check_ms']} ms"
        rows += [("  name", f"{bundle['name']}, by {bundle['created_by']}"), ("  files", size)]
        rows += [(f"  gate {name}", _gate_row(figures)) for name, figures in bundle["gates"].items()]
        rows += [("  engine", printable(line)) for line in bundle["engines"]]
    return rows


def _trial_rows(trial: dict[str, Any] | None) -> list[tuple[str, str]]:
    if trial is None:
        return []
    times = f"loaded in {trial['load_ms']} ms, ran in {trial['run_ms']} ms"
    return [("trial", f"backend {trial['backend']}, {times}, peak {_mib(trial['peak_memory_bytes'])}")]


def _engine_line(engine: EngineRecord) -> str:
    devices = ", ".join(engine.compute_capabilities) or "every device that it knows"
    made = f"{engine.target} {engine.library_version} for {devices}"
    return f"{engine.graph}: {made}, gate {engine.gate.get('status', 'unknown')}"


def _gate_row(figures: object) -> str:
    """A gate's figures on one line; what it had to reach stays in the manifest."""
    if not isinstance(figures, dict):
        return printable(str(figures))[:160]
    shown = {name: value for name, value in figures.items() if not isinstance(value, (dict, str)) or name == "status"}
    return printable(", ".join(f"{name} {_figure(value)}" for name, value in shown.items()))[:240]


def _figure(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _mib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.0f} MiB"
