"""Stages of the GPU check: within a call's time, resumed where they ended, one process a step."""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import running, toolkit
from benchmarks.gpu.calls import plan_calls
from benchmarks.gpu.errors import GpuCheckError
from benchmarks.gpu.install import check_wheel
from benchmarks.gpu.machine import file_word, find_nvcc
from benchmarks.gpu.marked_tests import read_report
from benchmarks.gpu.results import result_path, write_result
from benchmarks.gpu.roofline import Peaks
from benchmarks.gpu.running import DONE, FAILED, LEFT, SKIPPED, TIMEOUT, Budget, read_state, run_stages, run_step
from benchmarks.gpu.stages import STAGES, Context, Stage, Step, bind, choose
from benchmarks.gpu.toolkit import driver_folder, toolkit_root


def stage_of(*minutes: float, name: str = "stage") -> Stage:
    steps = tuple(Step(name=f"s{index}", function="roofline:measure", minutes=one) for index, one in enumerate(minutes))
    return Stage(name=name, what="", steps=steps)


def context_in(folder: Path, size: str = "full") -> Context:
    return Context(device="cpu", size=size, work=folder)


class Steps:
    """Stands for processes: takes so long by a clock of its own, and ends as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **outcomes: str) -> None:
        self.now, self.ran, self._outcomes = 0.0, [], outcomes
        monkeypatch.setattr(running, "run_step", self)

    def __call__(self, stage: Stage, step: Step, context: Context, *, limit_s: float) -> dict[str, Any]:
        self.ran.append(f"{stage.name} {step.name}")
        self.now += 60 * step.minutes
        return {"status": self._outcomes.get(step.name, DONE), "figures": {"limit_s": limit_s}}

    def run(self, stages: list[Stage], context: Context, minutes: float = 10, **options: Any) -> dict[str, Any]:
        self.ran.clear()
        self.now = 0.0
        budget = Budget(seconds=60 * minutes, clock=lambda: self.now)
        return run_stages(stages, context, budget, write=lambda *_: None, tell=lambda _: None, **options)


def test_steps_begin_only_where_their_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    outcomes = steps.run([stage_of(4, 4, 4, 1)], context_in(tmp_path))
    assert steps.ran == ["stage s0", "stage s1", "stage s3"], "a shorter one may still fit"
    assert outcomes["stage"]["s2"] == {"status": LEFT}
    assert [outcomes["stage"][name]["figures"]["limit_s"] for name in ("s0", "s1", "s3")] == [585, 345, 105]


def test_a_second_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, context = Steps(monkeypatch), context_in(tmp_path)
    stages = [stage_of(6, 3, name="a"), stage_of(6, name="b")]
    steps.run(stages, context)
    assert steps.ran == ["a s0", "a s1"]
    assert steps.run(stages, context)["a"]["s0"]["status"] == DONE and steps.ran == ["b s0"]
    steps.run(stages, context)
    assert steps.ran == []
    steps.run(stages, context, minutes=100, again=True)
    assert steps.ran == ["a s0", "a s1", "b s0"]
    steps.run(stages, context_in(tmp_path, "tiny"), minutes=100)
    assert steps.ran == ["a s0", "a s1", "b s0"], "of another size nothing is known"


@pytest.mark.parametrize("status", [FAILED, SKIPPED, TIMEOUT])
def test_what_did_not_end_well_is_run_again(status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_in(tmp_path)
    Steps(monkeypatch, s0=status).run([stage_of(1, 1)], context)
    steps = Steps(monkeypatch)
    steps.run([stage_of(1, 1)], context)
    assert steps.ran == ["stage s0"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"s0": 3}', '{"s0": {}}', '{"other": {"status": "done"}}'])
def test_a_damaged_state_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "stage_cpu_full.json").write_text(text)
    assert read_state(context_in(tmp_path), stage_of(1)) == {}


CHILD = """
import json, os, subprocess, sys, time
kind = {kind!r}
if kind == "good":
    print("noise"); print(json.dumps({{"path": os.environ["PYTHONPATH"], "cache": os.environ["SEGZERO_CACHE"]}}))
if kind == "fails":
    print("expected this, got that", file=sys.stderr); sys.exit(2)
if kind == "skips":
    print("no such thing here", file=sys.stderr); sys.exit(3)
if kind == "crashes":
    os.kill(os.getpid(), 11)
if kind == "hangs":
    grandchild = subprocess.Popen(["sleep", "60"]); open({pid!r}, "w").write(str(grandchild.pid)); time.sleep(60)
