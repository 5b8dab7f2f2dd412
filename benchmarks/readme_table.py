"""The measured tables of README.md and benchmarks/README.md, made from the newest result of each program.

    python -m benchmarks.readme_table            rewrites what stands between the markers
    python -m benchmarks.readme_table --check    says which would change, with exit status 1

A marker is `<!-- NAME: python -m benchmarks.readme_table -->`; the table ends at `<!-- end of NAME -->`. A test holds
both files to the results, and the results of the shipped weights to the bundle that ships.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from segzero_rt.bundle import EMBEDDED
from segzero_rt.commands.output_files import write_text

from .avoided_costs import ALL_COSTS
from .measuring import RESULTS

REPOSITORY = Path(__file__).parent.parent
KINDS = ("name", "attribute", "relation", "several", "none", "function", "consequence", "compositional")
SPLITS = {
    "ood_colour": "kinds in colours never drawn in training",
    "ood_relation": "relations never asked of a kind",
    "ood_wording": "function and consequence in other words",
    "ood_function": "uses never asked about",
}
BUSY_LOAD = 1.0
"""Load average beyond the cores that were measured on: their own work makes up the rest."""
HIGH_PRIORITY = -15
"""Of a scheduling group: from here on it gets nine tenths of a core that three everyday groups want as well."""
CORES = {"1": "one core", "2": "two cores"}


def newest(name: str, results: Path = RESULTS) -> tuple[str, dict[str, Any]]:
    """File name and document of the latest result called `name`, whatever the cores.

    Raises:
        FileNotFoundError: there is none.
    """
    return list(newest_of_each(name, results).values())[-1]


def newest_of_each(name: str, results: Path = RESULTS) -> dict[str, tuple[str, dict[str, Any]]]:
    """Likewise the latest for each number of cores, the latest of all last; "" where the name tells none.

    Raises:
        FileNotFoundError: there is none.
    """
    pattern = re.compile(rf"{re.escape(name)}(?:_(\d+)cores)?_(\d{{8}})\.json")
    found = [(match, path) for path in results.iterdir() if (match := pattern.fullmatch(path.name))]
    if not found:
        raise FileNotFoundError(f"expected a result called {name}_<date>.json in {results}; run its program")
    latest: dict[str, Path] = {}
    for match, path in sorted(found, key=lambda one: (one[0][2], one[1])):
        latest.pop(match[1] or "", None)
        latest[match[1] or ""] = path
    return {cores: (path.name, json.loads(path.read_text(encoding="utf-8"))) for cores, path in latest.items()}


def quality(results: Path) -> str:
    """gIoU of what ships, of the float16 bundle, and of the base policy in float16, by kind of question."""
    (_, int8), (_, float16) = newest("eval_test300_int8", results), newest("eval_test300_float16", results)
    _, base = newest("eval_test300_base_float16", results)
    _, trivial = newest("trivial_baselines", results)
    size = sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file())
    rows = [
        ["gIoU of the embedded `tabletop` bundle", "all", *KINDS],
        [f"int8 (what ships, {size / 2**20:.0f} MiB)", *_scores(int8)],
        ["float16", *_scores(float16)],
        ["float16, before reinforcement", *_scores(base)],
    ]
    low, high = int8["giou_interval_95"]
    parsed = round(int8["parse_rate"] * int8["num_samples"])
    best = max(row["giou"] for row in trivial["baselines"].values())
    return (
        f"{table(rows)}\n\n95 % interval of int8 over all: {low:.3f} to {high:.3f}. {parsed} of {int8['num_samples']} "
        f"answers parse under free decoding.\nNothing that ignores the question or the picture gets beyond {best:.3f} "
        "(`python -m benchmarks.trivial_baselines`)."
    )


def _scores(document: dict[str, Any], of_kind: Callable[[Any], float] = lambda kind: kind["giou"]) -> list[str]:
    return [f"{document['giou']:.3f}", *(f"{of_kind(document['by_kind'][kind]):.3f}" for kind in KINDS)]


def speed(results: Path) -> str:
    """Questions and whole processes against transformers."""
    rows = [["speed on x86-64, medians of one run with both sides", "segzero-rt", "transformers", "ratio"]]
    for storage, shown in (("float16", "float16 weights"), ("int8", "int8 as it ships")):
        command = f" (`python -m benchmarks.baseline{' --time-different' * (storage == 'int8')}`)"
        for threads, side in newest(f"baseline_{storage}", results)[1]["by_threads"].items():
            rows.append([f"one question, {shown}, {CORES[threads]}: {_sameness(side)}{command}", *_times(side)])
            command = ""
        rows += _compiled_rows(storage, results)
    _, process = newest("process", results)
    wall, peak = process["wall_ms"], process["peak_bytes"]
    what = f"`segzero run` as a whole process, int8, {CORES[str(process['threads'])]}, {wall['num_pairs']} runs"
    seconds = [f"{wall[f'{side}_median'] / 1e3:.2g} s" for side in ("segzero", "baseline")]
    rows.append([f"{what} (`python -m benchmarks.process`)", *seconds, f"{wall['ratio']:.1f}x"])
    bytes_ = [f"{peak[f'{side}_median'] / 1e6:.0f} MB" for side in ("segzero", "baseline")]
    rows.append(["its peak memory", *bytes_, f"{1 / peak['ratio']:.2f}"])
    return table(rows)


def _compiled_rows(storage: str, results: Path) -> list[list[str]]:
    """The same against compiled models, on as many cores as that was measured on."""
    name = f"baseline_{storage}_compiled"
    if not any(results.glob(f"{name}_*.json")):
        return []
    document = newest(name, results)[1]
    beside = ", beside other work" if busy(document) else ""
    what = f"transformers by `torch.compile`{beside} (`python -m benchmarks.baseline --compiled`)"
    return [
        [f"the same, {CORES[threads]}, {what}: {_sameness(side)}", *_times(side)]
        for threads, side in document["by_threads"].items()
    ]


def _sameness(side: dict[str, Any]) -> str:
    if side["num_equal"] == side["num_timed"]:
        return f"the same {side['num_equal']} of {side['num_questions']} replies"
    return f"{side['num_equal']} of {side['num_questions']} replies equal, masks alike at {side['mask_iou']:.2f} IoU"


def _times(side: dict[str, Any]) -> list[str]:
    times = side["end_to_end_ms"]
    return [f"{times['segzero_median']:.0f} ms", f"{times['baseline_median']:.0f} ms", f"{times['ratio']:.1f}x"]


def splits(results: Path) -> str:
    """gIoU on the splits that hold combinations out."""
    name, document = newest("ood_splits", results)
    rows = [[f"split, int8 (`{name}`)", "gIoU", "95 % interval", "test's gIoU over the same kinds", "false none"]]
    for split, what in SPLITS.items():
        row = document["splits"][split]
        low, high = row["giou_interval_95"]
        same = row["same_kinds_on_test"]["giou"]
        interval = f"{low:.3f} to {high:.3f}"
        rows.append(
            [f"{split}: {what}", f"{row['giou']:.3f}", interval, f"{same:.3f}", f"{_percent(row['false_none_rate'])}"]
        )
    return table(rows)


def brevity(results: Path) -> str:
    """gIoU behind thinking that words were left out of."""
    name, document = newest("thinking_brevity", results)
    rows = [[f"thinking, int8 (`{name}`)", "words and marks", "gIoU", *KINDS]]
    for rule, row in document["rules"].items():
        rows.append([rule, f"{row['marks']:.1f}", *_scores(row, lambda kind: kind)])
    return table(rows)


def decoders(results: Path) -> str:
    """The decoder alone against other runtimes, for the bits and cores that were measured."""
    parts = []
    for storage in ("float32", "int4"):
        if not any(results.glob(f"decoder_peers_{storage}_*.json")):
            continue
        parts += [
            _decoder_peers(*one) for _, one in sorted(newest_of_each(f"decoder_peers_{storage}", results).items())
        ]
    return "\n\n".join(parts)


def _decoder_peers(name: str, document: dict[str, Any]) -> str:
    shape = document["shape"]
    what = f"{name.split('_')[2]}, {shape['num_layers']} layers of width {shape['hidden_size']}"
    columns = {
        "prefill_ms": f"prefill of {document['prompt_tokens']}",
        "token_ms": "a token",
        "answer_ms": f"an answer of {document['new_tokens']}",
    }
    rows = [[f"{what}, {CORES[str(document['threads'])]} (`{name}`)", *columns.values(), "equal tokens"]]
    for side, row in document["sides"].items():
        label = f"{side} ({row['version']})" if "version" in row else side
        if "problem" in row:
            rows.append([label, row["problem"], *[""] * len(columns)])
            continue
        ratios = row.get("ratios")
        cells = [f"{row[key]:.1f} ms" + (f" ({ratios[key]:.2f}x)" if ratios else "") for key in columns]
        rows.append([label, *cells, f"{row['equal_tokens']} of {document['new_tokens']}"])
    return table(rows) + busy(document)


def predictor(results: Path) -> str:
    """The whole segmenter against SAM 2's own predictor."""
    if not any(results.glob("segmenter_predictor_hiera_t_*.json")):
        return "Not measured yet: `python -m benchmarks.segmenter_predictor --package .venv-sam2`."
    rows: list[list[str]] = []
    for _, (name, document) in sorted(newest_of_each("segmenter_predictor_hiera_t", results).items()):
        rows = rows or [["SAM 2.1 tiny, 1024 x 1024, picture and one prompt", "segzero-rt", f"sam2 {document['sam2']}"]]
        times = document["picture_and_prompt_ms"]
        took = [f"{times[f'{side}_median']:.0f} ms" for side in ("segzero", "baseline")]
        what = f"{CORES[str(document['threads'])]}, masks within {document['relative_error']:.0e} (`{name}`)"
        rows.append([what, *took, f"{times['ratio']:.2f}x"])
    rows[0].append("ratio")
    return table(rows) + busy(document)


