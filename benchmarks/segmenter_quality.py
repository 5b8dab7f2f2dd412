"""Mask IoU of the segmenter with a box prompt: tabletop scenes; real masks, object by object, beside OpenCV's GrabCut.

    python -m benchmarks.segmenter_quality                     # the embedded bundle, as it ships
    python -m benchmarks.segmenter_quality --bundle B --scenes 200
    python -m benchmarks.segmenter_quality --checkpoint HF     # a transformers folder (needs torch)

Real masks: every fifth frame of the DAVIS sequence and the six objects of the COCO photo in `../shared/assets/images`;
none of these pictures is trained on. The box is the true mask's own, and both methods get the same. Scenes are of the
test split. Nothing is left out: a case that a method cannot do counts with what it gives back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segzero_rt.answer import Prompt
from segzero_rt.mask import mask_iou, tight_boxes

from .measuring import RESULTS, run_and_exit, write_result

ASSETS = Path(__file__).resolve().parents[1] / "../shared/assets/images"
DAVIS = "davis_car-shadow"
COCO = "coco_000000039769"
COCO_NAMES = {17: "cat", 63: "couch", 65: "bed", 75: "remote"}
GRABCUT_ROUNDS = 5

Segment = Callable[[np.ndarray, Sequence[Prompt]], np.ndarray]
"""Picture uint8 [H, W, 3] and prompts -> masks bool [N, H, W]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """One picture with its true masks."""

    names: tuple[str, ...]
    image_rgb: np.ndarray
    masks: np.ndarray  # bool [N, H, W]


def davis_cases(assets: Path = ASSETS) -> Iterator[Case]:
    """Every fifth frame, one object each."""
    for path in sorted((assets / DAVIS / "JPEGImages/480p/car-shadow").glob("*.jpg"))[::5]:
        truth = cv2.imread(str(assets / DAVIS / f"Annotations/480p/car-shadow/{path.stem}.png"), cv2.IMREAD_GRAYSCALE)
        yield Case(names=(f"davis car-shadow {path.stem}",), image_rgb=_read(path), masks=(truth > 127)[None])


def coco_case(assets: Path = ASSETS) -> Case:
    """The photo's six objects; polygons filled as COCO defines them where pycocotools is there, else by OpenCV."""
    image_rgb = _read(assets / COCO / "000000039769.png")
    annotations = json.loads((assets / COCO / "coco_annotations.txt").read_text())
    masks = [_fill(annotation["segmentation"], image_rgb.shape[:2]) for annotation in annotations]
    names = []
    for annotation in annotations:
        name = COCO_NAMES[annotation["category_id"]]
        names.append(f"coco {name} {sum(name in other for other in names) + 1}")
    return Case(names=tuple(names), image_rgb=image_rgb, masks=np.stack(masks))


def scene_cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Tabletop scenes of the test split, every object of each."""
    from training.scenes import random_scene

    for index in range(count):
        scene = random_scene("test", seed, index)
        masks = np.stack([thing.mask for thing in scene.objects])
        yield Case(names=tuple(thing.kind for thing in scene.objects), image_rgb=scene.image_rgb, masks=masks)


def _read(path: Path) -> np.ndarray:
    image_bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image_bgr is None:
        raise FileNotFoundError(f"expected a picture at {path}")
    return np.ascontiguousarray(image_bgr[..., ::-1])


def _fill(polygons: list[list[float]], size_hw: tuple[int, ...]) -> np.ndarray:
    try:
        from pycocotools import mask as coco
    except ImportError:
        canvas = np.zeros(size_hw, np.uint8)
        for polygon in polygons:
            cv2.fillPoly(canvas, [np.round(np.reshape(polygon, (-1, 2))).astype(np.int32)], 1)
        return canvas > 0
    return coco.decode(coco.merge(coco.frPyObjects(polygons, *size_hw))) > 0


def prompts_for(masks: np.ndarray) -> list[Prompt]:
    """Each mask's tight box, without points."""
    return [Prompt(box_xyxy=(float(x0), float(y0), float(x1), float(y1))) for x0, y0, x1, y1 in tight_boxes(masks)]


