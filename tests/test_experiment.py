"""An experiment as jobs in a folder: equal samples, cost told first, verdicts from intervals, resumed after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs segzero-rt[train]")
pytest.importorskip("matplotlib", reason="needs segzero-rt[train]")

from grpo_runs import TABLETOP_POLICY

from segzero_rt.cli import main
from segzero_rt.errors import SegZeroError
from training.experiments import cost, experiment
from training.experiments.design import EMPTY_THINKING, PRESETS, Arm, ExperimentPreset, answer_alone, debug, tabletop
from training.experiments.intervals import Interval
from training.experiments.jobs import (
    MEASURED,
    Job,
    JobKind,
    Phase,
    Workplace,
    all_jobs,
    label,
    long_jobs,
    timing_jobs,
)
from training.experiments.measures import Score, write_scores
from training.experiments.report import render, write_report
from training.experiments.settings import Settings, claim_folder, read_settings
from training.experiments.verdicts import CLAIMS, Verdict, judge

REPOSITORY = Path(__file__).resolve().parent.parent
ANSWER = '[{"bbox_2d": [1, 2, 3, 4], "point_2d": [2, 3]}]</answer>'


# -- the design --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_arms_get_the_same_effort(name: str) -> None:
    preset = PRESETS[name]()
    samples = {arm: preset.arm_steps(arm, preset.steps) * preset.samples_per_step(arm) for arm in Arm}
    assert len(set(samples.values())) == 1
    assert len({len(preset.rates(arm)) for arm in Arm}) == 1
    assert preset.once_steps() * preset.sft_batch == preset.num_rows
    assert samples[Arm.SFT_ANSWERS] == preset.num_rows * preset.grpo.num_generations
    trained = Counter((job.arm, job.once) for job in all_jobs(preset) if job.kind is JobKind.FINAL)
    assert set(trained.values()) == {len(preset.seeds)} and len(trained) == 6


def test_the_tabletop_experiment_follows_the_recipe() -> None:
    from training.grpo_presets import tabletop as recipe

    preset = tabletop()
    own = {"policy", "rewards", "max_steps", "base_share", "num_runs"}
    differing = {
        f.name for f in dataclasses.fields(preset.grpo) if getattr(preset.grpo, f.name) != getattr(recipe(), f.name)
    }
    assert differing == own
    assert preset.grpo.base_share == 0.0, "what an arm forgets is to be seen"
    assert recipe().rewards.startswith(f"{preset.grpo.rewards}+"), "what rewards it has are the recipe's"
    assert recipe().learning_rate in preset.grpo_rates
    assert len(preset.seeds) >= 3 and preset.test_seed != 7, "the README's test questions stay unseen"


BAD_DESIGNS: dict[str, dict[str, Any]] = {
    "more rates for one method": {"sft_rates": (1e-4,)},
    "a rate below 0": {"sft_rates": (-1e-4, 1e-4)},
    "a seed twice": {"seeds": (1, 1)},
    "no seed": {"seeds": ()},
    "steps that evaluations do not divide": {"steps": 3},
    "more evaluations than steps": {"steps": 2, "evaluations": 4},
    "a sweep without an evaluation": {"sweep_evaluations": 0},
    "batches that do not fit": {"sft_batch": 3},
    "one timed step": {"timed_steps": 1},
}


@pytest.mark.parametrize("changes", BAD_DESIGNS.values(), ids=BAD_DESIGNS.keys())
def test_designs_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(debug(), **changes)


@pytest.mark.parametrize(
    ("reply", "start", "counts"),
    [
        pytest.param(f"{EMPTY_THINKING}{ANSWER}", EMPTY_THINKING, True, id="answers"),
        pytest.param(f"{EMPTY_THINKING}[]</answer>", EMPTY_THINKING, True, id="none"),
        pytest.param(f"{EMPTY_THINKING} \n{ANSWER}", EMPTY_THINKING, True, id="white space"),
        pytest.param(f"{EMPTY_THINKING}[", EMPTY_THINKING, True, id="cut off: for the parser to judge"),
        pytest.param(f"{EMPTY_THINKING} a mug. </think>\n<answer>{ANSWER}", EMPTY_THINKING, False, id="thinks there"),
        pytest.param(f"{EMPTY_THINKING}[] a mug. </think><answer>{ANSWER}", EMPTY_THINKING, False, id="thinks again"),
        pytest.param(f"{EMPTY_THINKING}[]</answer><answer>{ANSWER}", EMPTY_THINKING, False, id="answers twice"),
        pytest.param(f"<think> a mug </think>\n<answer>{ANSWER}", EMPTY_THINKING, False, id="another beginning"),
        pytest.param("<think> a mug </think>\n<answer> so </answer>", "", True, id="nothing was given"),
    ],
)
def test_without_reasoning_an_answer_follows_at_once(reply: str, start: str, counts: bool) -> None:
    assert answer_alone(reply, start) == (reply if counts else "")


# -- settings and jobs -------------------------------------------------------------------------------------------------


def settings_of(**changes: Any) -> Settings:
    return Settings(name="debug", changes=changes, policy=str(TABLETOP_POLICY))


def test_a_folder_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    claim_folder(tmp_path, settings_of())
    assert read_settings(tmp_path) == settings_of()
    claim_folder(tmp_path, settings_of())
    with pytest.raises(SegZeroError, match=r"whole\.seeds differ"):
        claim_folder(tmp_path, settings_of(seeds=[1]))
    with pytest.raises(SegZeroError, match="policy differ"):
        claim_folder(tmp_path, Settings(name="debug", policy="elsewhere"))
    path = tmp_path / "experiment.json"
    found = json.loads(path.read_text())
    found["whole"]["grpo"]["kl_coef"] = 0.5  # as a recipe that has changed since
    path.write_text(json.dumps(found))
    with pytest.raises(SegZeroError, match=r"whole\.grpo\.kl_coef differ"):
        read_settings(tmp_path)


def test_what_is_no_experiment_is_named(tmp_path: Path) -> None:
    with pytest.raises(SegZeroError, match="expected an experiment"):
        read_settings(tmp_path)
    with pytest.raises(SegZeroError, match="--preset"):
        Settings(name="table", policy="")
    with pytest.raises(SegZeroError, match="change --steps"):
        settings_of(steps=3)
    assert Settings(name="debug", policy="").policy == debug().grpo.policy


def done(workplace: Workplace, *jobs: Job, **result: Any) -> None:
    for job in jobs:
        workplace.finish(job, result)


def of_kind(preset: ExperimentPreset, *kinds: JobKind) -> list[Job]:
    return [job for job in all_jobs(preset) if job.kind in kinds]


def test_names_are_unique_and_phases_are_all_there_is() -> None:
    for make in PRESETS.values():
        jobs = all_jobs(make())
        assert len({job.name for job in jobs}) == len(jobs)
        assert [job for phase in Phase for job in phase.jobs(make())] == jobs
    measured = Counter(label(job) for job in of_kind(tabletop(), JobKind.MEASURE))
    assert measured == {
        "base": 1, "base_answers": 1, **{arm.value: 3 for arm in Arm}, "sft_answers_once": 3, "sft_reasoning_once": 3
    }  # fmt: skip


def test_test_questions_are_asked_when_all_is_chosen(tmp_path: Path) -> None:
    preset = debug()
    workplace = Workplace(tmp_path, preset)
    ready = lambda: {job.kind for job in all_jobs(preset) if workplace.is_ready(job)}  # noqa: E731
    assert ready() == {JobKind.ROWS}
    done(workplace, *of_kind(preset, JobKind.ROWS))
    assert ready() == {JobKind.ROWS, JobKind.TIME, JobKind.SWEEP}
    sweeps = of_kind(preset, JobKind.SWEEP)
    done(workplace, *(job for job in sweeps if job.arm is Arm.SFT_ANSWERS), validation=0.5)
    finals = of_kind(preset, JobKind.FINAL)
    assert {job.arm for job in finals if workplace.is_ready(job)} == {Arm.SFT_ANSWERS}
    done(workplace, *sweeps, validation=0.5)
    assert all(workplace.is_ready(job) for job in finals)
    arms, once = [job for job in finals if not job.once], [job for job in finals if job.once]
    measured = lambda: {label(job) for job in of_kind(preset, JobKind.MEASURE) if workplace.is_ready(job)}  # noqa: E731
    done(workplace, *arms[1:])
    assert not measured(), "one training is not done"
    done(workplace, arms[0])
    assert measured() == {"base", "base_answers", *(arm.value for arm in Arm)}
    done(workplace, *(job for job in once if job.arm is Arm.SFT_ANSWERS))
    assert measured() == {"base", "base_answers", *(arm.value for arm in Arm), "sft_answers_once"}


def test_what_no_claim_is_about_comes_last() -> None:
    jobs = long_jobs(tabletop())
    assert [job.once for job in jobs] == sorted(job.once for job in jobs)


@pytest.mark.parametrize(
    ("values", "best"), [((0.1, 0.2), 1e-4), ((0.2, 0.1), 1e-5), ((0.2, 0.2), 1e-5)], ids=["last", "first", "equal"]
)
def test_the_best_rate_validates_best(tmp_path: Path, values: tuple[float, ...], best: float) -> None:
    workplace = Workplace(tmp_path, debug())
    sweeps = [job for job in of_kind(debug(), JobKind.SWEEP) if job.arm is Arm.GRPO_ANSWERS]
    with pytest.raises(SegZeroError, match="every sweep of grpo_answers"):
        workplace.best_rate(Arm.GRPO_ANSWERS)
    for job, value in zip(sweeps, values, strict=True):
        done(workplace, job, validation=value)
    assert workplace.best_rate(Arm.GRPO_ANSWERS) == best


def test_a_job_is_one_worker_s(tmp_path: Path) -> None:
    workplace = Workplace(tmp_path, debug())
    job = timing_jobs()[0]
    with workplace.claimed(job) as mine, workplace.claimed(job) as theirs:
        assert (mine, theirs) == (True, False)
    with workplace.claimed(job) as again:
        assert again


# -- the cost ----------------------------------------------------------------------------------------------------------


def timed(workplace: Workplace, step_s: float) -> None:
    for job in timing_jobs():
        done(workplace, job, step_s=step_s, question_s=0.5, row_s=0.1)


def test_the_estimate_by_hand(tmp_path: Path) -> None:
    preset = debug()
    workplace = Workplace(tmp_path, preset)
    timed(workplace, 10.0)
    told = cost.estimate(long_jobs(preset), preset, cost.read_timings(workplace), 2)
    # 2 sweeps of 1 step and 2 validations, 2 finals of 2 steps and 3 validations, of 2 questions each; then 2 policies
    # are measured on 2 + 4 + 8 questions.
    grpo = 2 * (10 + 2 * 2 * 0.5) + 2 * (20 + 3 * 2 * 0.5) + 2 * 14 * 0.5
    assert told["thread_hours"]["grpo_answers"] == pytest.approx(grpo / 3600)
    # Supervised: twice the steps, of half the samples.
    sft = 2 * (20 + 2 * 2 * 0.5) + 2 * (40 + 3 * 2 * 0.5) + 2 * 14 * 0.5
    assert told["thread_hours"]["sft_reasoning"] == pytest.approx(sft / 3600)
    assert told["thread_hours"]["rendering"] == pytest.approx(0.1 * (4 + 2 + 2 + 4 + 1) / 3600)
    assert told["hours"] == pytest.approx(sum(told["thread_hours"].values()) / 2)
    assert "sft_answers_once" in cost.render(told) and "2 at a time" in cost.render(told)


def test_nothing_long_begins_above_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim_folder(tmp_path, settings_of())
    timed(Workplace(tmp_path, debug()), 36_000.0)
    with pytest.raises(SegZeroError, match=r"at most 10 hours, .* are estimated"):
        experiment.run_experiment(tmp_path, settings_of(), num_workers=2, max_hours=10)
    assert "in all" in capsys.readouterr().err, "the cost is told all the same"
    assert json.loads((tmp_path / "cost.json").read_text())["hours"] > 10
    assert not (tmp_path / "logs").exists(), "no worker was started"


def test_the_command_tells_the_cost_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim_folder(tmp_path, settings_of())
    timed(Workplace(tmp_path, debug()), 1.0)
    options = ["--preset", "debug", "--policy", str(TABLETOP_POLICY), "--out", str(tmp_path), "--workers", "2"]
    assert main(["train", "experiment", *options, "--estimate", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["workers"] == 2 and "in all" in told.err
    assert main(["train", "experiment", *options, "--seeds", "5"]) == 2
    assert "whole.seeds differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--preset", "table"], "expected --preset", id="no such preset"),
        pytest.param(["--preset", "debug", "--steps", "3"], "change --steps", id="steps that do not fit"),
        pytest.param(["--max-hours", "0"], "hours above 0", id="no time"),
        pytest.param(["--seeds", "0"], "whole number", id="no seed"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", "experiment", "--out", str(tmp_path / "run"), *arguments]) == 2
    told = capfd.readouterr()
    assert message in told.err and told.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# -- workers -----------------------------------------------------------------------------------------------------------


def test_a_worker_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "long-0.log"
    with log.open("wb") as file:
        failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit('the disk is full')"], stderr=file)
    failing.wait()
    with pytest.raises(SegZeroError, match=r"status 1: the disk is full; see .*long-0\.log"):
        experiment._check_alive([failing], [log])
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    experiment._check_alive([ended], [log])


def test_two_calls_do_not_meet_in_a_folder(tmp_path: Path) -> None:
    with experiment._alone(tmp_path), pytest.raises(SegZeroError, match="another call is at work"):
        experiment.run_experiment(tmp_path, settings_of(), num_workers=1, max_hours=1)


_ORPHAN = """
import os, subprocess, sys, time
child = (
    "import sys, time; from training.experiments.experiment import end_with; "
    "end_with(int(sys.argv[1])); time.sleep(60)"
)
print(subprocess.Popen([sys.executable, "-c", child, str(os.getpid())]).pid, flush=True)
time.sleep(60)
"""


def test_workers_end_with_whoever_started_them() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _ORPHAN], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(1.0)
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    for _ in range(600):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if "zombie" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} lives on")


# -- verdicts and the report -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "mean", "high", "above", "least_mean", "verdict"),
    [
        pytest.param(0.01, 0.05, 0.09, 0.0, None, Verdict.HOLDS, id="above"),
        pytest.param(0.01, 0.05, 0.09, 0.0, 0.03, Verdict.HOLDS, id="above, and large enough"),
        pytest.param(0.01, 0.02, 0.03, 0.0, 0.03, Verdict.SMALLER, id="above, too small"),
        pytest.param(-0.01, 0.05, 0.09, 0.0, 0.03, Verdict.UNDECIDED, id="both sides"),
        pytest.param(-0.09, -0.05, -0.01, 0.0, None, Verdict.FAILS, id="below"),
        pytest.param(0.0, 0.0, 0.0, 0.0, None, Verdict.FAILS, id="no difference is no gain"),
        pytest.param(0.0, 0.0, 0.0, -0.01, None, Verdict.HOLDS, id="no difference is no loss"),
        pytest.param(-0.009, -0.005, -0.001, -0.01, None, Verdict.HOLDS, id="a loss within a point"),
        pytest.param(-0.02, -0.005, 0.01, -0.01, None, Verdict.UNDECIDED, id="may have lost more"),
        pytest.param(-0.04, -0.03, -0.02, -0.01, None, Verdict.FAILS, id="lost more"),
    ],
)
def test_verdicts(
    low: float, mean: float, high: float, above: float, least_mean: float | None, verdict: Verdict
) -> None:
    assert judge(Interval(mean=mean, low=low, high=high, standard_error=0.0), above, least_mean) is verdict


VALUES = {"base": 0.3, "base_answers": 0.1, "sft_reasoning": 0.5, "grpo_reasoning": 0.6, "grpo_answers": 0.6}
FORGETS = {"sft_reasoning": 0.2}


def finished(folder: Path) -> Workplace:
    """An experiment whose jobs were all done, with made-up scores: one value per policy, a little apart by seed."""
    preset = debug()
    workplace = Workplace(folder, preset)
    timed(workplace, 1.0)
    for job in long_jobs(preset):
        if job.kind is JobKind.MEASURE:
            for split in MEASURED:
                value = VALUES.get(label(job), 0.4) + 0.01 * job.seed
                kind = "colour" if split == "retention" else "function"
                value = 0.9 - FORGETS.get(label(job), 0.0) if split == "retention" else value
                scores = [
                    Score(item=f"{number}-{one}", kind=one, picture=str(number), value=value)
                    for number in range(6)
                    for one in ((kind, "name") if split == "retention" else (kind,))
                ]
                path = workplace.job_folder(job) / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_scores(path, scores)
        curve = [[0, 0.2], [4, 0.3], [8, 0.4 + 0.1 * job.seed]]
        workplace.finish(job, {"validation": 0.4, "rate": 1e-4, "curve": curve, "row_s": 0.1})
    return workplace


def test_the_report_says_what_the_scores_say(tmp_path: Path) -> None:
    workplace = finished(tmp_path)
    whole = cost.estimate(long_jobs(debug()), debug(), cost.read_timings(workplace), 2)
    document = write_report(workplace, settings_of(), whole)
    assert json.loads((tmp_path / "report.json").read_text()) == document
    verdicts = {claim["name"]: claim["verdict"] for claim in document["claims"]}
    assert verdicts == {
        "in distribution": "holds", "out of distribution": "holds", "new functions": "holds", "no forgetting": "holds",
        "reasoning": "undecided", "it learns": "holds",
    }  # fmt: skip
    by_name = {claim["name"]: claim for claim in document["claims"]}
    assert by_name["out of distribution"]["mean"] == pytest.approx(0.1)
    assert by_name["it learns"]["mean"] == pytest.approx(0.6 + 0.015 - 0.3)
    lost = {
        name: policy["retention"]["lost_points"]["all"]["mean"]
        for name, policy in document["policies"].items()
        if name != "base"
    }
    assert lost["sft_reasoning"] == pytest.approx(20.0) and lost["grpo_reasoning"] == pytest.approx(0.0)
    assert document["policies"]["grpo_reasoning"]["splits"]["test"]["by_seed"] == pytest.approx([0.61, 0.62])
    text = (tmp_path / "report.md").read_text()
    for claim in CLAIMS:
        assert claim.text in text
    assert text.count("**holds**") == 5 and "sft_answers_once" in text and "0.610, 0.620" in text
    for name in ("curves.svg", "rates.svg"):
        assert "<svg" in (tmp_path / name).read_text() and name in text
    before = (tmp_path / "curves.svg").read_bytes()
    write_report(workplace, settings_of(), whole)
    assert (tmp_path / "curves.svg").read_bytes() == before, "the same figures make the same picture"


def test_a_report_of_what_is_measured_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "debug", "--policy", str(TABLETOP_POLICY), "--out", str(tmp_path), "--report", "--json"]
    assert main(["train", "experiment", *options]) == 2
    assert "an experiment that has begun" in capsys.readouterr().out
    workplace = finished(tmp_path)
    claim_folder(tmp_path, settings_of())
    whole = cost.estimate(long_jobs(debug()), debug(), cost.read_timings(workplace), 2)
    (tmp_path / "cost.json").write_text(json.dumps(whole))
    undone(workplace, "final-sft_reasoning_once-2", "measure-sft_reasoning_once-2", "measure-sft_answers_once-1")
    assert main(["train", "experiment", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["left_out"] == ["sft_answers_once", "sft_reasoning_once"]
    assert document["policies"].keys() == {"base", "base_answers", *(arm.value for arm in Arm)}
    assert [len(document["curves"][name]) for name in ("sft_reasoning", "sft_reasoning_once")] == [2, 1]
    assert len(document["claims"]) == len(CLAIMS)
    assert "Not measured yet: sft_answers_once, sft_reasoning_once." in (tmp_path / "report.md").read_text()
    undone(workplace, "measure-grpo_answers-2")
    assert main(["train", "experiment", *options]) == 2
    assert "grpo_answers not yet" in capsys.readouterr().out


def test_the_report_that_is_committed_is_that_of_its_figures() -> None:
    (path,) = (REPOSITORY / "benchmarks" / "results").glob("experiment_*.json")
    document = json.loads(path.read_text())
    assert (REPOSITORY / "docs" / "experiment" / "report.md").read_text() == render(document)
    shown = (REPOSITORY / "training" / "experiments" / "README.md").read_text()
    for name in ("base", *(arm.value for arm in Arm)):
        policy = document["policies"][name]
        row = f"{policy['splits']['test']['mean']:.3f} | {policy['ood_mean']['mean']:.3f} |"
        assert row in shown, name


def undone(workplace: Workplace, *names: str) -> None:
    for name in names:
        (workplace.folder / "jobs" / name / "done.json").unlink()


# -- end to end --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_experiment_that_is_killed_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--preset", "debug", "--seeds", "1", "--workers", "2", "--out", str(out), "--json"]
    command = [sys.executable, "-m", "segzero_rt.cli", "train", "experiment", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finals = [job for job in long_jobs(settings_of(seeds=[1]).preset) if job.kind is JobKind.FINAL]
    workplace = Workplace(out, settings_of(seeds=[1]).preset)
    first = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    while not any(workplace.result(job) for job in finals):
        assert first.poll() is None, first.communicate()[1].decode()[-2000:]
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    paths = [workplace.job_folder(job) / "done.json" for job in finals if workplace.result(job)]
    kept = {path: path.stat().st_mtime_ns for path in paths}
    second = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False, env=environment, timeout=3000)
    assert second.returncode == 0, second.stderr.decode()[-2000:]
    document = json.loads(second.stdout)
    assert len(document["claims"]) == len(CLAIMS) and document["policies"].keys() >= {
        "base",
        *(arm.value for arm in Arm),
    }
    assert all(split in document["policies"]["base"]["splits"] for split in MEASURED)
    assert (out / "report.md").is_file()
    for path, written in kept.items():
        assert path.stat().st_mtime_ns == written, "what was done was not done again"
    assert not list(out.glob("jobs/*/run/checkpoint*"))