def encoders(results: Path) -> str:
    """SAM 2.1's image encoder alone against PyTorch."""
    columns = {
        "segzero": "segzero-rt",
        "functions": "by ONNX Runtime's operators alone",
        "pytorch eager": "PyTorch",
        "torch.compile": "`torch.compile`",
    }
    rows, document = [["SAM 2.1's image encoder, float32, 1024 x 1024", *columns.values()]], {}
    for size, title in (("hiera_t", "tiny"), ("hiera_l", "large")):
        name, document = newest(f"segmenter_encoder_{size}", results)
        cells = []
        for side in columns:
            took, error = median(document["encoder_ms"][side]), document["relative_error"][side]
            ratio = document["ratios"][side]["ratio"] if side in document["ratios"] else 1
            beside = "" if side == "segzero" else f", {ratio:.2f}x"
            cells.append(
                f"{took:.0f} ms{beside}" + (f", within {error:.0e}" if side in ("segzero", "functions") else "")
            )
        rows.append([f"{title}, {CORES[str(document['threads'])]} (`{name}`)", *cells])
    return table(rows) + busy(document)


def arm64(results: Path) -> str:
    """The runtime's tests under qemu, and how far its answers are from those of x86-64."""
    rows = [["wheels", "tests passed", "failed", "skipped", "answers beside x86-64's"]]
    for variant in ("", "_jetpack6"):
        name, document = newest(f"arm64_tests{variant}", results)
        wheels, total = document["arm64"]["wheels"], document["tests"]["total"]
        answers = document["answers_x86_arm64"].values()
        alike = sum(one["same_thinking"] and len(set(one["status"])) == 1 for one in answers)
        edge, iou = max(one["box_difference_px"] for one in answers), min(one["mask_iou"] for one in answers)
        rows.append(
            [
                f"onnxruntime {wheels['onnxruntime']}, NumPy {wheels['numpy']} (`{name}`)",
                *(str(total.get(outcome, 0)) for outcome in ("passed", "failure", "skipped")),
                f"{alike} of {len(answers)} say the same, edges within {edge:.0f} pixels, masks' IoU from {iou:.3f}",
            ]
        )
    return table(rows)


