"""What every speed-up costs in grounding: precision x picture size x thinking budget, each with its gIoU.

    python -m benchmarks.speed_accuracy TEST --bundle float16=B_float16 --bundle int8=segzero_rt/bundles/tabletop

All configurations get the same questions, one at a time, each in a process of its own on the same cores. The first
bundle at its own size with free replies is the reference: beside every other stands how much gIoU it loses against
that, question by question, with a 95 % interval over pictures, and whether it is within the gate (0.02 by default, as
in `segzero export --gate-dataset` with int8 weights): `within` where the whole interval is, `beyond` where none of it
is, else `open`, which more questions would settle. The front are those that nothing beats in both median latency and
gIoU; the picture shows it. With `--work DIR` a run that was stopped goes on after the combinations that are done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segzero_rt.bench.child import run_child
from segzero_rt.bundle import Bundle
from segzero_rt.commands.options import positive_integer
from segzero_rt.commands.output_files import write_text
from segzero_rt.commands.progress import Progress
from segzero_rt.environment import bundle_card
from segzero_rt.errors import SegZeroError
from segzero_rt.evaluation import Record, giou_loss, summarize

from .measuring import RESULTS, pin_to_cores, run_and_exit, write_result
from .speed_accuracy_run import ReplyRule

WITHIN, BEYOND, OPEN = "within", "beyond", "open"
_MEASURE = "benchmarks.speed_accuracy_run"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table on stderr and the document on stdout, writes the result file and the picture."""
    arguments = _arguments(argv)
    pin_to_cores(arguments.cores)
    try:
        configurations = plan(arguments.bundle, arguments.sides, arguments.replies)
        measured = _measure(configurations, arguments)
    except SegZeroError as error:
        print(f"speed_accuracy: {error}", file=sys.stderr)
        return 2
    rows, problems = compare(measured, limit=arguments.limit)
    document = {
        "dataset": Path(arguments.test).name,
        "gate_limit": arguments.limit,
        "cores": arguments.cores,
        "reference": rows[0]["name"],
        "configurations": rows,
        "could_not_run": problems,
    }
    path = write_result("speed_accuracy", document, arguments.out)
    if arguments.plot:
        from .speed_accuracy_plot import draw

        draw(json.loads(path.read_text()), arguments.plot)
    print(render(rows, problems), file=sys.stderr)
    print(json.dumps({**document, "result": path.name}))
    return 0


def plan(bundles: Mapping[str, Path], sides: Sequence[int], replies: Sequence[ReplyRule]) -> list[dict[str, Any]]:
    """Every combination; the first is the reference.

    Args:
        bundles: folders by the name that the table shows.
        sides: of the policy's picture; none: each bundle's own.
        replies: the first of them is the reference's.

    Raises:
        BundleError: not a bundle.
    """
    configurations = []
    for name, folder in bundles.items():
        own = Bundle.open(folder, verify="size").manifest.policy.input_size_hw[0]
        for side in dict.fromkeys([own, *sides]):
            configurations += [
                {"precision": name, "bundle": str(folder), "side": side, "reply": str(rule)} for rule in replies
            ]
    return configurations


