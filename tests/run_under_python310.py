"""Run by `test_python310.py` under Python 3.10: loads every graph of a bundle and runs it once."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime

from segzero_rt import Prompt, SegZero
from segzero_rt.answer_format import FORMATS

pipeline = SegZero.load(sys.argv[1], backend="cpu", threads=1)
picture = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
answered = [pipeline(picture, "the red mug", answer_format=name, max_new_tokens=8).status.value for name in FORMATS]
segmented = pipeline.segment(picture, [Prompt(box_xyxy=(20, 20, 90, 100), points_xy=((50, 50),))])
print(
    json.dumps(
        {
            "python": list(sys.version_info[:2]),
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "statuses": answered,
            "mask_shape": list(segmented.masks.shape),
            "document": segmented.to_json(),
        }
    )
)