"""


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("good", DONE, None),
        ("fails", FAILED, "expected this, got that"),
        ("skips", SKIPPED, "no such thing here"),
        ("crashes", FAILED, ""),
        ("hangs", TIMEOUT, ""),
    ],
)
def test_a_step_is_a_process(
    kind: str, status: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, pid = tmp_path / "child", tmp_path / "pid"
    (tmp_path / "site").mkdir()
    program.write_text(f"#!/bin/sh\nexec python3 - <<'E'\n{CHILD.format(kind=kind, pid=str(pid))}\nE\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    outcome = run_step(stage_of(1), stage_of(1).steps[0], context_in(tmp_path), limit_s=2 if kind == "hangs" else 60)
    assert (outcome["status"], outcome.get("said")) == (status, said)
    if kind == "good":
        assert outcome["figures"]["path"].split(os.pathsep)[0] == str(tmp_path / "site")
        assert outcome["figures"]["cache"] == str(tmp_path / "cache")
    if kind == "hangs":
        assert not is_running(int(pid.read_text())), "what a step started ends with it"


def is_running(pid: int) -> bool:
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.is_file() or stat.read_text().split()[2] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_every_step_names_a_function_that_is_there(tmp_path: Path) -> None:
    for stage in STAGES:
        assert stage.minutes > 0 and stage.what
        for step in stage.steps:
            assert callable(bind(step, context_in(tmp_path)))


def test_stages_by_name() -> None:
    assert choose([]) == STAGES
    assert [stage.name for stage in choose(["peaks", "install"])] == ["install", "peaks"], "in their own order"
    with pytest.raises(GpuCheckError, match=r"expected stages of install, .*got 'peak'"):
        choose(["install", "peak"])


@pytest.mark.parametrize("minutes", [0, -1, 9.5])
def test_steps_longer_than_a_call_are_refused(minutes: float) -> None:
    with pytest.raises(GpuCheckError, match="up to 9 minutes"):
        stage_of(minutes)


@pytest.mark.parametrize(("device", "size"), [("gpu", "full"), ("cpu", "huge")])
def test_contexts_that_are_refused(device: str, size: str, tmp_path: Path) -> None:
    with pytest.raises(GpuCheckError, match="expected a device of cuda, cpu and a size of full, tiny"):
        Context(device=device, size=size, work=tmp_path)


def test_calls_of_a_day() -> None:
    calls = plan_calls([stage_of(4, name="a"), stage_of(5, 5, name="b"), stage_of(1, name="c")], ["l1", "l2"])
    assert [(call.carry, call.stages, call.minutes) for call in calls] == [
        ("l1", (), 0.5),
        ("l2", ("a", "b"), 9.5),
        (None, ("b", "c"), 6.5),
    ]
    assert calls[0].command.endswith("run --pieces l1 --receive-only") and calls[2].command.endswith("run b c")
    assert "carrying l2" in calls[1].shown() and "carrying" not in calls[2].shown()
    assert all(call.minutes <= 10 for call in plan_calls(STAGES, ["l1"])), "of the stages there are"
    with pytest.raises(GpuCheckError, match="s0 of 4; part it"):
        plan_calls([stage_of(4)], [], minutes=3)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_80gb_hbm3"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("Orin (nvgpu)", "orin_nvgpu"),
        ("cpu", "cpu"),
        ("../../etc", "etc"),
        ("NVIDIA", "unknown"),
    ],
)
def test_names_of_devices_in_files(name: str, word: str) -> None:
    assert file_word(name) == word


def test_a_result_says_what_where_and_when(tmp_path: Path) -> None:
    stage, card = stage_of(1, name="policy-3b"), {"device": "NVIDIA H200"}
    path = write_result(stage, {"s0": {"status": DONE, "figures": {"a": 1}}}, card, tmp_path / "new", "full", "abc")
    today = datetime.datetime.now(datetime.timezone.utc)
    assert path == result_path(stage, "NVIDIA H200", tmp_path / "new", today)
    assert path.name == f"gpu_policy_3b_h200_{today:%Y%m%d}.json"
    document = json.loads(path.read_text())
    assert (document["what"], document["size"], document["environment"]) == ("gpu_policy-3b", "full", card)
    assert document["steps"]["s0"]["figures"] == {"a": 1} and document["commit"]
    with pytest.raises(ValueError, match="JSON"):
        write_result(stage, {"s0": {"figures": float("nan")}}, card, tmp_path, "full")


PEAKS = Peaks(bytes_per_second=1e12, flops={"bfloat16": 1e15, "float32": 1e13})


@pytest.mark.parametrize(
    ("num_bytes", "operations", "dtype", "seconds", "share", "bound"),
    [
        pytest.param(1e9, 0, "bfloat16", 2e-3, 0.5, "bandwidth", id="bytes alone"),
        pytest.param(1e9, 1e10, "bfloat16", 1e-3, 1.0, "bandwidth", id="few operations"),
        pytest.param(1e9, 1e13, "bfloat16", 2e-2, 0.5, "arithmetic", id="many operations"),
        pytest.param(1e9, 1e11, "float32", 2e-2, 0.5, "arithmetic", id="of a slower type"),
    ],
)
def test_ceilings_by_hand(
    num_bytes: float, operations: float, dtype: str, seconds: float, share: float, bound: str
) -> None:
    found = PEAKS.reached(seconds, num_bytes, operations, dtype)
    assert found["share_of_ceiling"] == pytest.approx(share) and found["bound_by"] == bound
    assert found["share_of_bandwidth"] == pytest.approx(num_bytes / seconds / 1e12)
    assert found["floor_ms"] == pytest.approx(share * found["milliseconds"])


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_ceiling_without_a_time(seconds: float) -> None:
    with pytest.raises(GpuCheckError, match="a time above 0"):
        PEAKS.reached(seconds, 1.0)


@pytest.mark.parametrize("rates", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_rates_that_are_refused(rates: tuple[float, float]) -> None:
    with pytest.raises(GpuCheckError, match="positive rates"):
        Peaks(bytes_per_second=rates[0], flops={"float32": rates[1]})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mako-1.4.3-py3-none-any.whl", None),
        ("pycuda-2026.1.tar.gz", None),
        ("model_outputs.jsonl.gz", None),
        ("x-1-cp27-cp27m-manylinux2014_x86_64.whl", "a wheel for .*pack with --python 3"),
        ("x-1-py3-none-win_amd64.whl", "a wheel for .*pack with --python 3"),
        ("nonsense.whl", "a wheel's name"),
    ],
)
def test_wheels_for_this_python(name: str, message: str | None) -> None:
    if message is None:
        check_wheel(name)
    else:
        with pytest.raises(GpuCheckError, match=message):
            check_wheel(name)


def test_no_nvcc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(GpuCheckError, match="install the CUDA toolkit"):
        find_nvcc()


def test_the_toolkit_by_its_own_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc may be a script that calls another; the linker wants a name that a driver's folder often has not."""
    root, driver = tmp_path / "cuda", tmp_path / "driver"
    for folder in (root / "bin", root / "targets/x86_64-linux/include", driver):
        folder.mkdir(parents=True)
    (root / "targets/x86_64-linux/include/cuda.h").write_text("")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={root}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    assert toolkit_root(str(nvcc)) == root
    (driver / "libcuda.so.1").write_text("")
    link = driver_folder(root, tmp_path / "scratch", [driver]) / "libcuda.so"
    assert link.resolve() == driver / "libcuda.so.1"
    (root / "lib64/stubs").mkdir(parents=True)
    (root / "lib64/stubs/libcuda.so").write_text("")
    assert driver_folder(root, tmp_path / "scratch", [driver]) == root / "lib64/stubs"
    monkeypatch.setattr(toolkit, "find_nvcc", lambda: str(nvcc))
    environment = toolkit.pycuda_environment(tmp_path / "pycuda")
    settings = (Path(environment["HOME"]) / ".aksetup-defaults.py").read_text()
    assert f"CUDA_ROOT = '{root}'" in settings and "CUDA_ENABLE_CURAND = False" in settings
    nvcc.write_text("#!/bin/sh\necho broken >&2\n")
    with pytest.raises(GpuCheckError, match="to name its toolkit, it says: broken"):
        toolkit_root(str(nvcc))


REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one" time="0.5"/><testcase classname="tests.a" name="two[x]" time="1"><failure
message="assert 1 == 2">trace</failure></testcase><testcase classname="tests.b" name="three"><skipped
message="no TensorRT"/></testcase><testcase classname="tests.b" name="four" time="0">
<error message="fixture"/></testcase>
</testsuite></testsuites>"""


def test_what_became_of_tests() -> None:
    assert read_report(REPORT) == {
        "tests": 4,
        "passed": 1,
        "seconds": 1.5,
        "failed": {"tests.a::two[x]": "assert 1 == 2", "tests.b::four": "fixture"},
        "skipped": {"tests.b::three": "no TensorRT"},
    }


@pytest.mark.parametrize("xml", ["", "<testsuites/>", "<a><b>"], ids=["nothing", "no tests", "half"])
def test_reports_that_are_none(xml: str) -> None:
    with pytest.raises(GpuCheckError, match="report"):
        read_report(xml)
