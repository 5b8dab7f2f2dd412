"""Where a segmenter's weights come from: a transformers folder, or a file of SAM 2's own package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Sam2Model

from segzero_rt.errors import ExportError
from segzero_rt.graph_spec_segmenter import NUM_MASK_TOKENS

from .edgetam import CONFIG_NAME as EDGETAM
from .edgetam import edgetam_model
from .segmenter_official import check_complete, put_in, read_official
from .sources import TORCH_SUFFIXES
from .tensor_files import refuse_quantized, tensor_shapes

SAM2_TYPES = ("sam2", "sam2_video")
"""`model_type` of folders that `Sam2Model` reads; published ones are of the video model, which has more weights."""

EDGETAM_TYPES = ("edgetam", "edgetam_video")

_TABLES = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
"""One table under two names, of which a folder may have either."""


def load_checkpoint(path: Path, config: str | None = None) -> Sam2Model:
    """Reads a segmenter in float32.

    Args:
        path: a transformers folder of `Sam2Model` or `Sam2VideoModel`, or a `sam2*.pt` of SAM 2's own package.
        config: SAM 2's name of the size, for a file; None recognises it.

    Raises:
        ExportError: no such checkpoint, one of another architecture or size, or a weight is missing.
    """
    if path.suffix in TORCH_SUFFIXES and not path.is_dir():
        model, _ = read_official(path, config)
    elif config is not None:
        raise ExportError(
            f"--segmenter-config: expected a .pt file beside it, got {path}; a folder has its config.json"
        )
    else:
        model = _from_folder(path)
    if model.mask_decoder.num_mask_tokens != NUM_MASK_TOKENS:
        raise ExportError(
            f"expected {NUM_MASK_TOKENS} mask tokens as in SAM 2, got {model.mask_decoder.num_mask_tokens}"
        )
    return model.eval()


def _from_folder(folder: Path) -> Sam2Model:
    config = _config(folder)
    model_type = config.get("model_type")
    if model_type in EDGETAM_TYPES:
        return _edgetam(folder)
    if model_type not in SAM2_TYPES:
        known = " or ".join((*SAM2_TYPES, *EDGETAM_TYPES))
        raise ExportError(f"{folder}/config.json: expected model_type {known}, got {model_type!r}")
    refuse_quantized(folder, config)
    _whole_files(folder)
    try:
        model, report = Sam2Model.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"expected a SAM 2 checkpoint (config.json, model.safetensors) in {folder}, got: {reason}"
        ) from error
    for key, came, expected in sorted(report["mismatched_keys"]):
        raise ExportError(
            f"{folder}: expected {key} of shape {list(expected)}, got {list(came)}; is it of another size?"
        )
    _share_table(model, report["missing_keys"])
    # transformers fills what is missing with random numbers and says so in a log line alone
    if missing := sorted(set(report["missing_keys"]) - set(_TABLES)):
        raise ExportError(f"{folder}: expected all weights of SAM 2, {len(missing)} are missing, first {missing[0]}")
    return model


def _whole_files(folder: Path) -> list[Path]:
    """The safetensors files, none of which is damaged or holds codes: transformers would read those as numbers."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        for _ in tensor_shapes(file):
            pass
    return files


def _edgetam(folder: Path) -> Sam2Model:
    """EdgeTAM's folder, read without timm: its one published size alone."""
    state: dict[str, Tensor] = {}
    for file in _whole_files(folder):
        state |= load_file(file)
    with torch.device("meta"):
        model = edgetam_model()
    wanted = model.state_dict()
    renamed = {key.replace(".backbone.timm_model.", ".backbone."): tensor.float() for key, tensor in state.items()}
    present = next((renamed[name] for name in _TABLES if name in renamed), None)
    if present is not None:
        renamed |= dict.fromkeys(_TABLES, present)
    # what tracking alone reads, and the classifier that timm leaves in its models, have no place in it
    kept = {key: tensor for key, tensor in renamed.items() if key in wanted and not key.endswith("num_batches_tracked")}
    check_complete(folder, EDGETAM, kept, model)
    put_in(model, kept)
    return model


def _config(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"expected a SAM 2 checkpoint, a folder with config.json or a .pt file, got {folder}: {error}"
        ) from error
    return document if isinstance(document, dict) else {}


def _share_table(model: Sam2Model, missing: set[str]) -> None:
    present = [name for name in _TABLES if name not in missing]
    if not present:
        raise ExportError(f"expected {_TABLES[0]} in the checkpoint, which has no frequencies of positions")
    table = model.get_buffer(present[0])
    for name in _TABLES:
        model.get_buffer(name).copy_(table)