def speed_accuracy(results: Path) -> str:
    """Every combination of weights, picture and reply, with what it costs in gIoU."""
    name, document = newest("speed_accuracy", results)
    head = ("weights", "picture", "reply", "gIoU", "lost against the first row, 95 % interval", "tokens a second")
    rows = [[*head, "latency p50 / p90", "memory", "front"]]
    for row in document["configurations"]:
        low, high = row["giou_loss_interval_95"]
        rate = row["tokens_per_s"]
        rows.append(
            [
                row["precision"],
                f"{row['side']} px",
                row["reply"],
                f"{row['giou']:.3f}",
                f"{row['giou_loss']:.3f} ({low:.3f} to {high:.3f})" if len(rows) > 1 else "",
                "" if rate is None else f"{rate:.0f}",
                f"{row['latency_ms']['p50']:.0f} / {row['latency_ms']['p90']:.0f} ms",
                f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
                "yes" if row["on_front"] else "",
            ]
        )
    questions, cores = document["configurations"][0]["num_samples"], CORES[str(document["cores"])]
    int8 = next((row["bundle"]["sha256"] for row in document["configurations"] if row["precision"] == "int8"), "")
    return f"{questions} questions, {cores} (`{name}`):\n\n{table(rows)}{busy(document)}{shipped_before(int8)}"


