"""The runtime's tests and real questions on an emulated arm64 machine: `python -m benchmarks.arm64_tests .venv-arm64`.

Needs `python -m benchmarks.emulated_arm64 .venv-arm64` first. Installs the checkout's wheel there, kernels compiled for
arm64, asks the shipped bundle here and there, then runs every test of the runtime that needs no PyTorch; what those
tests want exported is exported here. Emulated, nothing of it says how fast an arm64 machine is.

An hour on one core, hours where other work runs beside it. So files run one by one, each with a limit of its own, and
what one came to is kept in the machine's folder: stopped, the same command goes on behind the last file that ended;
another wheel begins anew.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.emulated_arm64 import PROCESSOR, REPOSITORY, EmulatedArm64, MachineError
from benchmarks.measuring import write_result
from segzero_rt.kernels.backend import KERNELS_VARIABLE
from segzero_rt.mask import decode_rle, mask_iou
from segzero_rt.operators.library import OPERATORS_VARIABLE

PICTURE = REPOSITORY / "docs/tabletop.png"
QUESTIONS = ("the spoon", "the green scissors", "dinner is ready to be served, what helps")
PROMPT_OPTIONS = ("--box", "210,52,322,180", "--json")
LIMIT_S = 3600
PRESENT = frozenset({"numpy", "cv2", "PIL", "onnxruntime", "pytest", "onnx", "tokenizers", "packaging"})
"""Modules that the emulated machine has beside Python's own."""
OTHER_PARTS = frozenset({"export", "training", "benchmarks"})
"""Folders of the checkout that are no part of the runtime."""
FUZZERS = frozenset({"benchmarks.kernel_fuzz", "benchmarks.answer_mutants"})
"""What the tests of the runtime's kernels take from there all the same."""
_KERNELS = (
    "from segzero_rt.kernels.backend import resolve_kernels; from segzero_rt.environment import environment_card; "
    "import json; print(json.dumps({'kernels': resolve_kernels().detail, 'environment': environment_card()}))"
)


def runtime_tests() -> list[Path]:
    """Test files that import the runtime, no other part of the checkout, and nothing that is not `PRESENT`."""
    return [path for path in sorted((REPOSITORY / "tests").glob("test_*.py")) if _is_of_the_runtime(path)]


def _is_of_the_runtime(path: Path) -> bool:
    tops = {name.split(".")[0] for name in _imported(path) - FUZZERS}
    return "segzero_rt" in tops and not tops & OTHER_PARTS and not _missing(path, set())


def _missing(path: Path, seen: set[Path]) -> set[str]:
    """Modules that importing this file would want and that are not there, followed through the checkout."""
    seen.add(path)
    missing: set[str] = set()
    for name in _imported(path):
        if name.split(".")[0] in sys.stdlib_module_names | PRESENT | {"segzero_rt"}:
            continue
        beside, below = path.parent / f"{name}.py", REPOSITORY / f"{name.replace('.', '/')}.py"
        found = next((file for file in (beside, below) if file.is_file()), None)
        if found is None:
            missing.add(name)
        elif found not in seen:
            missing |= _missing(found, seen)
    return missing


