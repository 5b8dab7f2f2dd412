"""`segzero run IMAGE QUESTION --json` done with transformers: the same job as a plain script, to be timed as a process.

python -m benchmarks.transformers_run table.png "the red mug" --bundle B --policy HF --segmenter HF
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Prints one JSON document like that of `segzero run --json`, less the masks' encoding."""
    parser = argparse.ArgumentParser(description="answer a question about a picture with transformers")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--bundle", type=Path, required=True, help="for sizes and constants; its graphs are not read")
    parser.add_argument("--policy", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--segmenter", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--round-weights", action="store_true", help="round weights to float16 first, as stored")
    arguments = parser.parse_args()

    import numpy as np
    import torch
    from PIL import Image

    from .transformers_pipeline import TransformersPipeline

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pipeline = TransformersPipeline(
        arguments.bundle, arguments.policy, arguments.segmenter, round_weights=arguments.round_weights
    )
    reply = pipeline(np.array(Image.open(arguments.image).convert("RGB")), arguments.question)
    objects = [
        {"box_xyxy": box, "points_xy": [point], "score": score, "area": int(mask.sum())}
        for box, point, score, mask in zip(reply.boxes_xyxy, reply.points_xy, reply.scores, reply.masks, strict=True)
    ]
    print(json.dumps({"text": reply.text, "objects": objects, "timings_ms": reply.timings_ms}))


if __name__ == "__main__":
    main()
