"""Imports point one way: export -> segzero_rt <- training. The runtime never loads what it was made to do without."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
RUNTIME = REPOSITORY / "segzero_rt"
FORBIDDEN = {"torch", "transformers", "tensorrt", "pycuda", "trl", "torchvision", "safetensors", "onnx", "tokenizers"}
ALLOWED = {"segzero_rt/device.py": {"pycuda"}}
"""The one file in which CUDA is called; it imports pycuda when a device is opened."""
HEAVY = FORBIDDEN | {"numpy", "cv2", "PIL", "onnxruntime"}


def modules(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute and relative module names that a file imports anywhere, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
            yield "." * node.level + (node.module or ""), node.lineno
            yield from ((("." * node.level) + name, node.lineno) for name in names)


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh process after `code`."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=REPOSITORY, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("path", modules("segzero_rt"), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_the_runtime_imports_neither_training_nor_export_nor_their_frameworks(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(REPOSITORY).as_posix(), set())
    for name, line in imports(path):
        where = f"{path.name}:{line} imports {name}"
        assert name.split(".")[0] not in (FORBIDDEN - allowed) | {"export", "training", "benchmarks", "tests"}, where
        assert not name.startswith(("segzero_rt.export", "segzero_rt.training")), where


@pytest.mark.parametrize(("folder", "others"), [("export", {"training"}), ("training", {"export"})])
def test_the_outer_folders_import_the_runtime_absolutely_and_themselves_relatively(
    folder: str, others: set[str]
) -> None:
    for path in modules(folder):
        for name, line in imports(path):
            where = f"{folder}/{path.name}:{line} imports {name}"
            assert name.split(".")[0] not in {folder, "tests", "benchmarks", *others}, where
            assert not name.startswith(("segzero_rt.export", "segzero_rt.training")), where
            dots = len(name) - len(name.lstrip("."))
            assert dots <= len(path.relative_to(REPOSITORY / folder).parts), f"{where}, out of the folder"


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_after("import segzero_rt, segzero_rt.cli; segzero_rt.__version__; dir(segzero_rt)")
    assert not loaded & HEAVY


def test_help_loads_nothing_heavy() -> None:
    for name in ("run", "segment", "eval", "bench", "build", "doctor"):
        loaded = loaded_after(f"from segzero_rt.cli import main; assert main(['{name}', '--help']) == 0")
        assert not loaded & HEAVY, f"segzero {name} --help"


def test_a_value_type_costs_no_backend() -> None:
    loaded = loaded_after("from segzero_rt import Prompt, parse_answer; Prompt(box_xyxy=(0, 0, 1, 1))")
    assert not loaded & (HEAVY - {"numpy"})


def test_every_public_name_exists() -> None:
    import segzero_rt

    for name in segzero_rt.__all__:
        assert getattr(segzero_rt, name) is not None
    assert set(segzero_rt.__all__) <= set(dir(segzero_rt))
    with pytest.raises(AttributeError, match="SegZerro"):
        segzero_rt.SegZerro  # noqa: B018 - the access is the test


def test_a_real_run_loads_none_of_the_frameworks(tiny_bundle_path: Path) -> None:
    code = f"""
import numpy as np
from segzero_rt import Prompt, SegZero
pipeline = SegZero.load({str(tiny_bundle_path)!r}, backend="cpu", threads=1)
picture = np.full((90, 120, 3), 99, np.uint8)
pipeline(picture, "the red mug", max_new_tokens=8)
pipeline.segment(picture, [Prompt(box_xyxy=(10, 10, 50, 60))]).to_json()
"""
    loaded = loaded_after(code)
    assert {"onnxruntime", "numpy"} <= loaded
    assert not loaded & FORBIDDEN