def _imported(path: Path) -> set[str]:
    """What is imported when the file is, `pytest.importorskip` included; imports inside functions are not."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Expr | ast.Assign):
            names |= set(re.findall(r"^pytest\.importorskip\('([\w.]+)'", ast.unparse(node.value)))
    return names


def ask(segzero: Path, question: str, machine: EmulatedArm64 | None = None) -> dict[str, Any]:
    """`segzero run --json` on the picture that ships, here or on the machine.

    Raises:
        MachineError: it does not answer.
    """
    return _document([segzero, "run", PICTURE, question, "--json"], machine)


def segment(segzero: Path, machine: EmulatedArm64 | None = None, kernels: str = "auto") -> dict[str, Any]:
    """`segzero segment --json` of a box on the same picture, with one build of the kernels.

    Raises:
        MachineError: it fails.
    """
    return _document([segzero, "segment", PICTURE, *PROMPT_OPTIONS], machine, kernels)


def _document(command: Sequence[str | Path], machine: EmulatedArm64 | None, kernels: str = "auto") -> dict[str, Any]:
    # Both sides by ONNX Runtime's own operators: the compiled ones, which only x86-64 has, round in other places.
    environment = {KERNELS_VARIABLE: kernels, OPERATORS_VARIABLE: "reference"}
    if machine is not None:
        done = machine.run(command, timeout_s=LIMIT_S, environment=environment)
    else:
        here = [str(part) for part in command]
        done = subprocess.run(
            here, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, **environment}
        )
    if done.returncode:
        said = done.stderr.strip()[-500:]
        raise MachineError(f"expected an answer of {command[0]}, it ended with status {done.returncode}: {said}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def likeness(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How alike two documents of one question are: what they say, and object by object their boxes and masks."""
    pairs = list(zip(one["objects"], other["objects"], strict=False))
    return {
        "status": [one["status"], other["status"]],
        "objects": [len(one["objects"]), len(other["objects"])],
        "same_thinking": one["thinking"] == other["thinking"],
        "box_difference_px": max((_box_difference(a["box_xyxy"], b["box_xyxy"]) for a, b in pairs), default=0.0),
        "mask_iou": min(
            (mask_iou(decode_rle(a["mask_rle"]), decode_rle(b["mask_rle"])) for a, b in pairs), default=1.0
        ),
    }


def _box_difference(one: Sequence[float] | None, other: Sequence[float] | None) -> float:
    """Largest difference of an edge, in pixels; infinite where one has no box."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def run_tests(machine: EmulatedArm64, files: Sequence[Path], bundles: Path, *, timeout_s: float) -> dict[str, Any]:
    """Runs test files on the machine, slow tests left out; the package that they test is the installed one.

    Args:
        bundles: A folder as `tests/tiny_bundles.py` writes it.

    Returns:
        Seconds, counts of each file by outcome, and the failures with their messages.

    Raises:
        MachineError: pytest could not run, or was not done in time.
    """
    with tempfile.TemporaryDirectory(prefix="segzero-arm64-") as folder:
        report = Path(folder) / "report.xml"
        # Neither the folder where it is started nor pytest's own setting puts the checkout before what is installed.
        options = ["-q", "-p", "no:cacheprovider", "-o", "pythonpath=", "-m", "not slow and not gpu"]
        command: list[str | Path] = [
            machine.python,
            "-P",
            "-m",
            "pytest",
            *options,
            f"--rootdir={REPOSITORY}",
            f"--junitxml={report}",
        ]
        start = time.monotonic()
        environment = {"SEGZERO_TEST_BUNDLES": str(bundles.resolve()), "SEGZERO_TEST_EMULATED": "qemu"}
        done = machine.run([*command, *files], timeout_s=timeout_s, environment=environment)
        if not report.is_file():
            raise MachineError(f"expected pytest to run on arm64, it says: {(done.stdout + done.stderr)[-500:]}")
        return {"seconds": round(time.monotonic() - start), **read_report(report.read_text("utf-8"))}


def read_report(xml: str) -> dict[str, Any]:
    """Outcomes in pytest's JUnit report, by file, and the failures."""
    files: dict[str, collections.Counter[str]] = {}
    failures: dict[str, str] = {}
    skipped: collections.Counter[str] = collections.Counter()
    for case in ElementTree.fromstring(xml).iter("testcase"):
        found = [node for node in case if node.tag in ("failure", "error", "skipped")]
        outcome = found[0].tag if found else "passed"
        name = case.get("classname", "").rpartition(".")[2] or case.get("name", "")
        files.setdefault(name, collections.Counter())[outcome] += 1
        if outcome == "skipped":
            skipped[found[0].get("message", "")] += 1
        elif found:
            failures[f"{name}::{case.get('name')}"] = (found[0].get("message") or "")[:300]
    total: collections.Counter[str] = sum(files.values(), collections.Counter())
    return {"total": dict(total), "files": files, "skipped": dict(skipped), "failures": failures}


