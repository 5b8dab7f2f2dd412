"""The whole segmenter against SAM 2's own predictor: same checkpoint, picture and prompt, masks compared before timing.

    python -m benchmarks.segmenter_predictor --package .venv-sam2 --size hiera_t

`.venv-sam2` is the folder that `make test` fills with PyPI's sam2. Weights are random, written by that package at
1024 x 1024. One round is `set_image` and one `predict` with box and point, three masks; sides take turns. torchvision,
which has no CPU build beside this torch, is stood in for by three functions of torch (`tests/sam2_reference.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from segzero_rt.answer import Prompt
from segzero_rt.graph import Graph
from segzero_rt.segmenter import ImageEncoder, MaskDecoder

from .measuring import RESULTS, paired, pin_to_cores, run_and_exit, write_result

TESTS = Path(__file__).parent.parent / "tests"
BOX_XYXY, POINT_XY = (100.0, 200.0, 500.0, 700.0), (250.0, 300.0)
MAX_ERROR = 1e-4
"""Of |ours - theirs| / |theirs| over the chosen mask's logits, within SAM 2's clamp."""

Run = Callable[[], np.ndarray]
"""Picture and prompt to the best mask's logits, float32 [h, w]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="folder with PyPI's sam2")
    parser.add_argument("--size", choices=("hiera_t", "hiera_s", "hiera_b+", "hiera_l"), default="hiera_t")
    parser.add_argument("--flavour", choices=("ort", "portable"), default="ort")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    arguments = parser.parse_args()
    pin_to_cores(arguments.threads)
    sys.path[:0] = [str(arguments.package), str(TESTS)]
    import torch

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="segzero-sam2-") as folder:
        theirs, version = sam2_predictor(arguments.size, Path(folder))
        ours = exported(Path(folder), arguments.flavour, arguments.threads)
        document = {"size": arguments.size, "threads": arguments.threads, "sam2": version}
        document |= measure(ours, theirs, arguments.rounds)
    path = write_result("segmenter_predictor", document, arguments.out, variant=arguments.size)
    print(json.dumps({"result": str(path), **document}))


def sam2_predictor(size: str, folder: Path) -> tuple[Run, str]:
    """Their side, which also writes `checkpoint.pt`; and the package's version."""
    import importlib.metadata

    import sam2_reference
    import torch

    sam2_reference.stand_in_for_torchvision()
    from sam2.build_sam import build_sam2
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    for name in ("torchvision", "torchvision.transforms"):  # transformers would take the stand-in for the package
        del sys.modules[name]
    torch.manual_seed(0)
    model = build_sam2(f"configs/sam2.1/sam2.1_{size}.yaml", device="cpu")
    torch.save({"model": model.state_dict()}, folder / "checkpoint.pt")
    predictor, picture = SAM2ImagePredictor(model), sam2_reference.picture()

    def run() -> np.ndarray:
        predictor.set_image(picture)
        point, box = np.array([POINT_XY]), np.array(BOX_XYXY)
        _, scores, logits = predictor.predict(point_coords=point, point_labels=np.array([1]), box=box)
        return np.asarray(logits[int(scores.argmax())])

    return run, importlib.metadata.version("sam2")


def exported(folder: Path, flavour: str, threads: int) -> Run:
    """Our side, exported from their checkpoint; it also brings the mask to the picture's size, as theirs does."""
    import sam2_reference

    from export.segmenter import export_mask_decoder, segmenter_manifest
    from export.segmenter_checkpoint import load_checkpoint
    from export.segmenter_encoder import build_image_encoder
    from export.segmenter_specs import segmenter_specs

    model = load_checkpoint(folder / "checkpoint.pt")
    specs, manifest = segmenter_specs(model), segmenter_manifest(model)
    build_image_encoder(model, specs.encoder, flavour=flavour, storage="float32").save(folder / "encoder.onnx")
    export_mask_decoder(model, folder / "decoder.onnx", storage="float32")
    load = {name: folder / f"{name}.onnx" for name in ("encoder", "decoder")}
    encoder, decoder = (
        Graph.load(path, getattr(specs, name), backend="cpu", threads=threads) for name, path in load.items()
    )
    encode, decode, picture = ImageEncoder(encoder, manifest), MaskDecoder(decoder, manifest), sam2_reference.picture()
    prompt = Prompt(box_xyxy=BOX_XYXY, points_xy=(POINT_XY,))
    return lambda: np.clip(decode(encode(picture), [prompt]).logits[0], -32, 32)


def measure(ours: Run, theirs: Run, rounds: int) -> dict[str, Any]:
    """Checks that both sides agree, then times them in turns.

    Raises:
        SystemExit: they do not agree.
    """
    reference = theirs()
    error = float(np.linalg.norm(ours() - reference) / np.linalg.norm(reference))
    if not error <= MAX_ERROR:
        raise SystemExit(f"expected the same mask, got a relative error of {error}; nothing was timed")
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    sides = [("ours", ours), ("theirs", theirs)]
    for turn in range(rounds):
        for name, run in sides if turn % 2 == 0 else sides[::-1]:
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {"relative_error": error, "picture_and_prompt_ms": paired(times["ours"], times["theirs"])}


if __name__ == "__main__":
    run_and_exit(main, "segmenter_predictor")
