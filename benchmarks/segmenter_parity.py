"""The published sizes of SAM 2.1 exported in float32 and compared with PyTorch: features, masks, scores, memory, time.

    python -m benchmarks.segmenter_parity                          # all four, several minutes each on two cores
    python -m benchmarks.segmenter_parity --sizes hiera_t --flavour portable

No weights can be shipped, so they are random, from the published configurations at 1024 x 1024; biases, norms and
positions are drawn too, which a new model leaves at 0 and 1 and so would hide mistakes. Each size runs in a process of
its own, whose peak memory stands beside the figures: PyTorch's weights and activations are most of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .measuring import RESULTS, run_and_exit, write_result

if TYPE_CHECKING:
    from transformers import Sam2Model

SIZES = ("hiera_t", "hiera_s", "hiera_b+", "hiera_l")


def random_segmenter(size: str, seed: int = 0) -> Sam2Model:
    """A `Sam2Model` of a published size, one of `SIZES`, float32, with no weight left at 0 or 1."""
    import torch
    from transformers import Sam2Model

    from export.segmenter_sizes import HIERA_SIZES

    torch.manual_seed(seed)
    model = Sam2Model(next(one for one in HIERA_SIZES if one.name == size).config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "pos_embed" in name or name == "no_memory_embedding":
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(
            model.shared_image_embedding.positional_embedding
        )
    return model.eval()


def measure(size: str, flavour: str) -> dict[str, Any]:
    """Exports one size and gates it; raises ExportError where the gate refuses."""
    from export.gate_segmenter import EXACT, gate_pixels, gate_segmenter
    from export.segmenter import export_mask_decoder, export_mask_prompt
    from export.segmenter_encoder import build_image_encoder
    from export.segmenter_specs import SegmenterFiles, segmenter_specs

    start = time.perf_counter()
    model = random_segmenter(size)
    with tempfile.TemporaryDirectory(prefix="segzero-parity-") as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("encoder", "decoder", "mask_prompt")}
        encoder = build_image_encoder(model, segmenter_specs(model).encoder, flavour=flavour, storage="float32")
        encoder.save(paths["encoder"])
        export_mask_decoder(model, paths["decoder"], storage="float32")
        export_mask_prompt(model, paths["mask_prompt"], storage="float32")
        exported = time.perf_counter()
        pixels = gate_pixels(segmenter_specs(model).encoder, noise=1)
        gate = gate_segmenter(model, SegmenterFiles(**paths), pixels=pixels, limits=EXACT)
        num_bytes = {name: path.stat().st_size for name, path in paths.items()}
    return {
        "size": size,
        "flavour": flavour,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: figure for name, figure in gate.items() if name != "limits"},
        "graph_bytes": num_bytes,
        "export_s": round(exported - start, 1),
        "gate_s": round(time.perf_counter() - exported, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--flavour", choices=("ort", "portable"), default="ort")
    parser.add_argument("--alone", action="store_true", help="measure the one size here and write no result file")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.sizes[0], arguments.flavour)))
        return
    rows = [_in_own_process(size, arguments.flavour) for size in arguments.sizes]
    path = write_result("segmenter_parity", {"rows": rows}, arguments.out)
    print(path, file=sys.stderr)
    print(json.dumps(rows))


def _in_own_process(size: str, flavour: str) -> dict[str, Any]:
    options = ["--alone", "--sizes", size, "--flavour", flavour]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.segmenter_parity", *options], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise SystemExit(f"{size}: {' '.join(run.stderr.split())[-400:]}")
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    print(f"{size}: features {row['max_feature_error']:.1e}, masks {row['max_logit_error']:.1e}", file=sys.stderr)
    return row


if __name__ == "__main__":
    run_and_exit(main, "segmenter_parity")