def avoided_costs(results: Path) -> str:
    """What a question would take without each saving, beside what it takes."""
    return "\n\n".join(
        _avoided_costs(storage, *newest(name, results))
        for storage, name in (("float16", "avoided_costs_float16"), ("int8", "avoided_costs"))
    )


def _avoided_costs(storage: str, name: str, document: dict[str, Any]) -> str:
    by_threads = document["by_threads"]
    head = [f"median of a question, {storage} (`{name}`)"]
    for threads in by_threads:
        head += [f"{CORES[threads]}: before", "now", "ratio"]
    rows = [[*head, "gIoU before / now", "equal answers"]]
    by_cost: dict[str, dict[str, dict[str, Any]]] = {}
    for threads, one in by_threads.items():
        for cost, row in one["costs"].items():
            by_cost.setdefault(cost, {})[threads] = row | {"of": one["num_questions"]}
    together = by_cost.pop(ALL_COSTS)
    most = lambda of_cost: max(row["saved_ms"] for row in of_cost.values())  # noqa: E731
    for cost, of_cost in [*sorted(by_cost.items(), key=lambda one: -most(one[1])), (ALL_COSTS, together)]:
        cells = [cost]
        for threads in by_threads:
            times = of_cost[threads]["end_to_end_ms"] if threads in of_cost else None
            cells += (
                [f"{times['before']:.1f} ms", f"{times['now']:.1f} ms", f"{times['ratio']:.2f}x"] if times else [""] * 3
            )
        row = list(of_cost.values())[-1]
        scores = f"{row['giou']['before']:.3f} / {row['giou']['now']:.3f}"
        rows.append([*cells, scores, f"{row['equal_answers']} of {row['of']}"])
    measured = next(iter(by_threads.values()))["bundle"]["sha256"]
    older = shipped_before(measured) if storage == "int8" else ""
    return table(rows) + busy(document) + older


def stages(results: Path) -> str:
    """`segzero bench` on what ships: each stage alone, beside what the machine could do."""
    name, document = newest("stages", results)
    rows = [[f"stage alone, int8, median (`{name}`)", *_each(document, lambda _: ["", "of ceiling"])]]
    for column, threads in enumerate(document["by_threads"]):
        rows[0][1 + 2 * column] = CORES[threads]
    every = dict.fromkeys(stage for one in document["by_threads"].values() for stage in one["stages_apart_ms"])
    for stage in every:
        rows.append([stage.replace("_", " "), *_each(document, lambda one, stage=stage: _alone(one, stage))])
    totals: list[tuple[str, Callable[[dict[str, Any]], float], str]] = [
        ("end to end, p50 / p90 / p99", lambda one: one["end_to_end_ms"], "ms"),
        ("further question on a picture, p50 / p90 / p99", lambda one: one["repeated_frame"]["end_to_end_ms"], "ms"),
    ]
    for label, pick, unit in totals:
        rows.append([label, *_each(document, lambda one, pick=pick, unit=unit: [f"{_three(pick(one))} {unit}", ""])])
    rates = lambda one: [f"{one['throughput_per_s']:.1f} / {one['offline']['throughput_per_s']:.1f}", ""]  # noqa: E731
    rows.append(["questions a second, single stream / offline", *_each(document, rates)])
    cold = lambda one: [f"{one['cold_start']['cached']['process_ms']:.0f} ms", ""]  # noqa: E731
    rows.append(["new process to its first answer, files cached", *_each(document, cold)])
    return table(rows) + busy(document)


