"""Run by `test_segmenter_official.py`: SAM 2's own package with random weights writes a checkpoint and what it answers.

    python tests/sam2_reference.py FOLDER_OF_SAM2 CONFIG OUT [SIDE]

With a SIDE in pixels the features of a picture of that size alone, for the larger models' sake.

`sam2.sam2_image_predictor` imports torchvision, whose one CPU build does not import beside this torch; it needs three
names of it, which stand here, made of torch alone. Nothing else of the package is replaced.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SIDE = 1024


class ToTensor:
    """uint8 [H, W, C] to float32 [C, H, W] in [0, 1]."""

    def __call__(self, picture: np.ndarray) -> Tensor:
        return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255


class Resize(nn.Module):
    """Bilinear with antialias, as torchvision does it for tensors."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = [size[0], size[1]]

    def forward(self, picture: Tensor) -> Tensor:
        return nn.functional.interpolate(picture.unsqueeze(0), self.size, mode="bilinear", antialias=True)[0]


class Normalize(nn.Module):
    """Per channel."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, picture: Tensor) -> Tensor:
        return (picture - self.mean) / self.std


def stand_in_for_torchvision() -> None:
    package, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    for part in (ToTensor, Resize, Normalize):
        setattr(transforms, part.__name__, part)
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


def cases() -> dict[str, dict[str, Any]]:
    """Arguments of `SAM2ImagePredictor.predict`, in pixels of a 1024 x 1024 picture."""
    boxes = np.array([[100, 200, 500, 700], [30, 40, 333, 210], [700.5, 600.25, 1000, 1001]], np.float32)
    points = np.array([[250, 300], [310.5, 420], [400, 650]], np.float32)
    mask = np.random.default_rng(5).normal(0, 6, (1, SIDE // 4, SIDE // 4)).astype(np.float32)
    return {
        "box": {"box": boxes[:1]},
        "box, single mask": {"box": boxes[:1], "multimask_output": False},
        "three boxes": {"box": boxes},
        "box and point": {"box": boxes[:1], "point_coords": points[:1], "point_labels": np.array([1])},
        "box and points": {"box": boxes[:1], "point_coords": points, "point_labels": np.array([1, 1, 0])},
        "point": {"point_coords": points[:1], "point_labels": np.array([1])},
        "points, single mask": {
            "point_coords": points,
            "point_labels": np.array([1, 0, 1]),
            "multimask_output": False,
        },
        "mask alone": {"mask_input": mask},
        "box, point and mask": {
            "box": boxes[:1],
            "point_coords": points[:1],
            "point_labels": np.array([1]),
            "mask_input": mask,
        },
    }


def picture() -> np.ndarray:
    """uint8 [1024, 1024, 3]: patches with noise."""
    rng = np.random.default_rng(7)
    patches = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((SIDE // 8, SIDE // 8, 1)))
    return np.clip(patches + rng.normal(0, 20, patches.shape), 0, 255).astype(np.uint8)


def pixels(side: int) -> Tensor:
    """float32 [1, 3, side, side], as after the mean is taken off."""
    return torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(3))


def main(package: str, config: str, out: Path, side: int | None = None) -> None:
    sys.path.insert(0, package)
    stand_in_for_torchvision()
    from sam2.build_sam import build_sam2

    torch.manual_seed(0)
    resized = [] if side is None else [f"++model.image_size={side}"]
    model = build_sam2(config, device="cpu", hydra_overrides_extra=resized)
    with torch.no_grad():  # a new model has biases, norms and positions of 0 and 1, which would hide a wrong name
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "pos_embed" in name or name == "no_mem_embed":
                parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save({"model": model.state_dict()}, out / "checkpoint.pt")
    names = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    (out / "names.json").write_text(json.dumps(names))
    if side is not None:
        with torch.no_grad():
            features = model.forward_image(pixels(side))["backbone_fpn"]
        np.savez(out / "features.npz", *[level.numpy() for level in features])
        return
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(model)
    predictor.set_image(picture())
    features = {"image_embeddings": predictor._features["image_embed"]}
    features |= {f"high_res_features_{level}": one for level, one in enumerate(predictor._features["high_res_feats"])}
    arrays = {name: tensor.numpy() for name, tensor in features.items()}
    for name, arguments in cases().items():
        _, scores, logits = predictor.predict(**arguments)
        arrays[f"{name}: scores"], arrays[f"{name}: logits"] = scores, logits
    np.savez(out / "answers.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