def run_each(machine: EmulatedArm64, files: Sequence[Path], bundles: Path, *, timeout_s: float) -> dict[str, Any]:
    """Runs test files one by one, as `run_tests`; what ended before, with the same wheel and the same file, is not run.

    Args:
        timeout_s: of one file; one that does not end in time counts as a failure.

    Returns:
        As `run_tests`, for all files together.
    """
    notes = machine.folder / "tests.jsonl"
    known = dict(json.loads(line) for line in notes.read_text("utf-8").splitlines()) if notes.is_file() else {}
    results = []
    for path in files:
        digest = hashlib.sha256(machine.installed().encode() + path.read_bytes()).hexdigest()
        if digest not in known:
            try:
                known[digest] = run_tests(machine, [path], bundles, timeout_s=timeout_s)
            except MachineError as error:
                known[digest] = _not_ended(path.stem, str(error))
            else:
                with notes.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps([digest, known[digest]]) + "\n")
        results.append(known[digest])
        print(f"arm64: {path.stem}: {known[digest]['total']}", file=sys.stderr, flush=True)
    return merged(results)


def _not_ended(name: str, reason: str) -> dict[str, Any]:
    counts = {"error": 1}
    return {"seconds": 0, "total": counts, "files": {name: counts}, "skipped": {}, "failures": {name: reason[:300]}}


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of `run_tests` as that of one run."""
    total: collections.Counter[str] = collections.Counter()
    skipped: collections.Counter[str] = collections.Counter()
    whole: dict[str, Any] = {"seconds": 0, "total": total, "files": {}, "skipped": skipped, "failures": {}}
    for one in results:
        whole["seconds"] += one["seconds"]
        total.update(one["total"])
        skipped.update(one["skipped"])
        whole["files"] |= one["files"]
        whole["failures"] |= one["failures"]
    return whole


@contextlib.contextmanager
def exported_bundles() -> Iterator[Path]:
    """A folder of the bundles that tests want, made by this Python, which has PyTorch."""
    with tempfile.TemporaryDirectory(prefix="segzero-bundles-") as folder:
        subprocess.run([sys.executable, str(REPOSITORY / "tests/tiny_bundles.py"), folder], check=True)
        yield Path(folder)


def facts(machine: EmulatedArm64) -> dict[str, Any]:
    """The emulated machine as the runtime sees it, with the kernels that it chooses.

    Raises:
        MachineError: the package does not import there.
    """
    done = machine.run([machine.python, "-P", "-c", _KERNELS], timeout_s=LIMIT_S)
    if done.returncode:
        raise MachineError(f"expected the installed package to import on arm64, it says: {done.stderr[-500:]}")
    seen = json.loads(done.stdout.replace(f"{machine.folder}/", ""))  # where the folder lies says nothing to a reader
    return {"processor": PROCESSOR, "wheels": machine.packages(), **seen}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the emulated machine")
    parser.add_argument("files", type=Path, nargs="*", help="test files; all of the runtime's if none is named")
    parser.add_argument("--variant", default="", help="goes into the result file's name")
    options = parser.parse_args(arguments)
    try:
        machine = EmulatedArm64.open(options.folder)
        machine.install_project()
        here = Path(sys.executable).parent / "segzero"
        answers = {
            question: likeness(ask(here, question), ask(machine.segzero, question, machine)) for question in QUESTIONS
        }
        print(json.dumps(answers, indent=1), flush=True)
        with exported_bundles() as bundles:
            tests = run_each(machine, options.files or runtime_tests(), bundles, timeout_s=LIMIT_S)
        document = {"arm64": facts(machine), "answers_x86_arm64": answers, "tests": tests}
    except MachineError as error:
        print(f"arm64: {error}", file=sys.stderr)
        return 2
    path = write_result("arm64_tests", document, variant=options.variant)
    print(json.dumps({key: tests[key] for key in ("seconds", "total", "failures")}, indent=1), path, sep="\n")
    return 1 if tests["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
