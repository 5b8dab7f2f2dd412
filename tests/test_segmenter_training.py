"""The segmenter's training: pictures, prompts, losses, and a run that can be killed. No quality is claimed here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[train]")
pytest.importorskip("skimage", reason="scikit-image is not installed; it comes with segzero-rt[train]")

from transformers import Sam2Model  # noqa: E402 - needs torch's absence to skip first

from segzero_rt.errors import SegZeroError  # noqa: E402
from training.segmenter_data import fill_cache, scene_pictures, shape_pictures  # noqa: E402
from training.segmenter_loss import mask_iou, segmenter_loss  # noqa: E402
from training.segmenter_model import Predictions, SegmenterSize, build_segmenter, decode, encode  # noqa: E402
from training.segmenter_prompts import PROMPT_KINDS, PromptKind, draw_targets, prompt_for  # noqa: E402
from training.segmenter_train import Phase, PictureCache, presets, train_segmenter  # noqa: E402

BOX = PromptKind(with_box=True, num_points=0)
BOX_AND_POINTS = PromptKind(with_box=True, num_points=2)


@pytest.mark.parametrize("source", [shape_pictures, scene_pictures], ids=["shapes", "scenes"])
def test_a_seed_fixes_a_picture(source: object) -> None:
    render = source(96)  # type: ignore[operator]
    first, again, other = render(3), render(3), render(4)
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    assert not np.array_equal(first[0], other[0])
    image, instances, parts = first
    assert image.shape == (96, 96, 3)
    assert instances.shape == parts.shape == (96, 96)
    assert image.dtype == instances.dtype == parts.dtype == np.uint8
    assert instances.any()


def test_parts_lie_on_things() -> None:
    render = shape_pictures(96)
    for seed in range(6):
        _, instances, parts = render(seed)
        assert not parts[instances == 0].any()


def test_boxes_hold_most_of_their_mask_and_points_lie_on_it() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 64), bool)
    mask[20:44, 10:50] = True
    for _ in range(200):
        target = prompt_for(rng, mask, BOX_AND_POINTS)
        (left, top), (right, bottom) = target.points_xy[:2]
        assert target.labels.tolist() == [2, 3, 1, 1]
        assert abs(left - 10) <= 7 and abs(right - 50) <= 7, "at most 15 % of the side and a pixel"
        assert abs(top - 20) <= 5 and abs(bottom - 44) <= 5
        for x, y in target.points_xy[2:].astype(int):
            assert mask[y, x]


@pytest.mark.parametrize("kind", [kind for _, kind in PROMPT_KINDS], ids=str)
def test_targets_exist_for_any_picture(kind: PromptKind) -> None:
    rng = np.random.default_rng(1)
    empty = np.zeros((64, 64), np.uint8)
    crumbs = empty.copy()
    crumbs[5, 5] = 1
    for instances in (empty, crumbs):
        targets = draw_targets(rng, instances, empty, kind, 20)
        assert len(targets) == 20
        assert {target.points_xy.shape for target in targets} == {(2 * kind.with_box + kind.num_points, 2)}


def test_no_thing_is_asked_for_twice_while_another_waits() -> None:
    instances = np.zeros((64, 64), np.uint8)
    for number in range(1, 5):
        instances[8 * number : 8 * number + 6, 10:50] = number
    for seed in range(20):
        targets = draw_targets(np.random.default_rng(seed), instances, np.zeros_like(instances), BOX, 8)
        asked = [int(instances[target.mask][0]) for target in targets if instances[target.mask].any()]
        assert len(set(asked[:4])) == len(asked[:4])


def test_what_fills_little_of_its_box_comes_early() -> None:
    """A thin diagonal beside a filled square of the same box: with one prompt a picture it is asked for more often."""
    instances = np.zeros((64, 64), np.uint8)
    instances[2:30, 2:30] = 1
    for offset in range(28):
        instances[34 + offset, 34 + offset : 37 + offset] = 2
    rng = np.random.default_rng(0)
    drawn = [draw_targets(rng, instances, np.zeros_like(instances), BOX, 1)[0].mask for _ in range(200)]
    square, thin = (sum(bool((mask & (instances == number)).any()) for mask in drawn) for number in (1, 2))
    assert thin > 2 * square


def test_what_things_lie_on_is_asked_for_with_a_box() -> None:
    instances = np.zeros((64, 64), np.uint8)
    instances[20:40, 20:40] = 1
    rng = np.random.default_rng(0)
    for kind, is_asked in ((BOX, True), (PromptKind(with_box=False, num_points=1), False)):
        targets = draw_targets(rng, instances, np.zeros_like(instances), kind, 300)
        assert any(np.array_equal(target.mask, instances == 0) for target in targets) == is_asked


@pytest.mark.parametrize("zoom_share", [0.0, 1.0], ids=["whole", "zoomed"])
@pytest.mark.parametrize("side", [48, 64, 96], ids=["reduced", "as rendered", "enlarged"])
def test_labels_stay_on_their_pixels(tmp_path: Path, side: int, zoom_share: float) -> None:
    """A picture that shows its own labels: after zoom and resizing both still have the same centre of mass."""
    source = replace(presets()["smoke"].sources[0], zoom_share=zoom_share)
    packed = np.zeros((1, 64, 64, 5), np.uint8)
    packed[0, 20:44, 12:48, :3] = 255
    packed[0, 20:44, 12:48, 3] = 1
    (tmp_path / "shapes-64").mkdir()
    np.save(tmp_path / "shapes-64" / "shard-00000.npy", packed)
    cache = PictureCache(tmp_path, (source,), 64)
    rng = np.random.default_rng(0)
    moved = []
    for _ in range(200):
        image, instances, _ = cache.draw(rng, side)
        if instances.any():
            moved.append(centre_of(instances) - centre_of(image[..., 0]))
    assert np.abs(np.mean(moved, 0)).max() < 0.15, "INTER_NEAREST moves by half a pixel"


def centre_of(values: np.ndarray) -> np.ndarray:
    """Centre of mass, (x, y) in pixels."""
    shares = values / values.sum(dtype=np.float64)
    return np.array([shares.sum(0) @ np.arange(values.shape[1]), shares.sum(1) @ np.arange(values.shape[0])])


def test_a_prompt_asks_for_something() -> None:
    with pytest.raises(ValueError, match="box, points or both"):
        PromptKind(with_box=False, num_points=0)


def test_training_sees_what_sam2_computes() -> None:
    """`encode` and `decode` against `Sam2Model.forward`, the lean attention included."""
    torch.manual_seed(0)
    size = SegmenterSize(
        side=64, stage_dims=(16, 32, 64, 96), stage_blocks=(1, 1, 2, 1), global_blocks=(3,), decoder_dim=32
    )
    ours = build_segmenter(size).eval()
    theirs = Sam2Model(size.config()).eval()
    theirs.load_state_dict(ours.state_dict())
    pixels, points = torch.randn(2, 3, 64, 64), torch.rand(2, 3, 4, 2) * 64
    labels = torch.tensor([2, 3, 1, 1]).expand(2, 3, 4)
    with torch.no_grad():
        one = decode(ours, encode(ours, pixels), points, labels)
        other = theirs(pixel_values=pixels, input_points=points, input_labels=labels, multimask_output=True)
    torch.testing.assert_close(one.mask_logits[:, :, 1:], other.pred_masks, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.iou_scores[:, :, 1:], other.iou_scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.object_logits, other.object_score_logits, atol=1e-5, rtol=1e-4)


def test_prompts_and_picture_share_one_table_of_positions() -> None:
    """Two random tables, as transformers draws them, cannot be brought together by any training."""
    model = build_segmenter(SegmenterSize(side=64))
    prompts = model.prompt_encoder.shared_embedding.positional_embedding
    assert torch.equal(prompts, model.shared_image_embedding.positional_embedding)


def predictions_like(truth: torch.Tensor, sharpness: float) -> Predictions:
    """Logits at half of the truth's size that agree with it (or disagree, when `sharpness` is below 0)."""
    coarse = torch.nn.functional.avg_pool2d(truth, 2)
    logits = ((coarse - 0.5) * sharpness).unsqueeze(2).repeat(1, 1, 4, 1, 1)
    batch, prompts = truth.shape[:2]
    scores = mask_iou(logits, coarse.unsqueeze(2).expand_as(logits))
    return Predictions(mask_logits=logits, iou_scores=scores, object_logits=torch.full((batch, prompts, 1), 4.0))