def _each(document: dict[str, Any], cells: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    return [cell for one in document["by_threads"].values() for cell in cells(one)]


def _alone(one: dict[str, Any], stage: str) -> list[str]:
    fraction = one["fraction_of_ceiling"].get(stage)
    return [f"{one['stages_apart_ms'][stage]['p50']:.2f} ms", "" if fraction is None else _percent(fraction)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _three(row: dict[str, float]) -> str:
    return " / ".join(f"{row[key]:.0f}" for key in ("p50", "p90", "p99"))


def busy(document: dict[str, Any]) -> str:
    """A line that goes below figures that were taken while others worked on the machine as well; else nothing."""
    card = document["environment"]
    load = (card["load_average"] or [0.0])[0]
    if load <= card["cores"] + BUSY_LOAD:
        return ""
    busy_with = f"load average {load:.1f} on {CORES.get(str(card['cores']), 'many cores')}"
    nice = card.get("scheduling_group_nice")
    if nice is not None and nice <= HIGH_PRIORITY:
        return f"\n\nTaken beside other work ({busy_with}) that had to give way: one core hardly shows it, two may."
    return f"\n\nTaken on a busy machine ({busy_with}): to be taken again."


def shipped_before(sha256: str) -> str:
    """A line that goes below figures of an int8 bundle that is not the one that ships any more; else nothing."""
    return "" if sha256 == shipped_bundle() else "\n\nTaken with a bundle that shipped before the present one."


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first row its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


TABLES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"quality": quality, "speed": speed},
    "benchmarks/README.md": {
        "splits": splits,
        "stages": stages,
        "decoders": decoders,
        "predictor": predictor,
        "encoders": encoders,
        "arm64": arm64,
        "brevity": brevity,
        "speed and accuracy": speed_accuracy,
        "avoided costs": avoided_costs,
    },
}


def rewritten(text: str, tables: dict[str, Callable[[Path], str]], results: Path = RESULTS) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: a marker is missing, or there twice.
        FileNotFoundError: a result is missing.
    """
    for name, make in tables.items():
        begin, end = f"<!-- {name}: python -m benchmarks.readme_table -->\n", f"\n<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise ValueError(f"expected one table between {begin.strip()} and {end.strip()}, got another page")
        before, rest = text.split(begin)
        text = before + begin + make(results) + end + rest.split(end, 1)[1]
    return text


def measured_bundle(results: Path = RESULTS) -> dict[str, str]:
    """Program to the hash of the bundle whose int8 figures README shows."""
    names = ("eval_test300_int8", "ood_splits")
    hashes = {name: newest(name, results)[1]["bundle"]["sha256"] for name in names}
    for threads, side in newest("baseline_int8", results)[1]["by_threads"].items():
        hashes[f"baseline_int8 on {CORES[threads]}"] = side["bundle"]["sha256"]
    for threads, side in newest("stages", results)[1]["by_threads"].items():
        hashes[f"stages on {CORES[threads]}"] = side["environment"]["bundle"]["sha256"]
    return hashes


def shipped_bundle() -> str:
    """Hash of the embedded bundle's manifest."""
    return hashlib.sha256((EMBEDDED / "manifest.json").read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="tables of the pages, from the results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page would change")
    arguments = parser.parse_args()
    stale = []
    for page, tables in TABLES.items():
        path = REPOSITORY / page
        text = path.read_text(encoding="utf-8")
        if (new := rewritten(text, tables)) != text:
            stale.append(page)
            if not arguments.check:
                write_text(path, new)
    for page in stale:
        print(f"{page}: {'differs from the results' if arguments.check else 'written'}", file=sys.stderr)
    return int(bool(stale) and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
