"""The tiny segmenter of `tiny_checkpoints`: in PyTorch, as graphs with unrounded weights, as the runtime's halves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segzero_rt.graph import Graph
from segzero_rt.manifest import SegmenterManifest
from segzero_rt.segmenter import ImageEncoder, MaskDecoder


@dataclass(frozen=True, kw_only=True)
class Exported:
    model: Any
    files: Any
    """`export.segmenter_specs.SegmenterFiles`"""
    graphs: tuple[Graph, Graph]
    """Encoder and decoder."""
    manifest: SegmenterManifest
    encoder: ImageEncoder
    decoder: MaskDecoder


def export_tiny(checkpoint: Path, folder: Path) -> Exported:
    from export.segmenter import export_segmenter
    from export.segmenter_checkpoint import load_checkpoint
    from export.segmenter_specs import SegmenterFiles, segmenter_specs

    result = export_segmenter(checkpoint, folder, storage="float32")
    model, graphs = load_checkpoint(checkpoint), result.manifest.graphs
    assert graphs.mask_prompt is not None
    paths = {name: result.files[getattr(graphs, name)] for name in ("encoder", "decoder", "mask_prompt")}
    specs = segmenter_specs(model)
    encoder, decoder, masks = (
        Graph.load(paths[spec_name], getattr(specs, spec_name), backend="cpu") for spec_name in paths
    )
    return Exported(
        model=model,
        files=SegmenterFiles(**paths),
        graphs=(encoder, decoder),
        manifest=result.manifest,
        encoder=ImageEncoder(encoder, result.manifest),
        decoder=MaskDecoder(decoder, result.manifest, lambda: masks),
    )
