"""The program that measures what speed-ups cost: its plan, gate and front by hand, cut thinking, a real small run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import speed_accuracy
from benchmarks.speed_accuracy_run import ReplyRule, ThinkingCut, load, measure, with_input_side
from segzero_rt.bundle import EMBEDDED, Bundle
from segzero_rt.dataset import DatasetWriter, LabeledObject
from segzero_rt.errors import BundleError
from segzero_rt.evaluation import Record
from segzero_rt.image import load_image
from segzero_rt.policy import Generation

PICTURE = Path(__file__).resolve().parents[1] / "docs/tabletop.png"
OWN_SIDE = 280


@pytest.mark.parametrize("text", ["free", "think:0", "think:12", "tokens:1"])
def test_reply_rules(text: str) -> None:
    assert str(ReplyRule.parse(text)) == text


@pytest.mark.parametrize("text", ["", "free:1", "think", "think:-1", "think:x", "tokens:0", "tokens:²", "words:3"])
def test_reply_rules_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected free, think:N or tokens:N"):
        ReplyRule.parse(text)


class Writer:
    """A policy whose tokens are words: it writes a given reply, word by word, and knows what it was made to begin."""

    def __init__(self, reply: str) -> None:
        self.chat = SimpleNamespace(reply_start=str.split)
        self.reply, self.starts = reply, list[str]()

    def ask(
        self,
        view: object,
        question: str,
        *,
        reply_start: str = "",
        on_token: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        answer_format: object = None,
        max_new_tokens: int | None = None,
    ) -> Generation:
        self.starts.append(reply_start)
        words, stopped = reply_start.split(), False
        for word in ["[]", "</answer>"] if reply_start else self.reply.split():
            if cancelled is not None and cancelled():
                stopped = True
                break
            words.append(word)
            if on_token is not None:
                on_token(f"{word} ")
        return Generation(
            text=" ".join(words), token_ids=(0,) * len(words), finished=not stopped, cancelled=stopped,
            timings_ms={"question": 1.0, "decode": 2.0},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "limit", "text", "forced"),
    [
        ("<think> a b c d </think> <answer> x </answer>", 0, "<think> </think> <answer> [] </answer>", 3),
        ("<think> a b c d </think> <answer> x </answer>", 2, "<think> a b </think> <answer> [] </answer>", 2),
        ("<think> a b c d </think> <answer> x </answer>", 4, "<think> a b c d </think> <answer> [] </answer>", 2),
        ("<think> a b c d </think> <answer> x </answer>", 5, "<think> a b c d </think> <answer> x </answer>", 0),
        ("<think> a </think> <answer> x y z </answer>", 2, "<think> a </think> <answer> x y z </answer>", 0),
    ],
    ids=["none", "cut", "cut before it closes itself", "closes itself in time", "short"],
)
def test_a_thinking_is_closed_after_its_budget(reply: str, limit: int, text: str, forced: int) -> None:
    writer = Writer(reply)
    cut = ThinkingCut(writer, limit)  # type: ignore[arg-type]
    generation = cut.ask(None, "q")  # type: ignore[arg-type]
    assert generation.text == text and generation.finished and not generation.cancelled
    assert cut.num_forced == forced and cut.chat is writer.chat
    rounds = len(writer.starts)
    assert generation.timings_ms == {"question": 1.0 * rounds, "decode": 2.0 * rounds}, "both rounds are paid for"


def test_a_cut_thinking_can_still_be_stopped_from_outside() -> None:
    writer = Writer("<think> a b c </think> <answer> x </answer>")
    generation = ThinkingCut(writer, 2).ask(None, "q", cancelled=lambda: True)  # type: ignore[arg-type]
    assert generation.cancelled and len(writer.starts) == 1


@pytest.mark.parametrize(
    ("side", "message"), [(0, "multiples of 28"), (290, "multiples of 28"), (28 * 32, "fewer than 1024 tokens")]
)
def test_sides_that_no_policy_takes(side: int, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        with_input_side(Bundle.open(EMBEDDED, verify="size"), side)


# --- the comparison


def found(ious: list[float], latency_ms: float, *, tokens: int = 20) -> dict[str, Any]:
    template = Record(
        source="", image="", text="x", kind="name", iou=0.0, intersection=1, union=2, box_iou=0.5, num_objects=1,
        num_predicted=1, status="ok", latency_ms=latency_ms, thinking_tokens=5,
    )  # fmt: skip
    records = [
        replace(template, iou=iou, image=f"{number}.png", source=f"a:{number}").to_json()
        for number, iou in enumerate(ious)
    ]
    return {
        "records": records, "decode_ms": 100.0, "tokens": tokens, "load_ms": 1.0, "peak_memory_bytes": 2_000_000,
        "bundle_bytes": 3, "bundle": {"name": "b"},
    }  # fmt: skip


def setting(precision: str, reply: str = "free") -> dict[str, Any]:
    return {"precision": precision, "side": OWN_SIDE, "reply": reply}


def test_gate_and_front_by_hand() -> None:
    measured = [
        (setting("float16"), found([1.0, 0.5], 100)),  # gIoU 0.75
        (setting("int8"), found([1.0, 0.49], 50)),  # loses 0.005, twice as fast
        (setting("int4"), found([1.0, 0.40], 60)),  # loses 0.05, slower than int8
        (setting("int8", "think:0"), found([0.5, 0.0], 20)),  # loses 0.5 of each question, the fastest
        (setting("bad"), {"problem": "no such side"}),
    ]
    rows, problems = speed_accuracy.compare(measured, limit=0.02)
    # over two pictures the second loses 0 to 0.01, the third 0 to 0.1
    assert [row["gate"] for row in rows] == ["within", "within", "open", "beyond"]
    assert [row["on_front"] for row in rows] == [True, True, False, True]
    assert [row["giou_loss"] for row in rows] == pytest.approx([0, 0.005, 0.05, 0.5])
    assert rows[0]["giou_loss_interval_95"] == [0, 0] and rows[0]["tokens_per_s"] == 200
    assert problems == [{"name": "bad 280 px free", "reason": "no such side"}]
    table = speed_accuracy.render(rows, problems)
    assert "| int4 | 280 px | free | 0.700 | +0.050" in table and "| beyond |" in table and "no such side" in table
    with pytest.raises(SystemExit, match="reference could not be run: broken"):
        speed_accuracy.compare([(setting("float16"), {"problem": "broken"})], limit=0.02)


def test_equal_figures_stand_on_the_front_together() -> None:
    rows, _ = speed_accuracy.compare([(setting(name), found([0.5], 10)) for name in "ab"], limit=0.0)
    assert [row["on_front"] for row in rows] == [True, True]


def test_the_reference_comes_first_and_no_combination_twice() -> None:
    rules = [ReplyRule.parse("free"), ReplyRule.parse("think:0")]
    names = [
        speed_accuracy.label(one)
        for one in speed_accuracy.plan({"int8": EMBEDDED, "again": EMBEDDED}, [140, OWN_SIDE], rules)
    ]
    assert names[0] == "int8 280 px free" and len(set(names)) == len(names) == 2 * 2 * 2


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def run_child(_: str, settings: dict[str, Any]) -> dict[str, Any]:
        asked.append((settings["reply"], settings["questions"]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"problem": "no such side"} if settings["reply"] == "tokens:1" else found([0.5], 10)

    monkeypatch.setattr(speed_accuracy, "run_child", run_child)
    monkeypatch.setattr(speed_accuracy, "pin_to_cores", lambda count: None)
    command = ["test", "--bundle", f"int8={EMBEDDED}", "--replies", "free,tokens:1,think:0", "--out", str(tmp_path)]
    kept = [*command, "--work", str(tmp_path / "work")]
    with pytest.raises(KeyboardInterrupt):
        speed_accuracy.main(kept)
    assert speed_accuracy.main(kept) == 0
    assert [reply for reply, _ in asked[3:]] == ["tokens:1", "think:0"], "what failed is tried again, what is done not"
    (result,) = tmp_path.glob("speed_accuracy_*.json")
    assert [row["reply"] for row in json.loads(result.read_text())["configurations"]] == ["free", "think:0"]
    del asked[2:]  # so that nothing is interrupted any more
    asked += [("", 0)] * 3
    assert speed_accuracy.main([*kept, "--questions", "7"]) == 0
    assert asked[5:] == [("free", 7), ("tokens:1", 7), ("think:0", 7)], "other questions are another measurement"


@pytest.mark.parametrize(
    "options",
    [[], ["--bundle", "x"], ["--bundle", "a=x", "--bundle", "a=y"], ["--bundle", "a=x", "--sides", "1,x"],
     ["--bundle", "a=x", "--replies", "free,words"]],
    ids=["no bundle", "no name", "a name twice", "a side", "a rule"],
)  # fmt: skip
def test_bad_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed_accuracy.main(["test", *options])
    assert "error" in capsys.readouterr().err


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.speed_accuracy_plot import draw

    rows, _ = speed_accuracy.compare(
        [(setting("float16"), found([1.0], 100)), (setting("int8"), found([0.9], 50))], limit=0.02
    )
    environment = {"cpu": "a processor"}
    document = {
        "configurations": rows, "gate_limit": 0.02, "reference": rows[0]["name"], "environment": environment,
        "cores": 2, "date": "2026-11-22T00:00:00",
    }  # fmt: skip
    draw(json.loads(json.dumps(document)), tmp_path / "picture.png")
    assert min(load_image(tmp_path / "picture.png").shape[:2]) > 300


# --- the shipped pair


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "test"
    image_rgb = load_image(PICTURE)
    mask = np.zeros(image_rgb.shape[:2], bool)
    mask[50:180, 210:320] = True
    with DatasetWriter(folder) as writer:
        name = writer.add_image(image_rgb)
        for text in ("the green scissors", "the spoon"):
            writer.add_question(name, text, kind="name", objects=[LabeledObject.from_mask("x", mask)])
    return folder


def settings(questions: Path, **changes: Any) -> dict[str, Any]:
    common = {"bundle": str(EMBEDDED), "dataset": str(questions), "questions": 2, "threads": 1}
    return {**common, "side": OWN_SIDE, "reply": "free", **changes}


def test_a_configuration_is_measured(questions: Path) -> None:
    free, cut, short = (measure(settings(questions, reply=reply)) for reply in ("free", "think:0", "tokens:5"))
    assert free["peak_memory_bytes"] > free["bundle_bytes"] > 1e6 and free["tokens"] > 40
    assert all(record["thinking_tokens"] > 3 and record["status"] == "ok" for record in free["records"])
    forced = 5  # <think>, a blank, </think>, a line feed, <answer>
    assert cut["tokens"] == sum(record["reply_tokens"] - forced for record in cut["records"])
    assert short["tokens"] == 10 and {record["status"] for record in short["records"]} == {"truncated"}


def test_a_budget_that_is_never_reached_changes_nothing(questions: Path) -> None:
    free, cut = (measure(settings(questions, reply=reply)) for reply in ("free", "think:150"))
    for one, other in zip(free["records"], cut["records"], strict=True):
        assert {**one, "latency_ms": 0} == {**other, "latency_ms": 0}
    assert cut["tokens"] == free["tokens"]


def test_sides_that_the_graphs_take_and_do_not(questions: Path) -> None:
    assert measure(settings(questions, side=140))["records"]
    assert "GraphError" in measure(settings(questions, side=224))["problem"], "windows of 140 pixels"
    assert load(EMBEDDED, 140, ReplyRule.parse("free"), 1).policy.preprocessor.grid_hw == (5, 5)
