"""`segzero build`: a bundle's graphs to engines of TensorRT or TensorRT-RTX, recorded in its manifest."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from segzero_rt.commands.options import positive_integer
from segzero_rt.commands.output import print_document, printable
from segzero_rt.errors import EngineError

if TYPE_CHECKING:  # `--help` must import neither numpy nor a backend
    from segzero_rt.bundle import Bundle
    from segzero_rt.engines.builder import BuildOptions, Progress, Refusal
    from segzero_rt.engines.library import Library
    from segzero_rt.engines.make import BuildReport, Gate
    from segzero_rt.engines.record import EngineRecord

NAME = "build"
HELP = "engines of TensorRT or TensorRT-RTX from a bundle's graphs"

_EPILOG = """examples:
  segzero build bundles/seg-zero --target tensorrt
  segzero build bundles/seg-zero --target tensorrt-rtx --compute-capability 8.9,12.0
  segzero build bundles/seg-zero --target tensorrt-rtx --graph image_encoder --force

The bundle needs portable graphs: `segzero export ... --flavour portable`. TensorRT builds for the device that is here;
TensorRT-RTX also builds for others, without a GPU. An engine that could not be run here is recorded with the gate
`not_run`, and the runtime asks for --allow-ungated. What is there already, of the same graph, library and options, is
kept. Each engine is recorded as soon as it is whole, so a build that was stopped goes on where it ended.
exit status: 0 all engines are there, 2 a graph was refused or could not be built"""

_TARGETS = ("tensorrt", "tensorrt-rtx")
_BAR_CELLS = 24
_TERMINAL_INTERVAL_S = 0.1
_SHOWN_REFUSALS = 12


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder; engines are added to it")
    parser.add_argument("--target", choices=_TARGETS, required=True, help="the library to build with")
    parser.add_argument(
        "--graph", action="append", default=[], metavar="NAME", help="build this graph alone; may be given again"
    )
    parser.add_argument("--force", action="store_true", help="build again what is there already")
    devices = parser.add_argument_group("devices")
    devices.add_argument(
        "--compute-capability",
        type=_capabilities,
        default=(),
        metavar="M.N,...",
        help="devices to build for, such as 8.9,12.0 (tensorrt-rtx; default: all that it knows)",
    )
    devices.add_argument(
        "--hardware-compatible",
        choices=("same-capability", "ampere-plus"),
        help="let the engine run on other devices of that kind, more slowly (tensorrt)",
    )
    devices.add_argument(
        "--version-compatible", action="store_true", help="let the engine run under later versions of the library"
    )
    shapes = parser.add_argument_group("shapes")
    shapes.add_argument("--batch", type=positive_integer, default=1, metavar="N", help="questions in one run (1)")
    shapes.add_argument("--max-objects", type=positive_integer, default=16, metavar="N", help="prompts in one run (16)")
    shapes.add_argument(
        "--max-points", type=positive_integer, default=16, metavar="N", help="labelled points of a prompt (16)"
    )
    shapes.add_argument(
        "--max-prefill", type=positive_integer, metavar="N", help="tokens that the decoder takes at once (its context)"
    )
    shapes.add_argument(
        "--one-profile", action="store_true", help="one profile for prefill and decode: half the size, slower prefill"
    )
    tuning = parser.add_argument_group("tuning")
    tuning.add_argument("--strip", action="store_true", help="leave the weights out; they are filled in when loaded")
    tuning.add_argument("--tf32", action="store_true", help="let float32 products round their factors to TF32")
    tuning.add_argument("--optimization-level", type=int, choices=range(6), metavar="0-5", help="0 builds fastest")
    tuning.add_argument("--workspace-mib", type=positive_integer, metavar="N", help="most working memory of a layer")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def execute(arguments: argparse.Namespace) -> int:
    from segzero_rt.bundle import Bundle
    from segzero_rt.engines.library import find_library
    from segzero_rt.engines.make import build_engines
    from segzero_rt.engines.profiles import ProfileLimits
    from segzero_rt.preflight.gpu import read_gpus

    start_s = time.perf_counter()
    bundle = Bundle.open(arguments.bundle)
    library = find_library(arguments.target)
    gpus = read_gpus()
    limits = ProfileLimits(
        batch=arguments.batch,
        objects=arguments.max_objects,
        points=arguments.max_points,
        prefill=arguments.max_prefill,
        separate=not arguments.one_profile,
    )
    report = build_engines(
        bundle,
        library,
        options=_options(arguments),
        limits=limits,
        gpu=gpus[0] if gpus else None,
        graphs=arguments.graph,
        force=arguments.force,
        gate=_gate(bundle, library) if gpus else None,
        progress=_progress,
    )
    kernels = compile_kernels(gpus[0].capability) if gpus else None
    document = {**_document(report, str(library), time.perf_counter() - start_s), "kernels": kernels}
    if arguments.json:
        print_document(document)
    else:
        _print(report, document)
    if not report.refused:
        return 0
    problem = _refusal_line(report.refused, str(library))
    line = json.dumps({"status": "error", "error": {"type": EngineError.__name__, "message": problem}})
    print(line if arguments.json else f"segzero: {problem}", file=sys.stderr)
    return 2


def _gate(bundle: Bundle, library: Library) -> Gate | None:
    """Runs each engine on the device that is here; without pycuda none can be run, which the record then says."""
    from segzero_rt.device import Device
    from segzero_rt.engines.graph import gate_on_device
    from segzero_rt.errors import BackendError

    try:
        return gate_on_device(bundle, library, Device.open())
    except BackendError as error:
        print(f"build: engines are not gated: {error}", file=sys.stderr)
        return None


def compile_kernels(capability: str) -> dict[str, str]:
    """Compiles the package's own kernels for the device that is here, so that their first use need not. Where that
    cannot be done, the reason is told and nothing else fails: the host's kernels do the same."""
    from segzero_rt.errors import BackendError
    from segzero_rt.kernels.device_build import compile_all

    try:
        compile_all(capability, lambda what: print(f"build: {what}", file=sys.stderr, flush=True))
    except BackendError as error:
        print(f"build: kernels are not compiled: {error}", file=sys.stderr)
        return {"capability": capability, "status": "not_compiled", "reason": str(error)}
    return {"capability": capability, "status": "compiled"}