@pytest.mark.parametrize("is_clear", [True, False], ids=["box", "points"])
def test_the_loss_prefers_the_right_mask(is_clear: bool) -> None:
    truth = torch.zeros(1, 2, 32, 32)
    truth[0, 0, 4:20, 8:24] = 1
    truth[0, 1, 16:, :8] = 1
    right = segmenter_loss(predictions_like(truth, 20.0), truth, is_clear=is_clear)
    unsure = segmenter_loss(predictions_like(truth, 1.0), truth, is_clear=is_clear)
    wrong = segmenter_loss(predictions_like(truth, -20.0), truth, is_clear=is_clear)
    assert right.total < unsure.total < wrong.total
    assert right.single_iou == right.chosen_iou == right.best_iou == 1.0
    assert wrong.best_iou == 0.0


def test_points_train_the_best_reading_only() -> None:
    """Wrong readings cost nothing beside a right one when the prompt is ambiguous, but do when it is a box."""
    truth = torch.zeros(1, 1, 32, 32)
    truth[0, 0, 4:20, 8:24] = 1
    good = predictions_like(truth, 20.0)
    logits = good.mask_logits.clone()
    logits[:, :, 2:] *= -1
    mixed = replace(good, mask_logits=logits, iou_scores=good.iou_scores * torch.tensor([1.0, 1.0, 0.0, 0.0]))
    by_points = [segmenter_loss(one, truth, is_clear=False).total for one in (good, mixed)]
    torch.testing.assert_close(by_points[0], by_points[1])
    torch.manual_seed(0)
    by_box = [segmenter_loss(mixed, truth, is_clear=True).total for _ in range(20)]  # one reading is drawn each time
    assert max(by_box) > by_points[1] + 0.5


