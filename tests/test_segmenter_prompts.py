"""Prompts given by hand: points alone, boxes and points together, masks, none or many; each against `Sam2Model`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from exported_segmenter import Exported

from segzero_rt.answer import Prompt
from segzero_rt.errors import PromptError
from segzero_rt.segmenter import MaskDecoder, choose_masks
from segzero_rt.segmenter_prompt import SegmenterPrompt, logits_of_mask

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")

SIDE = 64
BOX = (4.0, 6.0, 40.0, 50.0)
POINTS = ((10.0, 12.5), (30.25, 20.0), (21.0, 33.0), (39.0, 48.0), (5.0, 49.0))
MASK = np.random.default_rng(3).normal(0, 6, (SIDE // 4, SIDE // 4)).astype(np.float32)


def picture() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def torch_answer(exported: Exported, image_rgb: np.ndarray, prompt: SegmenterPrompt, *, multimask: bool) -> Any:
    """`Sam2Model`'s own answer to one prompt; its prompt encoder takes boxes and points apart and adds the filler."""
    pixels = torch.from_numpy(exported.encoder.pixel_values(image_rgb))
    inputs: dict[str, Any] = {}
    if prompt.box_xyxy is not None:
        inputs["input_boxes"] = torch.tensor([[prompt.box_xyxy]])
    if points := [*prompt.points_xy, *prompt.outside_xy]:
        inputs["input_points"] = torch.tensor([[points]])
        inputs["input_labels"] = torch.tensor([[[1] * len(prompt.points_xy) + [0] * len(prompt.outside_xy)]])
    if prompt.mask_logits is not None:
        inputs["input_masks"] = torch.from_numpy(prompt.mask_logits[None, None])
    with torch.no_grad():
        output = exported.model(pixel_values=pixels, **inputs, multimask_output=multimask)
    best = int(output.iou_scores[0, 0].argmax())
    return output.pred_masks[0, 0, best].numpy(), float(output.iou_scores[0, 0, best])


PROMPTS = [
    ("a box", SegmenterPrompt(box_xyxy=BOX)),
    ("a box and a point", SegmenterPrompt(box_xyxy=BOX, points_xy=POINTS[:1])),
    ("a box and points, one of them off", SegmenterPrompt(box_xyxy=BOX, points_xy=POINTS[:2], outside_xy=POINTS[4:])),
    ("a point", SegmenterPrompt(points_xy=POINTS[:1])),
    ("a point off the object", SegmenterPrompt(outside_xy=POINTS[:1])),
    ("five points", SegmenterPrompt(points_xy=POINTS)),
    ("a box and a mask", SegmenterPrompt(box_xyxy=BOX, mask_logits=MASK)),
    ("a box, points and a mask", SegmenterPrompt(box_xyxy=BOX, points_xy=POINTS[:3], mask_logits=MASK)),
    ("a point and a mask", SegmenterPrompt(points_xy=POINTS[:1], mask_logits=MASK)),
]


@pytest.mark.parametrize("multimask", [True, False], ids=["best of three", "single mask"])
@pytest.mark.parametrize(("name", "prompt"), PROMPTS, ids=[row[0] for row in PROMPTS])
def test_any_prompt_is_answered_as_by_torch(
    exported_segmenter: Exported, name: str, prompt: SegmenterPrompt, multimask: bool
) -> None:
    embedding = exported_segmenter.encoder(picture())
    ours = exported_segmenter.decoder(embedding, [prompt], multimask=multimask)
    logits, score = torch_answer(exported_segmenter, picture(), prompt, multimask=multimask)
    np.testing.assert_allclose(ours.logits[0], logits, atol=1e-5 * float(np.abs(logits).max()) + 1e-6)
    assert ours.scores[0] == pytest.approx(score, abs=1e-5)


def test_a_mask_changes_the_answer(exported_segmenter: Exported) -> None:
    embedding = exported_segmenter.encoder(picture())
    with_mask = SegmenterPrompt(box_xyxy=BOX, mask_logits=MASK)
    ours = exported_segmenter.decoder(embedding, [SegmenterPrompt(box_xyxy=BOX), with_mask])
    assert np.abs(ours.logits[0] - ours.logits[1]).max() > 1e-3 * np.abs(ours.logits).max()


def test_a_mask_alone_has_no_filler_point(exported_segmenter: Exported) -> None:
    """As in SAM 2's own predictor; transformers adds two fillers there, so its decoder is asked directly."""
    embedding = exported_segmenter.encoder(picture())
    ours = exported_segmenter.decoder(embedding, [SegmenterPrompt(mask_logits=MASK)])
    model = exported_segmenter.model
    features = {name: torch.from_numpy(values) for name, values in embedding.features.items()}
    with torch.no_grad():
        masks, scores, _, _ = model.mask_decoder(
            image_embeddings=features["image_embeddings"],
            image_positional_embeddings=model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=torch.zeros(1, 1, 0, model.mask_decoder.hidden_size),
            dense_prompt_embeddings=model.prompt_encoder.mask_embed(torch.from_numpy(MASK[None, None])),
            multimask_output=True,
            high_resolution_features=[features["high_res_features_0"], features["high_res_features_1"]],
        )
    best = int(scores[0, 0].argmax())
    want = masks[0, 0, best].numpy()
    np.testing.assert_allclose(ours.logits[0], want, atol=1e-5 * float(np.abs(want).max()) + 1e-6)


