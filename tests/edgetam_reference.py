"""Run by `test_edgetam.py`: transformers' own `EdgeTamModel` on timm's RepViT, random weights; its folder and answers.

    python tests/edgetam_reference.py FOLDER_OF_TIMM OUT

timm imports torchvision for its picture transforms, which nothing here uses and which has no CPU build that imports
beside this torch: a package of empty classes stands in its place.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Names(type):
    """A class all of whose attributes are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Empty(types.ModuleType):
    """Any name is an empty class, any submodule another such package."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        inside = sys.modules.get(f"{self.__name__}.{name}")
        return inside or Names(name, (), {"__init__": lambda self, *_, **__: None})


def stand_in_for_torchvision() -> None:
    """transformers believes in timm only where torchvision is, so that it has to be told."""
    from transformers.utils import import_utils

    import_utils.is_torchvision_available = lambda: True
    import_utils.is_timm_available.cache_clear()
    names = ("", ".transforms", ".transforms.functional", ".datasets", ".ops", ".ops.misc", ".models")
    sys.modules |= {f"torchvision{name}": Empty(f"torchvision{name}") for name in names}


def pixels() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, (1, 3, 1024, 1024)).astype(np.float32)


def main(package: str, out: Path) -> None:
    sys.path.insert(0, package)
    from transformers import EdgeTamConfig, EdgeTamModel, EdgeTamVisionConfig, TimmWrapperConfig

    stand_in_for_torchvision()
    backbone = TimmWrapperConfig(
        architecture="repvit_m1", model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
    )
    torch.manual_seed(0)
    model = EdgeTamModel(EdgeTamConfig(vision_config=EdgeTamVisionConfig(backbone_config=backbone))).eval()
    with torch.no_grad():  # what a new model leaves at 0 and 1 would hide mistakes
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and (tensor.ndim == 1 or name == "no_memory_embedding"):
                tensor.add_(torch.randn_like(tensor) * 0.1)
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(
            model.shared_image_embedding.positional_embedding
        )
    model.save_pretrained(out / "hf")
    boxes = torch.tensor([[[100.0, 200.0, 500.0, 700.0], [30.0, 40.0, 333.0, 210.0]]])
    with torch.no_grad():
        answer = model(pixel_values=torch.from_numpy(pixels()), input_boxes=boxes, multimask_output=True)
    names = ("high_res_features_0", "high_res_features_1", "image_embeddings")
    arrays = {name: one.numpy() for name, one in zip(names, answer.image_embeddings, strict=True)}
    np.savez(out / "answers.npz", logits=answer.pred_masks, scores=answer.iou_scores, boxes=boxes, **arrays)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
