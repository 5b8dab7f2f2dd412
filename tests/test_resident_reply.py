"""The device's decode loop says what the host's says, and the host waits for no token before it enqueues the next.

The device is host memory with a thread as its stream; graphs are ONNX Runtime's on the CPU, decoders of every flavour.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_stream import host_stream
from kernel_builds import ONLY_COMPILER, kernels_on

from segzero_rt.answer_format import SEG_ZERO
from segzero_rt.bundle import Bundle
from segzero_rt.errors import GraphError, QuestionError
from segzero_rt.image import load_image
from segzero_rt.kernels.preprocess_device import DeviceFrame
from segzero_rt.policy import Policy
from segzero_rt.resident.policy import ResidentPolicy

pytestmark = ONLY_COMPILER
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "tabletop.png"
QUESTIONS = ("the spoon", "dinner is ready to be served, what helps", "the purple elephant")


class Twins:
    """A policy with the host's loop and the same one on a device."""

    def __init__(self, bundle: Bundle, *, constrained: bool = False, lead: int = 1) -> None:
        self.host = Policy.load(bundle, backend="cpu", threads=1, draft_tokens=0, constrained=constrained)
        self.device, self.driver = host_stream()
        self.resident = ResidentPolicy(self.host, kernels_on(self.device), lead=lead)

    def frame(self, picture: np.ndarray) -> DeviceFrame:
        plane = self.device.to_device(picture.reshape(-1))
        height, width = picture.shape[:2]
        return DeviceFrame(pixel_format="rgb", size_hw=(height, width), planes=(plane,), pitches_bytes=(3 * width,))

    def answer(self, frame: DeviceFrame, question: str, **options: Any) -> tuple[int, ...]:
        return tuple(self.resident.ask(self.resident.look(frame, ahead=False), question, **options))


@pytest.mark.parametrize("constrained", [False, True], ids=["free", "constrained"])
def test_the_shipped_policy_says_the_same_and_nobody_waits(constrained: bool, bundle_path: Path) -> None:
    twins = Twins(Bundle.open(bundle_path), constrained=constrained)
    picture = load_image(PICTURE)
    frame = twins.frame(picture)
    waits = twins.device.num_host_waits
    for question in QUESTIONS:
        expected = twins.host.answer(picture, question)
        assert twins.answer(frame, question) == expected.token_ids, question
        assert twins.resident.reply.finished == expected.finished
        assert twins.resident.reply.steps == expected.counts.runs
    assert twins.device.num_host_waits == waits, "neither for a token nor for a question"


@pytest.fixture(scope="module")
def small(policy_folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Twins]:
    pytest.importorskip("torch", reason="writes checkpoints with transformers")
    pytest.importorskip("transformers", reason="writes checkpoints with transformers")
    from policy_checkpoints import policy_bundle

    from export.policy import export_policy

    bundles: dict[str, Bundle] = {}

    def make(flavour: str, **options: Any) -> Twins:
        if flavour not in bundles:
            folder = tmp_path_factory.mktemp(flavour)
            exported = export_policy(
                policy_folders("grouped-heads"),
                folder,
                flavour=flavour,
                input_size_hw=(140, 196),
                max_length=300,
                max_new_tokens=24,
                gate_questions=("x",),
            )
            bundles[flavour] = policy_bundle(exported, folder)
        return Twins(bundles[flavour], **options)

    return make


def runnable_flavours() -> list[str]:
    pytest.importorskip("torch", reason="writes checkpoints with transformers")
    from policy_checkpoints import RUNNABLE_FLAVOURS

    return [*RUNNABLE_FLAVOURS]