def _options(arguments: argparse.Namespace) -> BuildOptions:
    from segzero_rt.engines.builder import BuildOptions

    return BuildOptions(
        compute_capabilities=arguments.compute_capability,
        hardware_compatible=arguments.hardware_compatible,
        version_compatible=arguments.version_compatible,
        strip=arguments.strip,
        tf32=arguments.tf32,
        optimization_level=arguments.optimization_level,
        workspace_bytes=None if arguments.workspace_mib is None else arguments.workspace_mib << 20,
    )


def _document(report: BuildReport, library: str, seconds: float) -> dict[str, Any]:
    files = report.bundle.manifest.files

    def row(engine: EngineRecord, status: str) -> dict[str, Any]:
        return {
            "graph": engine.graph,
            "file": engine.file,
            "status": status,
            "num_bytes": files[engine.file].bytes,
            "compute_capabilities": list(engine.compute_capabilities),
            "profiles": [profile.name for profile in engine.profiles],
            "precisions": dict(engine.precisions),
            "gate": dict(engine.gate),
            "build_seconds": engine.build_seconds,
        }

    return {
        "bundle": str(report.bundle.root),
        "library": library,
        "engines": [row(engine, "built") for engine in report.built] + [row(engine, "kept") for engine in report.kept],
        "refused": [
            {"graph": graph, "node": refusal.node, "operator": refusal.operator, "message": refusal.message}
            for graph, refusals in report.refused.items()
            for refusal in refusals
        ],
        "seconds": round(seconds, 1),
    }


def _print(report: BuildReport, document: dict[str, Any]) -> None:
    for engine in document["engines"]:
        size = f"{engine['num_bytes'] / 2**20:.1f} MiB"
        how = "kept" if engine["status"] == "kept" else f"built in {engine['build_seconds']} s"
        print(f"{engine['graph']}: {size}, {how}, gate {engine['gate']['status']}")
    for graph, refusals in report.refused.items():
        print(f"{graph}: refused, {len(refusals)} nodes")
        for refusal in refusals[:_SHOWN_REFUSALS]:
            print(f"  {printable(str(refusal))[:200]}")
        if len(refusals) > _SHOWN_REFUSALS:
            print(f"  and {len(refusals) - _SHOWN_REFUSALS} more; --json lists all")


def _refusal_line(refused: dict[str, list[Refusal]], library: str) -> str:
    operators = sorted({refusal.operator for refusals in refused.values() for refusal in refusals} - {""})
    return (
        f"expected graphs that {library} reads, it refuses {', '.join(refused)}"
        f"{' for ' + ', '.join(operators[:6]) if operators else ''}; nothing was built; "
        "export the bundle with --flavour portable"
    )


def _progress(graph: str) -> Progress:
    """A bar on a terminal; in a log, one line when a graph's build begins."""
    on_terminal = sys.stderr.isatty()
    shown_s = 0.0
    if not on_terminal:
        print(f"build: {graph}", file=sys.stderr, flush=True)

    def show(phase: str, share: float) -> None:
        nonlocal shown_s
        now_s = time.monotonic()
        if not on_terminal or (now_s - shown_s < _TERMINAL_INTERVAL_S and share < 1.0):
            return
        shown_s = now_s
        filled = round(share * _BAR_CELLS)
        bar = "#" * filled + "." * (_BAR_CELLS - filled)
        end = "\n" if share >= 1.0 else ""
        print(
            f"\rbuild {graph:<14} [{bar}] {share:4.0%} {printable(phase)[:40]}\x1b[K",
            end=end,
            file=sys.stderr,
            flush=True,
        )

    return show


def _capabilities(text: str) -> tuple[str, ...]:
    """An argparse type: numbers such as 8.9, with commas between them."""
    names = tuple(dict.fromkeys(text.split(",")))
    if not all(re.fullmatch(r"[0-9]{1,2}\.[0-9]", name) for name in names):
        raise argparse.ArgumentTypeError(f"expected compute capabilities such as 8.9,12.0, got {text[:40]!r}")
    return names
