"""SAM 2.1's image encoder on a CPU: ONNX Runtime against PyTorch eager and `torch.compile`, one run, same weights.

    python -m benchmarks.segmenter_encoder --size hiera_t
    python -m benchmarks.segmenter_encoder --size hiera_l --rounds 3 --skip-compile

Weights are random, from the published configuration at 1024 x 1024; the time does not depend on them. Outputs are
compared before anything is timed, all sides get the same picture and so many threads, and they take turns. Where the
processor has compiled operators, "functions" is the same graph without them. PyTorch runs transformers' own
`Sam2Model.get_image_features` under `inference_mode`; `torch.compile` gets its default settings, and what it takes to
compile stands apart, as `first_run_s`.
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

from .measuring import RESULTS, paired, pin_to_cores, run_and_exit, write_result
from .segmenter_parity import SIZES, random_segmenter

MAX_ERROR = 1e-4
"""Of `|ours - theirs| / |theirs|`, before anything is timed."""

Run = Callable[[], list[np.ndarray]]


def sides(size: str, flavour: str, storage: str, threads: int, *, compiled: bool, folder: Path) -> dict[str, Run]:
    """The same picture through each side: its three outputs, finest first."""
    import torch

    from export.segmenter_encoder import build_image_encoder
    from export.segmenter_specs import segmenter_specs
    from segzero_rt.graph import Graph
    from segzero_rt.operators.library import resolve_operators

    torch.set_num_threads(threads)
    model = random_segmenter(size)
    spec = segmenter_specs(model).encoder
    build_image_encoder(model, spec, flavour=flavour, storage=storage).save(folder / "encoder.onnx")
    graph, plain = (
        Graph.load(folder / "encoder.onnx", spec, backend="cpu", threads=threads, operators=operators)
        for operators in (True, False)
    )
    pixels = np.random.default_rng(0).normal(0, 1, (1, 3, 1024, 1024)).astype(np.float32)
    tensor = torch.from_numpy(pixels)

    def through(graph: Graph) -> Run:
        def run() -> list[np.ndarray]:
            outputs = graph.run({"pixel_values": pixels})
            return [outputs[name] for name in ("high_res_features_0", "high_res_features_1", "image_embeddings")]

        return run

    def of(call: Callable[..., Any]) -> Run:
        def run() -> list[np.ndarray]:
            with torch.inference_mode():
                maps = call(tensor)
                maps[-1] = maps[-1] + model.no_memory_embedding
                sizes = model.backbone_feature_sizes
                maps = [one.permute(1, 2, 0).reshape(1, -1, *hw) for one, hw in zip(maps, sizes, strict=True)]
            return [one.numpy() for one in maps]

        return run

    def features(picture: torch.Tensor) -> list[torch.Tensor]:
        return list(model.get_image_features(picture, return_dict=True).fpn_hidden_states)

    runs: dict[str, Run] = {"segzero": through(graph)}
    if resolve_operators().path is not None:
        runs["functions"] = through(plain)
    runs["pytorch eager"] = of(features)
    if compiled:
        runs["torch.compile"] = of(torch.compile(features))
    return runs


def measure(runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    """Checks that all sides agree, then times them in turns."""
    first: dict[str, list[np.ndarray]] = {}
    start_s: dict[str, float] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        first[name] = run()
        start_s[name] = round(time.perf_counter() - start, 2)
        print(f"{name}: first run {start_s[name]} s", file=sys.stderr, flush=True)
    reference = first["pytorch eager"]
    errors = {
        name: max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(maps, reference, strict=True))
        for name, maps in first.items()
    }
    if not all(error <= MAX_ERROR for error in errors.values()):
        raise SystemExit(f"expected equal features, got relative errors {errors}; nothing was timed")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        order = list(runs) if turn % 2 == 0 else list(reversed(runs))
        for name in order:
            start = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {
        "relative_error": errors,
        "first_run_s": start_s,
        "encoder_ms": times,
        "ratios": {name: paired(times["segzero"], times[name]) for name in runs if name != "segzero"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="hiera_t")
    parser.add_argument("--flavour", choices=("ort", "portable"), default="ort")
    parser.add_argument("--storage", choices=("float32", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--skip-compile", action="store_true", help="without torch.compile, which compiles for minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    pin_to_cores(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="segzero-encoder-") as folder:
        runs = sides(
            arguments.size,
            arguments.flavour,
            arguments.storage,
            arguments.threads,
            compiled=not arguments.skip_compile,
            folder=Path(folder),
        )
        document = {"size": arguments.size, "threads": arguments.threads, **measure(runs, arguments.rounds)}
    path = write_result("segmenter_encoder", document, arguments.out, variant=arguments.size)
    print(path, file=sys.stderr)
    print(json.dumps(document))


if __name__ == "__main__":
    run_and_exit(main, "segmenter_encoder")