@pytest.mark.parametrize("flavour", ["ort", "portable", "trt11"])
@pytest.mark.parametrize(("lead", "budgets"), [(1, (1, 2, 24, 1000)), (3, (2, 9))])
def test_every_flavour_says_the_same_at_any_budget(
    flavour: str, lead: int, budgets: tuple[int, ...], small: Callable[..., Twins]
) -> None:
    if flavour not in runnable_flavours():
        pytest.skip("opset 24 needs ONNX Runtime 1.25")
    twins = small(flavour, lead=lead)
    rng = np.random.default_rng(0)
    for index, budget in enumerate(budgets):
        picture = rng.integers(0, 256, (90, 131 - index, 3), dtype=np.uint8)
        frame = twins.frame(picture)
        waits = twins.device.num_host_waits
        expected = twins.host.answer(picture, "the red cup", max_new_tokens=budget)
        assert twins.answer(frame, "the red cup", max_new_tokens=budget) == expected.token_ids, budget
        assert (twins.resident.reply.finished, twins.resident.reply.steps) == (expected.finished, expected.counts.runs)
        assert twins.device.num_host_waits == waits
        # A token's wait is the reply's last at most, where the budget ended it: it does not grow with the tokens.
        assert twins.resident.reply.waits >= (twins.resident.reply.num_tokens == budget)


@pytest.mark.parametrize("constrained", [False, True], ids=["free", "constrained"])
def test_questions_on_one_look_leave_no_trace(constrained: bool, small: Callable[..., Twins]) -> None:
    twins = small("portable", constrained=constrained)
    picture = np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    host = twins.host.look(picture)
    view = twins.resident.look(twins.frame(picture))
    next(twins.resident.ask(view, "one that is given up after its first token"))
    for question, options in (
        ("the red cup", {}),
        ("another", {"answer_format": SEG_ZERO}),
        ("the red cup", {"reply_start": "<think> a cup </think>"}),
        ("the red cup", {}),
    ):
        expected = twins.host.ask(host, question, **options).token_ids
        started = len(twins.host.chat.reply_start(options.get("reply_start", "")))
        assert tuple(twins.resident.ask(view, question, **options)) == expected[started:], (question, options)


@pytest.mark.parametrize("lead", [1, 2, 5])
def test_the_host_is_steps_ahead_of_a_stream_that_does_nothing(lead: int, small: Callable[..., Twins]) -> None:
    twins = small("ort", lead=lead)
    picture = np.zeros((60, 60, 3), np.uint8)
    expected = twins.answer(twins.frame(picture), "the red cup")
    assert len(expected) > lead
    frame, said = twins.frame(picture), []
    with twins.driver.held():
        asking = threading.Thread(target=lambda: said.extend(twins.answer(frame, "the red cup")))
        asking.start()
        wait_for(lambda: twins.resident.reply.pauses == 1)
        prompt = len(twins.host.prefix_tokens) + len(twins.host.question_tokens("the red cup"))
        assert (said, twins.resident.cache.length) == ([], prompt + lead), "steps were enqueued, nothing is known"
    asking.join()
    assert tuple(said) == expected


def test_what_fails_in_the_stream_is_raised_and_the_next_question_works(small: Callable[..., Twins]) -> None:
    twins = small("ort")
    frame = twins.frame(np.zeros((60, 60, 3), np.uint8))
    expected = twins.answer(frame, "the red cup")

    def fail() -> None:
        raise GraphError("a step that fails")

    reply = twins.resident.ask(twins.resident.look(frame), "the red cup")
    twins.device.call(fail)
    with pytest.raises(GraphError, match="a step that fails"):
        list(reply)
    assert twins.answer(frame, "the red cup") == expected


def test_questions_that_cannot_be_asked(small: Callable[..., Twins]) -> None:
    twins = small("ort")
    frame = twins.frame(np.zeros((60, 60, 3), np.uint8))
    early, late = twins.resident.look(frame), twins.resident.look(frame)
    with pytest.raises(QuestionError, match="on the latest picture"):
        twins.resident.ask(early, "the red cup")
    for question, options, message in (
        ("the red cup", {"max_new_tokens": 0}, "at least 1 new token, got 0"),
        ("", {}, "expected a question"),
        ("long " * 1000, {}, "leaves room for a reply"),
        ("the red cup", {"reply_start": "long " * 1000}, "reply_start that leaves room"),
    ):
        with pytest.raises(QuestionError, match=message):
            twins.resident.ask(late, question, **options)
    with pytest.raises(ValueError, match="one step ahead"):
        small("ort", lead=0)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)