def test_the_cache_is_filled_once_and_only_where_something_is_missing(tmp_path: Path) -> None:
    render = shape_pictures(32)
    fill_cache(tmp_path, render, shards=2, per_shard=2, seed=1)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(first) == ["shard-00000.npy", "shard-00001.npy"]
    (tmp_path / "shard-00001.npy").unlink()
    fill_cache(tmp_path, render, shards=2, per_shard=2, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_drawn_pictures_have_the_side_that_was_asked_for(tmp_path: Path) -> None:
    sources = presets()["smoke"].sources
    fill_cache(tmp_path / "shapes-64", shape_pictures(64), shards=1, per_shard=3, seed=1)
    cache = PictureCache(tmp_path, sources, 64)
    rng = np.random.default_rng(0)
    for side in (32, 48, 64):
        image, instances, parts = cache.draw(rng, side)
        assert image.shape == (side, side, 3)
        assert instances.shape == parts.shape == (side, side)


def test_phases_end_at_the_models_side() -> None:
    with pytest.raises(ValueError, match="last phase"):
        replace(presets()["smoke"], phases=(Phase(until_step=3, side=32, pictures_per_step=2),))


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Three steps and then three more are the six steps of one go: same pictures, same weights."""
    whole = presets()["smoke"]
    train_segmenter(whole, tmp_path / "whole")
    checkpoint = tmp_path / "halves" / "checkpoint.pt"
    # The same run, stopped early: only its end is moved, so that the schedule up to there is the same.
    half = replace(whole, phases=(replace(whole.phases[0]), replace(whole.phases[1], until_step=4)), decay_steps=0)
    full = replace(whole, decay_steps=0)
    train_segmenter(half, tmp_path / "halves")
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    train_segmenter(full, tmp_path / "halves")
    train_segmenter(full, tmp_path / "one_go")
    halves = torch.load(checkpoint, weights_only=True)
    one_go = torch.load(tmp_path / "one_go" / "checkpoint.pt", weights_only=True)
    assert halves["step"] == one_go["step"] == 6
    for name, tensor in one_go["model"].items():
        torch.testing.assert_close(halves["model"][name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    Sam2Model.from_pretrained(tmp_path / "whole" / "hf", local_files_only=True)
    log = [json.loads(line) for line in (tmp_path / "halves" / "log.jsonl").read_text().splitlines()]
    assert [line["from_step"] for line in log if "from_step" in line] == [0, 4]


def test_weights_alone_are_a_start(tmp_path: Path) -> None:
    """A folder with `hf/` and no checkpoint: the run begins with those weights, at step 0."""
    preset = presets()["smoke"]
    train_segmenter(preset, tmp_path)
    before = Sam2Model.from_pretrained(tmp_path / "hf", local_files_only=True).state_dict()
    (tmp_path / "checkpoint.pt").unlink()
    still = replace(preset, learning_rate=0.0)
    train_segmenter(still, tmp_path)
    after = Sam2Model.from_pretrained(tmp_path / "hf", local_files_only=True).state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, msg=name)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 6


def test_a_preset_that_goes_on_needs_something_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(SegZeroError, match="hf to hold a segmenter"):
        train_segmenter(presets()["tabletop-more"], tmp_path)
    assert list(tmp_path.iterdir()) == [], "no picture was rendered for nothing"
