"""`SegZero` end to end on a bundle of random weights, and on a policy that is made to say a given thing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segzero_rt import pipeline as pipeline_module
from segzero_rt import policy as policy_module
from segzero_rt.answer import AnswerStatus, Prompt
from segzero_rt.answer_format import SEG_ZERO, VISION_REASONER
from segzero_rt.bundle import Bundle
from segzero_rt.errors import BackendError, BundleError, GraphError, ImageError, PromptError, QuestionError
from segzero_rt.graph import Graph, Stop
from segzero_rt.pipeline import SegZero
from segzero_rt.policy import Generation

GRAPHS = ("decoder", "embedding", "vision", "encoder", "mask decoder")
PICTURE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle_path: Path) -> SegZero:
    return SegZero.load(tiny_bundle_path, backend="cpu", threads=1)


@pytest.fixture
def saying(pipeline: SegZero, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SegZero]:
    """The pipeline with a policy whose reply is given; all else is real."""

    def make(text: str, **fields: Any) -> SegZero:
        def ask(view: object, question: str, **options: object) -> Generation:
            timings_ms = {"question": 1.0, "decode": 2.0}
            return Generation(text=text, token_ids=(), **({"finished": True, "timings_ms": timings_ms} | fields))

        monkeypatch.setattr(pipeline.policy, "ask", ask)
        return pipeline

    return make


def test_a_run_gives_arrays_of_the_source_size(pipeline: SegZero) -> None:
    result = pipeline(PICTURE, "the red mug")
    assert result.masks.shape[1:] == (90, 120) and result.masks.dtype == np.bool_
    assert len(result) == len(result.scores) == len(result.boxes_xyxy) == len(result.answer.prompts)
    assert result.answer.text


def test_a_run_is_repeatable_and_leaves_no_trace(pipeline: SegZero) -> None:
    first = pipeline(PICTURE, "the red mug")
    pipeline(255 - PICTURE, "something else entirely", answer_format="seg_zero")
    again = pipeline(PICTURE, "the red mug")
    assert again.answer == first.answer
    np.testing.assert_array_equal(again.masks, first.masks)


def test_one_look_serves_several_questions(pipeline: SegZero) -> None:
    look = pipeline.look(PICTURE)
    for question in ("the red mug", "what cuts paper?", "the red mug"):
        assert pipeline.ask(look, question).answer == pipeline(PICTURE, question).answer


def test_text_arrives_piece_by_piece(pipeline: SegZero) -> None:
    pieces: list[str] = []
    result = pipeline(PICTURE, "the red mug", on_token=pieces.append)
    assert "".join(pieces) == result.answer.text and len(pieces) > 1


def test_every_found_object_gets_a_mask(saying: Callable[..., SegZero]) -> None:
    reply = VISION_REASONER.assistant_text("Two.", [((7, 7, 40, 40), ((20, 20),)), ((30, 5, 80, 50), ((50, 20),))])
    result = saying(reply)(PICTURE, "both")
    assert result.status is AnswerStatus.OK and result.thinking == "Two."
    assert result.masks.shape == (2, 90, 120)
    scale_xy = np.array([120 / 84, 90 / 56] * 2)
    np.testing.assert_allclose(result.boxes_xyxy[0], np.array([7, 7, 40, 40]) * scale_xy, atol=0.51)
    assert {"preprocess", "vision", "prefill", "decode", "parse", "mask_encode", "mask_decode", "total"} <= set(
        result.timings_ms
    )
    document = result.to_json()
    assert [set(one) for one in document["objects"]] == [{"box_xyxy", "points_xy", "score", "mask_rle"}] * 2


@pytest.mark.parametrize(
    ("text", "fields", "status"),
    [
        ("<think> no </think>\n<answer>[]</answer>", {}, AnswerStatus.NONE_FOUND),
        ("<think> I wonder", {"finished": False}, AnswerStatus.TRUNCATED),
        ("I do not know.", {}, AnswerStatus.MALFORMED),
        ("", {}, AnswerStatus.MALFORMED),
        ("<think> I", {"finished": False, "cancelled": True}, AnswerStatus.CANCELLED),
        ("\x00\ud800[[[[{{{", {}, AnswerStatus.MALFORMED),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_nothing_found_is_arrays_of_length_zero(
    saying: Callable[..., SegZero], text: str, fields: dict[str, Any], status: AnswerStatus
) -> None:
    result = saying(text, **fields)(PICTURE, "anything")
    assert result.status is status
    assert result.masks.shape == (0, 90, 120) and result.boxes_xyxy.shape == (0, 4) and result.scores.shape == (0,)
    assert not result.union.any() and result.to_json()["objects"] == []


def test_a_stopped_answer_is_cancelled_even_if_it_already_holds_one(saying: Callable[..., SegZero]) -> None:
    reply = VISION_REASONER.assistant_text("One.", [((7, 7, 40, 40), ((20, 20),))])
    result = saying(reply, finished=False, cancelled=True)(PICTURE, "x")
    assert result.status is AnswerStatus.CANCELLED and result.thinking == "One." and len(result) == 0


def test_the_caller_can_stop(pipeline: SegZero) -> None:
    pieces: list[str] = []
    result = pipeline(PICTURE, "x", on_token=pieces.append, cancelled=lambda: len(pieces) >= 3)
    assert result.status is AnswerStatus.CANCELLED
    assert len(pieces) <= 4


def test_the_budget_ends_an_answer(pipeline: SegZero) -> None:
    result = pipeline(PICTURE, "x", max_new_tokens=1)
    assert result.status is AnswerStatus.TRUNCATED


def test_the_format_is_a_name_or_a_value(pipeline: SegZero) -> None:
    by_name = pipeline(PICTURE, "x", answer_format="seg_zero")
    assert by_name.answer == pipeline(PICTURE, "x", answer_format=SEG_ZERO).answer
    with pytest.raises(QuestionError, match="vision_reasoner"):
        pipeline(PICTURE, "x", answer_format="xml")


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 700), (700, 1), (57, 83)], ids=str)
def test_ugly_sizes(saying: Callable[..., SegZero], size_hw: tuple[int, int]) -> None:
    reply = VISION_REASONER.assistant_text("All.", [((0, 0, 84, 56), ((42, 28),))])
    result = saying(reply)(np.full((*size_hw, 3), 7, np.uint8), "all of it")
    assert result.masks.shape[1:] == size_hw


@pytest.mark.parametrize("question", ["", " ", "?", "a" * 20_000, None, 3], ids=lambda value: str(value)[:5])
def test_questions_that_cannot_be_asked(pipeline: SegZero, monkeypatch: pytest.MonkeyPatch, question: Any) -> None:
    monkeypatch.setattr(pipeline, "look", lambda _: pytest.fail("looked at the picture first"))
    with pytest.raises(QuestionError):
        pipeline(PICTURE, question)


def test_pictures_that_cannot_be_seen(pipeline: SegZero) -> None:
    for image in (PICTURE[..., 0], PICTURE.astype(np.float32), "gone.png", b"", None):
        with pytest.raises(ImageError):
            pipeline(image, "x")  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        pipeline.segment(PICTURE[..., 0], [Prompt(box_xyxy=(1, 1, 5, 5))])


def test_segment_refuses_prompts_outside_the_picture(pipeline: SegZero) -> None:
    inside = Prompt(box_xyxy=(0, 0, 120, 90), points_xy=((119.5, 89.5),))
    assert len(pipeline.segment(PICTURE, [inside])) == 1
    overlapping = Prompt(box_xyxy=(-10, -10, 5, 5))
    assert len(pipeline.segment(PICTURE, [overlapping, inside])) == 2
    for bad in (
        [],
        [Prompt(box_xyxy=(120, 0, 130, 9))],
        [Prompt(box_xyxy=(-9, 0, 0, 9))],
        [replace(inside, points_xy=((120.0, 5.0),))],
        [replace(inside, points_xy=((5.0, -0.5),))],
    ):
        with pytest.raises(PromptError):
            pipeline.segment(PICTURE, bad)


def test_the_image_encoder_runs_in_its_own_thread_and_its_failure_is_the_callers(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segzero_rt.pipeline.default_threads", lambda: 2)
    pipeline = SegZero.load(tiny_bundle_path, backend="cpu", threads=1)
    threads: list[threading.Thread] = []

    def encode(image_rgb: np.ndarray, **_: object) -> Any:
        threads.append(threading.current_thread())
        raise MemoryError("no room")

    monkeypatch.setattr(pipeline, "encoder", encode)
    with pytest.raises(MemoryError):
        pipeline.segment(PICTURE, [Prompt(box_xyxy=(1, 1, 5, 5))])
    assert threads and threads[0] is not threading.current_thread()


def test_on_one_core_the_encoder_runs_only_when_it_is_needed(
    tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segzero_rt.pipeline.default_threads", lambda: 1)
    pipeline = SegZero.load(tiny_bundle_path, backend="cpu", threads=1)
    calls: list[threading.Thread] = []
    encoder = pipeline.encoder

    def encode(image_rgb: np.ndarray, **options: Any) -> Any:
        calls.append(threading.current_thread())
        return encoder(image_rgb, **options)

    monkeypatch.setattr(pipeline, "encoder", encode)
    pipeline(PICTURE, "x", max_new_tokens=1)
    assert calls == []
    pipeline.segment(PICTURE, [Prompt(box_xyxy=(1, 1, 50, 50))])
    assert calls == [threading.current_thread()]


@pytest.mark.parametrize("found", [False, True], ids=["nothing found", "found"])
def test_an_embedding_that_nobody_reads_is_given_up(
    saying: Callable[..., SegZero], monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    objects = [((7, 7, 40, 40), ((20, 20),))] if found else []
    pipeline = saying(VISION_REASONER.assistant_text("Looked.", objects))
    stops: list[Stop] = []
    encoder = pipeline.encoder

    def encode(image_rgb: np.ndarray, *, stop: Stop) -> Any:
        stops.append(stop)
        return encoder(image_rgb, stop=stop)

    monkeypatch.setattr(pipeline, "_thread", ThreadPoolExecutor(1))
    monkeypatch.setattr(pipeline, "encoder", encode)
    assert len(pipeline(PICTURE, "x")) == len(objects)
    pipeline.segment(PICTURE, [Prompt(box_xyxy=(1, 1, 50, 50))])  # one thread: the first has ended when this one has
    assert [stop.options.terminate for stop in stops] == [not found, False]
    with pytest.raises(GraphError, match="image_encoder"):
        stops[1]()
        encoder(PICTURE, stop=stops[1])


SMALL = {"decoder": 1, "embedding": 1, "vision": None, "mask decoder": 1}
SHARES = [
    ("small policy, four cores", 4, None, 1 << 40, SMALL | {"encoder": 3}),
    ("small policy, one core", 1, None, 1 << 40, SMALL | {"encoder": 1}),
    ("small policy, as many as the caller says", 4, 2, 1 << 40, dict.fromkeys(GRAPHS, 2)),
    ("large policy", 4, None, 0, dict.fromkeys(GRAPHS)),
]


@pytest.mark.parametrize(("name", "cores", "threads", "small", "expected"), SHARES, ids=[name for name, *_ in SHARES])
def test_graphs_that_run_at_the_same_time_share_the_cores(
    tiny_bundle_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    cores: int,
    threads: int | None,
    small: int,
    expected: dict[str, int | None],
) -> None:
    bundle = Bundle.open(tiny_bundle_path)
    files = {key: bundle.file(getattr(bundle.manifest.policy.graphs, key)) for key in GRAPHS[:3]}
    files["encoder"] = bundle.file(bundle.manifest.segmenter.graphs.encoder)
    files["mask decoder"] = bundle.file(bundle.manifest.segmenter.graphs.decoder)
    given: dict[Path, int | None] = {}
    load = Graph.load

    def note(path: Path, *arguments: Any, **options: Any) -> Graph:
        given[path] = options["threads"]
        return load(path, *arguments, **options)

    monkeypatch.setattr(Graph, "load", note)
    monkeypatch.setattr(pipeline_module, "default_threads", lambda: cores)
    monkeypatch.setattr(policy_module, "SMALL_DECODER_BYTES", small)
    SegZero.load(bundle, backend="cpu", threads=threads)
    assert {key: given[path] for key, path in files.items()} == expected


def test_loading_names_what_is_wrong(tiny_bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nothing there"):
        SegZero.load(tmp_path / "gone")
    with pytest.raises(BackendError, match="abacus"):
        SegZero.load(tiny_bundle_path, backend="abacus")
    assert SegZero.load(Bundle.open(tiny_bundle_path), backend="cpu").bundle.manifest.name == "tiny"