def test_many_different_prompts_keep_their_order(exported_segmenter: Exported) -> None:
    """Grouped by what they consist of, masks alone, and put back; a policy's prompts among them."""
    embedding = exported_segmenter.encoder(picture())
    prompts = [prompt for _, prompt in PROMPTS] + [SegmenterPrompt(mask_logits=MASK), Prompt(box_xyxy=BOX)]
    together = exported_segmenter.decoder(embedding, prompts)
    for index, prompt in enumerate(prompts):
        alone = exported_segmenter.decoder(embedding, [prompt])
        np.testing.assert_allclose(alone.logits[0], together.logits[index], atol=1e-5)
    np.testing.assert_array_equal(together.logits[0], together.logits[-1])


COUNTS = [(1, 1, 1), (1, 7, 1), (1, 1, 9), (3, 2, 4), (1, 1, 0), (1, 5, 0)]


@pytest.mark.parametrize(("batch", "objects", "points"), COUNTS)
def test_the_decoder_takes_any_number_of_objects_and_points(
    exported_segmenter: Exported, batch: int, objects: int, points: int
) -> None:
    pixels = np.random.default_rng(0).normal(0, 1, (batch, 3, SIDE, SIDE)).astype(np.float32)
    features = exported_segmenter.graphs[0].run({"pixel_values": pixels})
    inputs = {
        "points_xy": np.random.default_rng(1).uniform(0, SIDE, (batch, objects, points, 2)).astype(np.float32),
        "labels": np.tile(np.array(([1, 0, 2, 3] * 3)[:points], np.int64), (batch, objects, 1)),
    }
    outputs = exported_segmenter.graphs[1].run({**features, **inputs})
    assert outputs["mask_logits"].shape == (batch, objects, 4, SIDE // 4, SIDE // 4)
    assert outputs["iou_scores"].shape == (batch, objects, 4)
    for row in range(objects):  # one object's answer does not depend on how many stand beside it
        one = {name: values[:, row : row + 1] for name, values in inputs.items()}
        alone = exported_segmenter.graphs[1].run({**features, **one})
        np.testing.assert_allclose(alone["mask_logits"][:, 0], outputs["mask_logits"][:, row], atol=1e-5)


REFUSED = [
    ("nothing", {}, "expected a box, a point or a mask"),
    ("corners swapped", {"box_xyxy": (9.0, 2.0, 3.0, 4.0)}, "swap the corners"),
    ("a point of three numbers", {"points_xy": ((1.0, 2.0, 3.0),)}, "two finite numbers"),
    ("a point at infinity", {"outside_xy": ((1.0, float("inf")),)}, "two finite numbers"),
    ("a mask of bools", {"mask_logits": np.ones((16, 16), np.bool_)}, "finite float32"),
    ("a mask with a NaN", {"mask_logits": np.full((16, 16), np.nan, np.float32)}, "finite float32"),
    ("several masks at once", {"mask_logits": np.zeros((1, 16, 16), np.float32)}, "finite float32"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_no_prompt_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        SegmenterPrompt(**fields)


def test_a_mask_of_another_size_or_where_none_is_taken_is_refused(exported_segmenter: Exported) -> None:
    embedding = exported_segmenter.encoder(picture())
    with pytest.raises(PromptError, match=r"\(16, 16\), got \(8, 16\)"):
        exported_segmenter.decoder(embedding, [SegmenterPrompt(mask_logits=np.zeros((8, 16), np.float32))])
    without = MaskDecoder(exported_segmenter.graphs[1], exported_segmenter.manifest)
    with pytest.raises(PromptError, match="takes no masks in"):
        without(embedding, [SegmenterPrompt(mask_logits=MASK)])


def test_a_mask_as_yes_and_no_becomes_logits() -> None:
    quarters = np.array([[1, 0], [0, 1]], np.bool_).repeat(8, axis=0).repeat(8, axis=1)
    np.testing.assert_array_equal(logits_of_mask(quarters, (2, 2)), [[10, -10], [-10, 10]])
    np.testing.assert_array_equal(logits_of_mask(quarters, (1, 1)), [[0]])
    assert logits_of_mask(quarters[:3, :5], (8, 8)).shape == (8, 8)
    for wrong in (np.zeros((2, 2), np.float32), np.zeros((2, 2, 1), np.bool_), np.zeros((0, 2), np.bool_)):
        with pytest.raises(PromptError, match="bool"):
            logits_of_mask(wrong, (2, 2))


def test_single_mask_choice_is_the_hosts() -> None:
    logits, scores = np.zeros((0, 4, 2, 2), np.float32), np.zeros((0, 4), np.float32)
    for multimask in (True, False):
        chosen, chosen_scores = choose_masks(logits, scores, multimask=multimask)
        assert chosen.shape == (0, 2, 2)
        assert chosen_scores.shape == (0,)
