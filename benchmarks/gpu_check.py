"""Everything that wants a GPU, on a machine that has one and nothing else: PyTorch, onnx, nvcc, no network.

    python -m benchmarks.gpu_check pack --folder carried             # here, with a network: wheels, cut into pieces
    python -m benchmarks.gpu_check list                              # stages, minutes, what each needs
    python -m benchmarks.gpu_check run --pieces carried/load1        # there: takes pieces in, runs what fits the time
    python -m benchmarks.gpu_check run kernels --device cpu          # the same code at small sizes on any machine

`run` goes through its stages until `--minutes` are over, writes `benchmarks/results/gpu_<stage>_<gpu>_<date>.json` and
says what is left; called again, it goes on there. What arrived, was installed and built stays in `--work`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.errors import GpuCheckError
from benchmarks.gpu.machine import carried_packages, check_device, machine_card
from benchmarks.gpu.packing import PACKED_PYTHON, pack
from benchmarks.gpu.pieces import MAX_PIECE_BYTES, missing, read_contents, receive
from benchmarks.gpu.results import write_result
from benchmarks.gpu.running import FAILED, TIMEOUT, Budget, read_state, run_stages
from benchmarks.gpu.stages import DEVICES, SIZES, STAGES, Context, choose
from benchmarks.measuring import RESULTS
from segzero_rt.errors import SegZeroError

DEFAULT_WORK = Path("/tmp/segzero-gpu-check")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        document, status = options.action(options)
    except SegZeroError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(document))
    return status  # type: ignore[no-any-return]


def run(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Takes pieces in and runs stages; status 1 where a step failed."""
    context = _context(options)
    stages = choose(options.stages)
    tell = _teller(options.json)
    arrived = receive(options.pieces, context.kept) if options.pieces else []
    gone = [name for one in read_contents(context.kept) for name in missing(one, context.kept)]
    tell(f"pieces: {len(arrived)} arrived, {len(gone)} missing")
    taken: dict[str, Any] = {"arrived": arrived, "missing": gone}
    if options.receive_only:
        return taken, 0
    if options.dry_run:
        return {**taken, "plan": _plan(stages, context, tell, options.again)}, 0
    check_device(context)
    card = machine_card(context)
    out = options.out or (RESULTS if context.device == "cuda" else context.work / "results")
    paths: dict[str, str] = {}

    def write(stage: Any, outcomes: dict[str, Any]) -> None:
        whole = {**card, "carried_packages": carried_packages(context)}
        paths[stage.name] = str(write_result(stage, outcomes, whole, out, context.size, options.commit))

    budget = Budget(seconds=60 * options.minutes)
    outcomes = run_stages(stages, context, budget, write=write, tell=tell, again=options.again)
    for name, path in paths.items():
        tell(f"result of {name}: {path}")
    failed = any(one["status"] in (FAILED, TIMEOUT) for steps in outcomes.values() for one in steps.values())
    return {**taken, "results": paths, "outcomes": outcomes}, int(failed)


def show(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Stages with their minutes and needs."""
    tell = _teller(options.json)
    stages = []
    for stage in STAGES:
        tell(f"{stage.name:<14}{stage.minutes:5.1f} min  {stage.what}")
        if stage.carried:
            tell(f"{'':<25}needs {', '.join(stage.carried)}")
        steps = [{"name": step.name, "minutes": step.minutes} for step in stage.steps]
        stages.append({"name": stage.name, "what": stage.what, "carried": stage.carried, "steps": steps})
    return {"stages": stages}, 0


def _plan(stages: Sequence[Any], context: Context, tell: Any, again: bool) -> list[dict[str, Any]]:
    """What a run would do, in order."""
    rows = []
    for stage in stages:
        found = {} if again else read_state(context, stage)
        for step in stage.steps:
            before = found.get(step.name, {}).get("status")
            rows.append({"stage": stage.name, "step": step.name, "minutes": step.minutes, "before": before})
            tell(f"{stage.name}: {step.name}: about {step.minutes} minutes{f', {before} before' if before else ''}")
    return rows


def _pack(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    return pack(options, _teller(options.json)), 0


def _context(options: argparse.Namespace) -> Context:
    size = options.size or ("full" if options.device == "cuda" else "tiny")
    if options.minutes <= 0:
        raise GpuCheckError(f"expected a time above 0 minutes, got {options.minutes}")
    options.work.mkdir(parents=True, exist_ok=True)
    return Context(device=options.device, size=size, work=options.work.resolve())


def _teller(as_json: bool) -> Any:
    """Lines for people; on stderr where stdout is for programs."""
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: Any, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
        one.set_defaults(action=action)
        return one

    command("list", show, "the stages, how long each takes and what it needs")
    runs = command("run", run, "take pieces in and run stages until the time is over")
    runs.add_argument("stages", nargs="*", metavar="STAGE", help="all by default, see `list`")
    runs.add_argument("--device", choices=DEVICES, default=DEVICES[0])
    runs.add_argument("--size", choices=SIZES, help="by default full on a GPU and tiny on a processor")
    runs.add_argument("--minutes", type=float, default=10, help="what this call may take (10)")
    runs.add_argument("--work", type=Path, default=DEFAULT_WORK, help=f"stays from call to call ({DEFAULT_WORK})")
    runs.add_argument("--out", type=Path, help="folder for result files (benchmarks/results; on a CPU WORK/results)")
    runs.add_argument("--commit", help="what results say where the files came without git's history")
    runs.add_argument("--pieces", type=Path, help="folder of pieces that came with this call")
    runs.add_argument("--receive-only", action="store_true", help="keep the pieces and run nothing")
    runs.add_argument("--again", action="store_true", help="run finished steps again")
    runs.add_argument("--dry-run", action="store_true", help="say what would run")
    packs = command("pack", _pack, "download what is carried and cut it into loads of pieces")
    packs.add_argument("--folder", type=Path, default=Path("carried"), help="where loads are written (carried)")
    packs.add_argument("--python", default=PACKED_PYTHON, help=f"version on the GPU's machine ({PACKED_PYTHON})")
    packs.add_argument("--piece-bytes", type=int, default=MAX_PIECE_BYTES, help="most bytes of one piece and load")
    packs.add_argument("--transfer-bytes", type=int, default=64 << 20, help="what a call carries, checkout included")
    packs.add_argument("--add", action="append", default=[], metavar="NAME", help="another wheel; repeatable")
    packs.add_argument("--add-source", action="append", default=[], metavar="NAME", help="another source package")
    packs.add_argument("--bundle", type=Path, help="a bundle of portable graphs, for engines and the CUDA provider")
    packs.add_argument("--file", type=Path, action="append", default=[], help="another file to carry; repeatable")
    packs.add_argument("--wheels", type=Path, help="folder of files that were downloaded before; nothing is fetched")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
