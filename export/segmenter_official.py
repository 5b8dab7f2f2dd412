"""Checkpoints of SAM 2's own package (`sam2_hiera_*.pt`, `sam2.1_hiera_*.pt`) and EdgeTAM's, as `Sam2Model`.

The file is read with `weights_only=True`: it may come from anywhere, and a pickle could run code. Which published size
it has is read from the shapes of its tensors; heads, windows and global attention follow from the size.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Sam2Model

from segzero_rt.errors import ExportError

from .edgetam import CONFIG_NAME as EDGETAM
from .edgetam import edgetam_model, is_edgetam
from .segmenter_sizes import CONFIG_NAMES, HIERA_SIZES, size_of_config

_RENAMED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^image_encoder\.trunk\.(body\.)?", "vision_encoder.backbone."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
        (r"^no_mem_embed$", "no_memory_embedding"),
        (
            r"^sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
            "prompt_encoder.shared_embedding.positional_embedding",
        ),
        (r"^sam_prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
        (r"^sam_prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
        (r"^sam_prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
        (r"^sam_prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
        (r"^sam_prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
        (r"^sam_prompt_encoder\.", "prompt_encoder."),
        (r"^sam_mask_decoder\.", "mask_decoder."),
        (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
        (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
        (r"\.norm(\d)\.", r".layer_norm\1."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
        (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
        # The decoder's heads have three layers each; transformers numbers the middle ones alone.
        (r"(_mlps\.\d+|_head)\.layers\.0\.", r"\1.proj_in."),
        (r"(_mlps\.\d+|_head)\.layers\.1\.", r"\1.layers.0."),
        (r"(_mlps\.\d+|_head)\.layers\.2\.", r"\1.proj_out."),
    )
)
_VIDEO_ONLY = (
    *("memory_attention.", "memory_encoder.", "maskmem_tpos_enc", "mask_downsample.", "no_mem_pos_enc"),
    *("no_obj_ptr", "no_obj_embed_spatial", "obj_ptr_proj.", "obj_ptr_tpos_proj.", "spatial_perceiver."),
)
"""What only tracking through a video reads."""
_ONLY_IN_2_1 = "no_obj_embed_spatial"
_POINT = re.compile(r"^sam_prompt_encoder\.point_embeddings\.(\d+)\.weight$")
_BLOCK = re.compile(r"^image_encoder\.trunk\.blocks\.(\d+)\.")


def read_official(path: Path, config: str | None = None) -> tuple[Sam2Model, str]:
    """Reads a checkpoint of SAM 2's own package in float32.

    Args:
        path: `sam2*.pt`.
        config: one of `CONFIG_NAMES`, which the file must then agree with; None recognises it.

    Returns:
        the model, and its configuration's name, one of `CONFIG_NAMES`.

    Raises:
        ExportError: not such a file, of no published size, of another than `config`, or incomplete.
    """
    tensors = _read_tensors(path)
    name = _recognise(path, tensors, config)
    with torch.device("meta"):  # the file's own tensors take the places: no second copy in memory
        model = edgetam_model() if name == EDGETAM else Sam2Model(size_of_config(name).config())
    state = {key: tensor.float() for key, tensor in renamed(tensors, path.name).items()}
    check_complete(path, name, state, model)
    put_in(model, state)
    return model.eval(), name


def put_in(model: Sam2Model, state: Mapping[str, Tensor]) -> None:
    """Loads weights, all but the counters of batch norms, without copying them."""
    counters = [name for name, _ in model.named_buffers() if name.endswith(".num_batches_tracked")]
    model.load_state_dict({**state, **dict.fromkeys(counters, torch.tensor(0))}, assign=True)


def renamed(tensors: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """SAM 2's names to those of `Sam2Model`; what only tracking reads is left out.

    Raises:
        ExportError: a name that SAM 2 does not have.
    """
    state: dict[str, Tensor] = {}
    points: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(_VIDEO_ONLY) or key.endswith(".num_batches_tracked"):  # that one counts training steps
            continue
        if point := _POINT.match(key):
            points[int(point[1])] = tensor
            continue
        name = key
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        if name == key:
            raise ExportError(
                f"{file}: expected tensors of SAM 2, got {key[:80]!r}; is it a checkpoint of another model?"
            )
        state[name] = tensor
    if points:
        state["prompt_encoder.point_embed.weight"] = torch.cat([points[label] for label in sorted(points)])
    table = state.get("prompt_encoder.shared_embedding.positional_embedding")
    if table is not None:  # prompts and picture share it
        state["shared_image_embedding.positional_embedding"] = table
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ExportError(f"{path}: expected a checkpoint of SAM 2 that torch.load reads: {reason}") from error
    tensors: Any = content.get("model", content) if isinstance(content, dict) else None
    named = isinstance(tensors, dict) and all(isinstance(key, str) for key in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ExportError(f'{path}: expected tensors by name, or {{"model": tensors by name}}, got another content')
    return dict(tensors)


def _recognise(path: Path, tensors: Mapping[str, Tensor], config: str | None) -> str:
    """The name of the configuration whose shapes these are."""
    if is_edgetam(tensors):
        if config not in (None, EDGETAM, f"{EDGETAM}.yaml"):
            raise ExportError(f"{path}: expected {config}, got EdgeTAM; leave --segmenter-config out")
        return EDGETAM
    patches = tensors.get("image_encoder.trunk.patch_embed.proj.weight")
    if patches is None:
        raise ExportError(
            f"{path}: expected a checkpoint of SAM 2 with image_encoder.trunk.patch_embed.proj.weight; it has "
            f"{len(tensors)} tensors, first {next(iter(tensors), 'none')!r}"
        )
    blocks = 1 + max((int(match[1]) for match in map(_BLOCK.match, tensors) if match), default=-1)
    release = "sam2.1" if _ONLY_IN_2_1 in tensors else "sam2"
    size = next((one for one in HIERA_SIZES if (one.width, sum(one.blocks)) == (len(patches), blocks)), None)
    found = f"{len(patches)} channels and {blocks} blocks"
    if size is None:
        sizes = ", ".join(f"{one.name} ({one.width}, {sum(one.blocks)})" for one in HIERA_SIZES)
        raise ExportError(f"{path}: expected a published size, by channels and blocks {sizes}; it has {found}")
    name = f"{release}_{size.name}"
    if config is not None and size_of_config(config).name + release != size.name + config.partition("_")[0]:
        raise ExportError(f"{path}: expected {config}, got {found}, which is {name}; leave --segmenter-config out")
    assert name in CONFIG_NAMES
    return name


def check_complete(path: Path, name: str, state: Mapping[str, Tensor], model: Sam2Model) -> None:
    """Refuses weights that are not exactly the model's.

    Raises:
        ExportError: names the first that is missing, unknown or of another shape.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = {key: shape for key, shape in shapes.items() if not key.endswith(".num_batches_tracked")}
    missing = sorted(set(expected) - set(state))
    unknown = sorted(set(state) - set(expected))
    misshapen = sorted(key for key in set(state) & set(expected) if tuple(state[key].shape) != expected[key])
    if missing or unknown or misshapen:
        parts = [f"{what} {keys[0]}" for what, keys in (("lacks", missing), ("has an unknown", unknown)) if keys]
        parts += [f"{key} has shape {list(state[key].shape)}, not {list(expected[key])}" for key in misshapen[:1]]
        raise ExportError(f"{path}: expected a whole {name}, but it {'; '.join(parts)}; fetch it again")
