"""From frame to masks on one device: what `SegZero` answers, bit for bit, with one wait of the host or two.

The device is host memory with a thread as stream, see `host_stream`; kernels are compiled by g++, graphs are ONNX
Runtime's on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_stream import host_stream
from kernel_builds import ONLY_COMPILER, kernels_on

from segzero_rt import SegZero
from segzero_rt.answer import AnswerStatus
from segzero_rt.answer_format import SEG_ZERO
from segzero_rt.answer_parser import parse_answer
from segzero_rt.errors import ImageError, QuestionError
from segzero_rt.image import load_image
from segzero_rt.resident.frames import as_frame
from segzero_rt.resident.pipeline import ResidentLook, ResidentSegmentation, ResidentSegZero

pytestmark = ONLY_COMPILER
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "tabletop.png"
MOST_WAITS = 3


class Twins:
    """The host's pipeline and the device's, with the same graphs."""

    def __init__(self, bundle: Path, **options: Any) -> None:
        self.host = SegZero.load(bundle, backend="cpu", threads=1, draft_tokens=0, **options)
        self.device, self.driver = host_stream()
        self.resident = ResidentSegZero(
            self.host.policy,
            self.host.encoder,
            self.host.decoder,
            kernels=kernels_on(self.device),
            encoder_kernels=kernels_on(self.device.fork()),
        )

    def look(self, picture: Any, **options: Any) -> ResidentLook:
        return self.resident.look(as_frame(picture, self.resident.staging), **options)

    def say(self, text: str, *, finished: bool = True) -> None:
        """Has the device's policy say this to the next question, whatever that is."""
        reply, policy = self.resident._resident.reply, self.host.policy
        token_ids = policy.chat.reply_start(text)
        assert policy.chat.text(token_ids) == text

        def tokens(*_: Any, **__: Any) -> Iterator[int]:
            reply.num_tokens, reply.finished, reply.steps, reply.waits = 0, False, 0, 0
            self.resident.staging.upload(np.array(token_ids, np.int32), reply.token_ids)
            for token_id in token_ids:
                reply.num_tokens += 1
                yield token_id
            reply.finished = finished

        self.resident._resident.ask = tokens  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def tiny(tiny_bundle_path: Path) -> Twins:
    return Twins(tiny_bundle_path)


def picture_of(seed: int, size_hw: tuple[int, int] = (61, 93)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def same(found: ResidentSegmentation, expected: Any) -> None:
    assert found.answer == expected.answer
    assert found.masks.shape == expected.masks.shape
    np.testing.assert_array_equal(found.host_masks, expected.masks)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.host_waits <= MOST_WAITS


def test_the_shipped_bundle_answers_the_same_with_one_wait(bundle_path: Path) -> None:
    twins, picture = Twins(bundle_path), load_image(PICTURE)
    for question in ("the spoon", "the red things", "the purple elephant"):
        expected = twins.host(picture, question)
        found = twins.resident.ask(twins.look(picture, ahead=False), question, to_host=True)
        same(found, expected)
        assert found.host_waits == 1, question
        counts = expected.decode_counts
        assert (found.decode_counts["tokens"], found.decode_counts["runs"]) == (counts["tokens"], counts["runs"])


BOX = '{{"bbox_2d": [{0}, {1}, {2}, {3}], "point_2d": [{4}, {5}]}}'
ONE, LOST = BOX.format(5, 6, 40, 41, 20, 20), BOX.format(10, 2, 70, 50, 1, 1)
SAID = [
    ("one object", f"<think> a </think><answer>[{ONE}]</answer>", True, 1),
    ("several", f"<think> a </think><answer>[{ONE}, {ONE}, {ONE}]</answer>", True, 1),
    ("a point beside its box", f"<answer>[{LOST}]</answer>", True, 2),
    ("whole ones among others", f"<answer>[{ONE}, {LOST}, {ONE}]</answer>", True, 2),
    ("more than there is room for", f"<answer>[{', '.join([ONE] * 11)}]</answer>", True, 2),
    ("in a wrapper", f'<answer>{{"objects": [{ONE}]}}</answer>', True, 1),
    ("none", "<think> nothing </think><answer>[]</answer>", True, 1),
    ("no answer", "just talk", True, 1),
    ("nothing at all", "", True, 1),
    ("cut off", f"<think> a </think><answer>[{ONE}", False, 1),
    ("outside of the picture", f"<answer>[{BOX.format(900, 900, 950, 950, 920, 920)}]</answer>", True, 1),
    ("not ASCII", f"<think> Löffel ✓ </think><answer>[{ONE}]</answer>", True, 1),
]


@pytest.mark.parametrize(("name", "text", "finished", "waits"), SAID, ids=[row[0] for row in SAID])
def test_whatever_is_said_gives_the_same_masks(
    name: str, text: str, finished: bool, waits: int, tiny: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.resident._resident, "ask", None)  # back to what it was, afterwards
    picture, host = picture_of(0), tiny.host
    look = tiny.look(picture)
    tiny.say(text, finished=finished)
    found = tiny.resident.ask(look, "anything", to_host=True)
    answer = parse_answer(
        text,
        answer_format=host.policy.default_format,
        input_size_hw=host.policy.manifest.answer_size_hw,
        source_size_hw=picture.shape[:2],
        finished=finished,
    )
    assert found.answer == answer
    expected = host.decoder(host.encoder(picture), answer.prompts)
    np.testing.assert_array_equal(found.host_masks, expected.masks)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.host_waits == waits


def test_an_odd_size_follows_another(tiny: Twins) -> None:
    for seed, size_hw in enumerate([(1, 1), (61, 93), (200, 3)]):
        picture = picture_of(seed, size_hw)
        found = tiny.resident.ask(tiny.look(picture, ahead=False), "the red cup", to_host=True)
        same(found, tiny.host(picture, "the red cup"))


def test_masks_may_stay_where_they_are(tiny: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.resident._resident, "ask", None)
    look = tiny.look(picture_of(0))
    tiny.say(f"<answer>[{ONE}, {ONE}]</answer>")
    found = tiny.resident.ask(look, "anything")
    assert found.host_masks is None
    assert (found.masks.shape, found.masks.dtype) == ((2, 61, 93), np.uint8)
    tiny.say(f"<answer>[{ONE}, {ONE}]</answer>")
    again = tiny.resident.ask(look, "anything", to_host=True)
    (brought,) = tiny.device.to_host(found.masks)
    np.testing.assert_array_equal(brought.astype(np.bool_), again.host_masks)


def test_it_is_called_as_the_host_s_pipeline_is(tiny: Twins) -> None:
    picture = picture_of(7)
    found, expected = tiny.resident(picture, "the red cup"), tiny.host(picture, "the red cup")
    assert found.answer == expected.answer
    np.testing.assert_array_equal(found.masks, expected.masks)
    np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)
    assert found.decode_counts["host_waits"] <= MOST_WAITS
    assert found.to_json()["size_hw"] == [61, 93]
    with pytest.raises(ValueError, match="ask with to_host=True"):
        kept = tiny.resident.ask(tiny.look(picture), "the red cup")
        replace(kept, host_masks=None).on_host()