def grabcut(image_rgb: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """OpenCV's GrabCut from each box. A box that leaves nothing outside to learn from is itself the answer."""
    height, width = image_rgb.shape[:2]
    masks = np.zeros((len(prompts), height, width), np.bool_)
    for mask, prompt in zip(masks, prompts, strict=True):
        left, top, right, bottom = (round(value) for value in prompt.box_xyxy)
        mask[top:bottom, left:right] = True
        if mask.all():
            continue
        labels = np.zeros((height, width), np.uint8)
        rectangle = (left, top, right - left, bottom - top)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.setRNGSeed(0)
        cv2.grabCut(image_rgb[..., ::-1].copy(), labels, rectangle, *models, GRABCUT_ROUNDS, cv2.GC_INIT_WITH_RECT)
        mask[:] = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    return masks


def bundle_segmenter(bundle_path: str | None) -> Segment:
    """The runtime, as it ships."""
    from segzero_rt.bundle import Bundle
    from segzero_rt.segmenter import ImageEncoder, MaskDecoder

    bundle = Bundle.open(bundle_path)
    encoder, decoder = ImageEncoder.load(bundle), MaskDecoder.load(bundle)
    return lambda image_rgb, prompts: decoder(encoder(image_rgb), prompts).masks


def checkpoint_segmenter(folder: Path) -> Segment:
    """A transformers folder, computed by PyTorch in float32."""
    import torch
    from transformers import Sam2Model

    from segzero_rt.mask import masks_from_logits
    from segzero_rt.resampling import resize

    model = Sam2Model.from_pretrained(folder, local_files_only=True).eval()
    side = model.prompt_encoder.input_image_size
    mean, std = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))

    def segment(image_rgb: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        size_hw = image_rgb.shape[:2]
        pixels = (resize(image_rgb, (side, side), "pillow_bilinear").astype(np.float32) / 255 - mean) / std
        boxes = np.array([prompt.box_xyxy for prompt in prompts], np.float32) * side
        boxes /= np.float32([size_hw[1], size_hw[0]] * 2)
        with torch.no_grad():
            output = model(
                pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()),
                input_boxes=torch.from_numpy(boxes[None]),
            )
        best = output.iou_scores[0].argmax(-1)
        logits = output.pred_masks[0][torch.arange(len(prompts)), best].numpy()
        return masks_from_logits(logits, (size_hw[0], size_hw[1]))

    return segment


def measure(segment: Segment, *, scenes: int, with_grabcut: bool, assets: Path = ASSETS) -> dict[str, Any]:
    """The whole table as one JSON document."""
    document: dict[str, Any] = {}
    if assets.is_dir():
        rows = []
        for case in [*davis_cases(assets), coco_case(assets)]:
            prompts = prompts_for(case.masks)
            ours = _ious(segment(case.image_rgb, prompts), case.masks)
            theirs = _ious(grabcut(case.image_rgb, prompts), case.masks) if with_grabcut else [None] * len(prompts)
            for name, prompt, iou, other in zip(case.names, prompts, ours, theirs, strict=True):
                rows.append({"object": name, "box_xyxy": prompt.box_xyxy, "iou": iou, "grabcut_iou": other})
        document["real"] = {"objects": rows, "mean_iou": _mean(rows, "iou"), "num_objects": len(rows)}
        if with_grabcut:
            document["real"]["grabcut_mean_iou"] = _mean(rows, "grabcut_iou")
    if scenes:
        by_kind: dict[str, list[float]] = {}
        for case in scene_cases(scenes):
            for name, iou in zip(
                case.names, _ious(segment(case.image_rgb, prompts_for(case.masks)), case.masks), strict=True
            ):
                by_kind.setdefault(name, []).append(iou)
        everything = [iou for ious in by_kind.values() for iou in ious]
        document["scenes"] = {
            "mean_iou": round(float(np.mean(everything)), 4),
            "p10_iou": round(float(np.percentile(everything, 10)), 4),
            "num_objects": len(everything),
            "num_scenes": scenes,
            "by_kind": {kind: round(float(np.mean(ious)), 4) for kind, ious in sorted(by_kind.items())},
        }
    return document


def _ious(masks: np.ndarray, truths: np.ndarray) -> list[float]:
    return [round(mask_iou(mask, truth), 4) for mask, truth in zip(masks, truths, strict=True)]


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return round(float(np.mean([row[key] for row in rows])), 4)


def _print_table(document: dict[str, Any]) -> None:
    """The real objects one by one, for people."""
    for row in document.get("real", {}).get("objects", []):
        other = "-" if row["grabcut_iou"] is None else f"{row['grabcut_iou']:.3f}"
        print(f"{row['object']:26} {row['iou']:.3f}   GrabCut {other}")


def main() -> None:
    """Measures, writes the result file, prints a table and the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--bundle", help="bundle folder; the embedded tabletop by default")
    source.add_argument("--checkpoint", type=Path, help="transformers folder of a Sam2Model")
    parser.add_argument("--scenes", type=int, default=100, help="tabletop scenes of the test split (default 100)")
    parser.add_argument("--no-grabcut", action="store_true", help="leave GrabCut out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    arguments = parser.parse_args()
    segment = checkpoint_segmenter(arguments.checkpoint) if arguments.checkpoint else bundle_segmenter(arguments.bundle)
    document = measure(segment, scenes=arguments.scenes, with_grabcut=not arguments.no_grabcut)
    path = write_result("segmenter_quality", document, arguments.out)
    _print_table(document)
    print(json.dumps({"written": path.name, **document}))


if __name__ == "__main__":
    run_and_exit(main, "segmenter_quality")
