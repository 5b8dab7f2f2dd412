"""The gate that asks labelled questions: PyTorch's own answers, the loss against them, the record, the refusal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

from policy_checkpoints import random_picture

from export import command, gate_quality
from export.command import PRESETS, assemble
from export.reference import TorchImageEncoder, TorchMaskDecoder, TorchPolicy
from export.segmenter import SegmenterExport
from export.segmenter_checkpoint import load_checkpoint
from segzero_rt.answer import Prompt
from segzero_rt.bundle import Bundle
from segzero_rt.cli import make_parser
from segzero_rt.dataset import DatasetWriter, LabeledObject, read_dataset
from segzero_rt.errors import ExportError, SegZeroError
from segzero_rt.manifest import QUALITY_GATE
from segzero_rt.pipeline import SegZero
from segzero_rt.segmenter import ImageEncoder, MaskDecoder

REPOSITORY = Path(__file__).resolve().parent.parent
CHECKPOINTS = REPOSITORY / "training/checkpoints/tabletop"


def write_questions(folder: Path, texts: Sequence[str]) -> Path:
    mask = np.zeros((90, 131), np.bool_)
    mask[20:60, 30:90] = True
    with DatasetWriter(folder) as writer:
        for index, text in enumerate(texts):
            name = writer.add_image(random_picture(index))
            writer.add_question(name, text, kind="name", objects=[LabeledObject.from_mask("block", mask)])
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny_bundle_path: Path) -> SegZero:
    return SegZero.load(tiny_bundle_path, backend="cpu", threads=1)


@pytest.fixture(scope="module")
def reference(tiny_checkpoints: tuple[Path, Path], pipeline: SegZero) -> TorchPolicy:
    return TorchPolicy(tiny_checkpoints[0], pipeline.policy)


@pytest.mark.parametrize("budget", [1, 2, 24])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text,
        lambda text: "zz" + text,
        lambda text: text[: len(text) // 2],
        lambda text: text[: len(text) // 2] + "<think>",
        lambda text: text + " and more that was never said",
        lambda text: "<|im_end|>" + text,
    ],
    ids=["none", "right", "wrong from the start", "half", "wrong in the middle", "too long", "an end in letters"],
)
def test_a_draft_never_changes_the_reply(reference: TorchPolicy, change: Any, budget: int) -> None:
    reference.set_picture(random_picture(3))
    token_ids, _ = reference.ask("the red cup", budget)
    ends = reference._policy.manifest.eos_token_ids
    finished = token_ids[-1] in ends
    text = reference._policy.chat.text(token_ids[:-1] if finished else token_ids)
    assert reference.reply("the red cup", draft=change(text), max_new_tokens=budget) == (text, finished)


def test_a_right_draft_is_checked_in_one_pass(reference: TorchPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    reference.set_picture(random_picture(3))
    token_ids, _ = reference.ask("the red cup", 24)
    finished = token_ids[-1] in reference._policy.manifest.eos_token_ids
    reply = token_ids[:-1] if finished else token_ids
    # A policy that learnt to write splits words as its tokenizer does; random weights do not.
    monkeypatch.setattr(reference._policy.chat, "reply_start", lambda _: reply)
    monkeypatch.setattr(reference, "_generate", lambda *_: pytest.fail("wrote token by token"))
    told = reference.reply("the red cup", draft="any", max_new_tokens=24)
    assert told == (reference._policy.chat.text(reply), finished)


@pytest.mark.parametrize("points", [(), ((40.0, 30.0),), ((40.0, 30.0), (60.0, 50.5))], ids=["box", "one", "two"])
def test_the_checkpoints_masks_come_through_the_runtimes_host_code(
    tiny_checkpoints: tuple[Path, Path], pipeline: SegZero, points: tuple[tuple[float, float], ...]
) -> None:
    model = load_checkpoint(tiny_checkpoints[1])
    manifest = pipeline.bundle.manifest.segmenter
    encoder, decoder = (
        ImageEncoder(TorchImageEncoder(model), manifest),  # type: ignore[arg-type]
        MaskDecoder(TorchMaskDecoder(model), manifest),  # type: ignore[arg-type]
    )
    picture = random_picture(5)
    prompts = [Prompt(box_xyxy=(20, 10, 90, 70), points_xy=points), Prompt(box_xyxy=(1, 1, 40, 80), points_xy=points)]
    theirs = decoder(encoder(picture), prompts)
    ours = pipeline.decoder(pipeline.encoder(picture), prompts)
    assert np.abs(ours.logits - theirs.logits).max() < 0.05 * theirs.logits.std()
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=5e-3)
    np.testing.assert_allclose(ours.object_logits, theirs.object_logits, atol=5e-2)


@pytest.mark.parametrize("known", ["policy", "segmenter", "both"])
def test_exact_weights_lose_nothing(
    tiny_checkpoints: tuple[Path, Path], tiny_bundle_path: Path, tmp_path: Path, known: str
) -> None:
    """One question is too long for the policy: it counts 0 on both sides, and stops nothing."""
    folder = write_questions(tmp_path / "asked", ["the red cup", "x", "a " * 3000])
    record = gate_quality.gate_quality(
        Bundle.open(tiny_bundle_path),
        read_dataset(folder),
        policy_folder=tiny_checkpoints[0] if known != "segmenter" else None,
        segmenter_folder=tiny_checkpoints[1] if known != "policy" else None,
        limit=0.005,
    )
    assert record["status"] == "passed" and record["same_replies"] == 1.0
    assert (record["questions"], record["pictures"], record["giou_loss"]) == (3, 3, pytest.approx(0.0, abs=1e-3))
    assert (record["reference"]["policy"] == gate_quality.PYTORCH) == (known != "segmenter")
    assert (record["reference"]["segmenter"] == gate_quality.PYTORCH) == (known != "policy")
    json.dumps(record, allow_nan=False)


@pytest.mark.slow
def test_the_shipped_bundle_loses_little_and_finds_much(tmp_path: Path) -> None:
    from training.question_scenes import write_samples

    write_samples(tmp_path / "scenes", "validation", 5, 20)
    record = gate_quality.gate_quality(
        Bundle.open(),
        read_dataset(tmp_path / "scenes"),
        policy_folder=CHECKPOINTS / "policy",
        segmenter_folder=CHECKPOINTS / "segmenter",
        limit=0.2,  # twenty questions say little about a thousandth; the export asks hundreds
    )
    assert record["giou"] > 0.2 and record["reference_giou"] > 0.2
    assert 0.2 < record["same_replies"] <= 1.0
    low, high = record["giou_loss_interval_95"]
    assert low <= record["giou_loss"] <= high


@pytest.mark.parametrize(
    ("storage", "expected"), [("float32", 0.005), ("float16", 0.005), ("int8", 0.02), ("int4", 0.02), ("fp8", 0.02)]
)
def test_the_limits_are_the_designs(storage: str, expected: float) -> None:
    assert gate_quality.max_loss(storage) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "expected a dataset folder"), (3, "at least 200 questions, got 3")], ids=["no", "few"]
)
def test_too_few_questions_are_refused_before_the_work(
    tmp_path: Path, tiny_checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, count: int, expected: str
) -> None:
    monkeypatch.setattr(command, "_export_policy", lambda *_: pytest.fail("began to export"))
    if count:
        write_questions(tmp_path / "asked", ["x"] * count)
    policy, segmenter = map(str, tiny_checkpoints)
    options = ["--policy", policy, "--segmenter", segmenter, "--gate-dataset", str(tmp_path / "asked")]
    with pytest.raises(SegZeroError, match=expected):
        execute(*options, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_loss_beyond_the_limit_writes_nothing_and_one_within_is_recorded(
    tmp_path: Path, tiny_bundle_path: Path, tiny_checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_quality, "MIN_QUESTIONS", 2)
    asked = write_questions(tmp_path / "asked", ["the red cup", "x"])
    options = ["--segmenter", str(tiny_checkpoints[1]), "--base", str(tiny_bundle_path)]
    options += ["--gate-dataset", str(asked), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(gate_quality, "MAX_LOSS", -0.1)
        with pytest.raises(ExportError, match=r"at most -0.1 gIoU"):
            execute(*options)
    assert [path.name for path in tmp_path.iterdir()] == ["asked"]
    assert execute(*options) == 0
    record = Bundle.open(tmp_path / "out").manifest.gates[QUALITY_GATE]
    assert (record["status"], record["questions"], record["limit"]) == ("passed", 2, 0.005)
    assert record["dataset"]["name"] == "asked" and len(record["dataset"]["annotations_sha256"]) == 64


def test_a_policy_that_is_taken_over_keeps_its_answer_format(tiny_bundle_path: Path) -> None:
    base = Bundle.open(tiny_bundle_path)
    segmenter = SegmenterExport(files={}, manifest=base.manifest.segmenter, gate={})
    for preset in PRESETS.values():
        manifest, _ = assemble(preset(), "mixed", None, segmenter, base)
        assert manifest.answer_format == base.manifest.answer_format == "vision_reasoner"


def execute(*options: str) -> int:
    return command.execute(make_parser(command).parse_args(["tabletop", *options]))  # type: ignore[arg-type]