def test_a_reply_is_told_and_can_be_stopped(tiny: Twins) -> None:
    picture, told = picture_of(3), []
    expected = tiny.host(picture, "the red cup")
    look = tiny.look(picture)
    same(tiny.resident.ask(look, "the red cup", on_token=told.append, to_host=True), expected)
    assert "".join(told) == expected.answer.text
    stopped = tiny.resident.ask(look, "the red cup", cancelled=iter([False, False, True]).__next__)
    assert (stopped.answer.status, len(stopped.scores)) == (AnswerStatus.CANCELLED, 0)
    assert stopped.decode_counts["tokens"] == 2
    assert stopped.host_waits == 0
    named = tiny.resident.ask(look, "the red cup", answer_format="seg_zero", to_host=True)
    same(named, tiny.host(picture, "the red cup", answer_format=SEG_ZERO))


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        pytest.param("", {}, "question in words", id="empty"),
        pytest.param(None, {}, "question in words", id="none"),
        pytest.param("x", {"answer_format": "xml"}, "answer format of", id="format"),
        pytest.param("x", {"max_new_tokens": 0}, "at least 1 new token", id="budget"),
    ],
)
def test_questions_that_cannot_be_asked(question: Any, options: dict[str, Any], message: str, tiny: Twins) -> None:
    with pytest.raises(QuestionError, match=message):
        tiny.resident.ask(tiny.look(picture_of(0)), question, **options)


class OnDevice:
    """An array of another library on the device."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": None if array.flags.c_contiguous else array.strides,
            "version": 3,
        }


def test_frames_of_others_are_taken_where_they_are(tiny: Twins) -> None:
    picture = picture_of(5)
    wide = np.zeros((61, 128, 3), np.uint8)
    wide[:, :93] = picture
    expected = tiny.host(picture, "the red cup")
    for frame in (OnDevice(picture), OnDevice(wide[:, :93])):
        uploaded = tiny.driver.num_enqueued
        look = tiny.look(frame)
        assert tiny.driver.num_enqueued > uploaded
        same(tiny.resident.ask(look, "the red cup", to_host=True), expected)


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.zeros((4, 4, 3), np.float32), id="dtype"),
        pytest.param(np.zeros((4, 4), np.uint8), id="rank"),
        pytest.param(np.zeros((4, 4, 4), np.uint8), id="channels"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), id="empty"),
        pytest.param(np.zeros((4, 3, 4), np.uint8).transpose(0, 2, 1), id="planes"),
        pytest.param(np.zeros((4, 8, 3), np.uint8)[:, ::2], id="every-other"),
        pytest.param(np.zeros((4, 4, 3), np.uint8)[::-1], id="upside-down"),
    ],
)
def test_other_layouts_on_the_device_are_refused(array: np.ndarray, tiny: Twins) -> None:
    with pytest.raises(ImageError, match=r"on the device|at least one pixel"):
        tiny.look(OnDevice(array))
