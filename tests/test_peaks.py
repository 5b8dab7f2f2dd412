"""Largest magnitudes inside a graph: as NumPy finds them, over a batch, and in little memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("torch", reason="torch is not installed; it comes with segzero-rt[export]")

from export.peaks import largest_magnitudes

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS, WIDTH = 2048, 256
LAYERS = 60
"""Of 2 MB each."""


def chain(layers: int, rows: int = ROWS, width: int = WIDTH) -> onnx.ModelProto:
    """Products one behind the other, each with the weight "w", which doubles."""
    names = ["x", *(f"h{layer}" for layer in range(1, layers)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in itertools.pairwise(names)]
    shape = ["batch", rows, width]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(2 * np.eye(width, dtype=np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_each_tensors_largest_number_and_each_channels(batch: int) -> None:
    x = noise(batch, 7, 4)
    found = largest_magnitudes(chain(3, 7, 4), {"x": 4, "h1": 0, "h2": 4, "y": 0}, {"x": x})
    channels = np.abs(x).max(axis=(0, 1))
    np.testing.assert_array_equal(found["x"], channels)
    np.testing.assert_array_equal(found["h1"], 2 * channels.max())
    np.testing.assert_array_equal(found["h2"], 4 * channels)
    np.testing.assert_array_equal(found["y"], 8 * channels.max())


@pytest.mark.parametrize(("name", "value"), [("infinite", np.inf), ("minus infinite", -np.inf), ("largest", -3.4e38)])
def test_what_leaves_floats_range_is_told(name: str, value: float) -> None:
    x = noise(2, 3, 1)
    x[1, 2, 0] = value
    found = largest_magnitudes(chain(2, 3, 1), {"x": 0, "y": 1}, {"x": x})
    assert found["x"] == np.float32(abs(value))
    assert found["y"] == [np.inf]


_MEASURE = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
from test_peaks import LAYERS, chain, largest_magnitudes, noise, ROWS, WIDTH
def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x = noise(1, ROWS, WIDTH)
largest_magnitudes(chain(2), {"x": 0, "y": 0}, {"x": x})
before = peak_bytes()
names = ["x", *(f"h{layer}" for layer in range(1, LAYERS)), "y"]
largest_magnitudes(chain(LAYERS), dict.fromkeys(names, 0), {"x": x})
print((peak_bytes() - before) / x.nbytes)
"""


def test_tensors_are_let_go_once_they_are_measured() -> None:
    command = [sys.executable, "-c", _MEASURE, str(REPOSITORY), str(REPOSITORY / "tests")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    held = float(result.stdout.splitlines()[-1])
    assert held < LAYERS / 3, f"{held:.0f} of {LAYERS} tensors were held at once"