def _measure(
    configurations: Sequence[dict[str, Any]], arguments: argparse.Namespace
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    common = {"dataset": str(arguments.test), "questions": arguments.questions, "threads": arguments.threads}
    measured = []
    with Progress(len(configurations), "configurations") as progress:
        for configuration in configurations:
            settings = {**configuration, **common}
            done = arguments.work and arguments.work / f"{fingerprint({**settings, 'cores': arguments.cores})}.json"
            if done and done.is_file():
                found = json.loads(done.read_text(encoding="utf-8"))
            else:
                found = run_child(_MEASURE, settings)
                if done and "problem" not in found:
                    done.parent.mkdir(parents=True, exist_ok=True)
                    write_text(done, json.dumps(found))
            measured.append((configuration, found))
            progress.step(label(configuration))
    return measured


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A name for what was measured: the bundle's contents count, not where it lies.

    Raises:
        BundleError: not a bundle.
    """
    contents = {**settings, "bundle": bundle_card(Bundle.open(settings["bundle"], verify="size"))}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def label(configuration: Mapping[str, Any]) -> str:
    """A configuration's name."""
    return f"{configuration['precision']} {configuration['side']} px {configuration['reply']}"


def compare(
    measured: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], *, limit: float
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The rows of the table, the reference first, and what could not be run with its reason.

    Raises:
        SystemExit: the reference itself could not be run.
    """
    rows: list[dict[str, Any]] = []
    problems: list[dict[str, str]] = []
    reference: list[Record] = []
    for configuration, found in measured:
        if "problem" in found:
            if not rows:
                raise SystemExit(f"speed_accuracy: the reference could not be run: {found['problem']}")
            problems.append({"name": label(configuration), "reason": found["problem"]})
            continue
        records = [Record.from_json(entry) for entry in found["records"]]
        reference = reference or records
        rows.append(_row(configuration, found, records, reference, limit))
    for row in rows:
        row["on_front"] = not any(_beats(other, row) for other in rows)
    return rows, problems


def _row(
    configuration: Mapping[str, Any],
    found: Mapping[str, Any],
    records: Sequence[Record],
    reference: Sequence[Record],
    limit: float,
) -> dict[str, Any]:
    summary = summarize(records)
    loss, interval = giou_loss(records, reference)
    kept = ("giou", "giou_interval_95", "ciou", "box_accuracy", "num_samples", "parse_rate", "none_accuracy")
    return {
        "name": label(configuration),
        **{name: configuration[name] for name in ("precision", "side", "reply")},
        **{name: summary[name] for name in kept},
        "giou_loss": loss,
        "giou_loss_interval_95": list(interval),
        "gate": gate(interval, limit),
        "thinking_tokens_mean": summary["thinking_tokens"]["mean"],
        "tokens_per_question": found["tokens"] / len(records),
        "tokens_per_s": found["tokens"] / found["decode_ms"] * 1e3 if found["decode_ms"] else None,
        "latency_ms": summary["latency_ms"],
        "load_ms": found["load_ms"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "bundle_bytes": found["bundle_bytes"],
        "bundle": found["bundle"],
    }


def gate(loss_interval: tuple[float, float], limit: float) -> str:
    """Whether a loss is within the limit, as far as its interval tells."""
    low, high = loss_interval
    return WITHIN if high <= limit else BEYOND if low > limit else OPEN


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    faster = one["latency_ms"]["p50"] - other["latency_ms"]["p50"]
    better = one["giou"] - other["giou"]
    return bool(faster <= 0 and better >= 0 and (faster < 0 or better > 0))


def render(rows: Sequence[Mapping[str, Any]], problems: Sequence[Mapping[str, str]]) -> str:
    """The table, in Markdown."""
    head = (
        *("weights", "picture", "reply", "gIoU", "lost against the reference", "gate", "tokens, a second"),
        *("latency p50 / p90", "memory", "front"),
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        low, high = row["giou_loss_interval_95"]
        rate = row["tokens_per_s"]
        lines.append(
            f"| {row['precision']} | {row['side']} px | {row['reply']} | {row['giou']:.3f} "
            f"| {row['giou_loss']:+.3f} ({low:+.3f} to {high:+.3f}) | {row['gate']} "
            f"| {row['tokens_per_question']:.0f}, {'–' if rate is None else format(rate, '.0f')} "
            f"| {row['latency_ms']['p50']:.0f} / {row['latency_ms']['p90']:.0f} ms "
            f"| {row['peak_memory_bytes'] / 1e6:.0f} MB | {'yes' if row['on_front'] else ''} |"
        )
    return "\n".join([*lines, *(f"could not run: {one['name']}: {one['reason']}" for one in problems)])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed_accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("test", metavar="TEST", help="a dataset folder, as `segzero scenes` writes it")
    parser.add_argument(
        "--bundle", type=_named_folder, action="append", required=True, metavar="NAME=DIR",
        help="a bundle and its name in the table; may be repeated, the first is the reference",
    )  # fmt: skip
    parser.add_argument(
        "--sides", type=_sides, default=[], metavar="PX,PX",
        help="sides of the policy's picture besides each bundle's own (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--replies", type=_replies, default=[ReplyRule.parse("free")], metavar="RULE,RULE",
        help="free, think:N (thinking closed after N tokens), tokens:N (reply cut); default: free",
    )  # fmt: skip
    parser.add_argument("--questions", type=positive_integer, default=100, metavar="N", help="the first N (100)")
    parser.add_argument("--limit", type=float, default=0.02, metavar="GIOU", help="largest loss within the gate (0.02)")
    parser.add_argument("--cores", type=positive_integer, default=2, metavar="N", help="that processes may use (2)")
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="of each graph (default: the cores)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep what is measured, and go on from there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latency against gIoU (needs matplotlib)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the result file")
    arguments = parser.parse_args(argv)
    names = [name for name, _ in arguments.bundle]
    if len(set(names)) != len(names):
        parser.error(f"expected bundles of different names, got {', '.join(names)}")
    arguments.bundle = dict(arguments.bundle)
    return arguments


def _named_folder(text: str) -> tuple[str, Path]:
    """An argparse type."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, got {text[:60]!r}")
    return name, Path(folder)


def _sides(text: str) -> list[int]:
    """An argparse type."""
    return [positive_integer(part) for part in text.split(",")]


def _replies(text: str) -> list[ReplyRule]:
    """An argparse type."""
    try:
        return [ReplyRule.parse(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    run_and_exit(main, "speed_accuracy")
