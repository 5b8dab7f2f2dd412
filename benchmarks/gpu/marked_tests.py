"""Runs the tests that are marked `gpu`, and counts what became of them."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from .errors import GpuCheckError
from .stages import Context, Figures

ROOT = Path(__file__).resolve().parents[2]
_NO_TESTS = 5
"""pytest's exit status where nothing was collected."""


def run(context: Context) -> Figures:
    """Counts, and the names of those that failed or were skipped with their reasons.

    Raises:
        GpuCheckError: pytest itself broke down, or there are no such tests.
    """
    report = context.work / "gpu_tests.xml"
    report.unlink(missing_ok=True)
    marker = "gpu" if context.device == "cuda" else "not gpu and not slow"
    paths = ["tests"] if context.device == "cuda" else ["tests/test_kernel_registers.py"]
    command = [sys.executable, "-m", "pytest", "-m", marker, "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    # A file whose packages are not there must not keep the others from running; it is among the failed ones.
    command += ["--continue-on-collection-errors"]
    status = subprocess.run([*command, *paths], cwd=ROOT, stdout=sys.stderr, check=False).returncode
    if status == _NO_TESTS or not report.is_file():
        raise GpuCheckError(f"expected tests marked {marker}, pytest ended with {status} and ran none; see its log")
    return read_report(report.read_text(encoding="utf-8"))


def read_report(xml: str) -> Figures:
    """What a JUnit report says.

    Raises:
        GpuCheckError: it is no such report, or of no tests.
    """
    try:
        cases = list(ET.fromstring(xml).iter("testcase"))
    except ET.ParseError as error:
        raise GpuCheckError(f"expected pytest's report, got {error}; run the tests again") from error
    if not cases:
        raise GpuCheckError("expected tests in pytest's report, got none; run the tests again")
    kinds: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        for child in case:
            kind = {"failure": "failed", "error": "failed", "skipped": "skipped"}.get(child.tag)
            if kind is not None:
                kinds[kind][name] = (child.get("message") or "")[:300]
    bad = len(kinds["failed"]) + len(kinds["skipped"])
    seconds = sum(float(case.get("time") or 0) for case in cases)
    return {"tests": len(cases), "passed": len(cases) - bad, "seconds": seconds, **kinds}
