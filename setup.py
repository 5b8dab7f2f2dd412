"""Packaging of segzero-rt: one importable name, `segzero_rt`, and one file in Optimum's namespace.

The folders `export/` and `training/` of the checkout are installed as `segzero_rt.export` and `segzero_rt.training`: a
top-level `training` would overwrite that of PyPI's `sam2`, which ships one too. They hold a few hundred kilobytes of
Python and import torch only when their commands run, so they travel in the one wheel; their dependencies are extras.

The kernels are an optional extension module: where there is no C++ compiler, or `SEGZERO_EXTENSION=0` says so, the
wheel is one for any platform and the runtime compiles them later or uses their Python reference.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "segzero_rt/__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION is not None, "segzero_rt/__init__.py names the version"

CORE = [
    "numpy>=1.26",
    "opencv-python-headless>=4.8",
    # Resampling is part of the model: these policies were trained on Pillow's antialiased resizing.
    "Pillow>=10.1",
]
# onnxruntime and onnxruntime-gpu are two distributions of one module, and extras can only add: the core names neither.
# 1.23 is the last release with wheels for Python 3.10, which is what JetPack 6 has.
CPU = ["onnxruntime>=1.23"]
# transformers 5 renamed the Qwen2.5-VL and SAM 2 classes that the exporters load weights from.
TORCH = ["torch>=2.6", "transformers>=5.0", "safetensors>=0.4", "tokenizers>=0.20"]
# torch.onnx.export(dynamo=True) writes through onnxscript.
# ml_dtypes: NumPy has no bfloat16. PEFT, which `--adapter` is compared with, is left to those who have adapters.
EXPORT = [*TORCH, "onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.23", "ml_dtypes>=0.5"]
# pyarrow and pycocotools read published data sets: `segzero train prepare` as well as the evaluation.
EVAL = ["pyarrow>=15", "pycocotools>=2.0.7"]
# scikit-image: real photographic texture for the segmenter's training pictures; installed, never committed.
# matplotlib draws the learning curves of experiments.
# TRL is held below 2: `training/grpo_trainer.py` overrides two methods of its trainer that are no public interface.
TRAIN = [
    *TORCH,
    *EVAL,
    "tqdm>=4.60",
    "accelerate>=1.10",
    "datasets>=4.0",
    "matplotlib>=3.8",
    "peft>=0.18",
    "scikit-image>=0.22",
    "scipy>=1.11",
    "tensorboard>=2.14",
    "trl>=1.16,<2",
]
DEV = [
    "build>=1.2",
    # What the answer grammar's allowed tokens are compared with.
    "llguidance>=1.0",
    "mypy>=1.11",
    "pytest>=8",
    "ruff>=0.6",
    "setuptools>=70.1",
    # What gIoU, cIoU and the rates about nothing are compared with; it stands on torch, which [train] brings.
    "torchmetrics>=1.4",
]


KERNELS, OPERATORS = "segzero_rt/kernels", "segzero_rt/operators"


def kernel_modules() -> list[Extension]:
    """The compiled kernels: for any processor, and once more for recent x86; none where they cannot be built."""
    facts = runpy.run_path(str(HERE / KERNELS / "sources.py"))
    compiler = os.environ.get("CXX", "").split()[:1] or ["g++", "c++"]
    if os.environ.get("SEGZERO_EXTENSION") == "0" or os.name != "posix" or not any(map(shutil.which, compiler)):
        return []
    variants = {facts["MODULE_NAME"]: ()}
    operators = []
    if platform.machine() in ("x86_64", "AMD64"):
        variants[facts["FAST_MODULE_NAME"]] = facts["FAST_FLAGS"]
        operators.append(operators_library())
    return operators + [
        Extension(
            f"segzero_rt.kernels.{name}",
            [f"{KERNELS}/{facts['MODULE_SOURCE']}"],
            define_macros=list(facts["macros"](name)),
            extra_compile_args=[*facts["FLAGS"], *flags],
            language="c++",
            optional=True,
        )
        for name, flags in variants.items()
    ]


def operators_library() -> Extension:
    """The compiled operators: no module of Python's, but a library that ONNX Runtime loads."""
    facts = runpy.run_path(str(HERE / OPERATORS / "sources.py"))
    return Extension(
        f"segzero_rt.operators.{facts['LIBRARY_NAME']}",
        [f"{OPERATORS}/{facts['SOURCE']}"],
        define_macros=list(facts["macros"]()),
        extra_compile_args=list(facts["FLAGS"]),
        language="c++",
        optional=True,
    )


class CleanBuildPy(build_py):
    """Begins with an empty folder: what an earlier build left in `build/lib` would go into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "segzero_rt", ignore_errors=True)
        super().run()


setup(
    name="segzero-rt",
    version=VERSION.group(1),
    description="Reasoning segmentation without PyTorch at run time: an image and a question to thinking and masks",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    cmdclass={"build_py": CleanBuildPy},
    ext_modules=kernel_modules(),
    packages=[
        "segzero_rt",
        "segzero_rt.bench",
        "segzero_rt.commands",
        "segzero_rt.engines",
        "segzero_rt.kernels",
        "segzero_rt.operators",
        "segzero_rt.preflight",
        "segzero_rt.readers",
        "segzero_rt.resident",
        "segzero_rt.export",
        "segzero_rt.training",
        "segzero_rt.training.experiments",
        # Optimum finds subcommands in this namespace (PEP 420) and nowhere else; without Optimum nothing reads it.
        "optimum.commands.register",
    ],
    package_dir={
        "segzero_rt": "segzero_rt",
        "segzero_rt.export": "export",
        "segzero_rt.training": "training",
        "optimum.commands.register": "export/optimum",
    },
    package_data={
        "segzero_rt": ["py.typed", "bundles/*/*", "bundles/*/*/*"],
        "segzero_rt.kernels": ["*.cpp", "*.cu", "*.cuh", "*.hpp"],
        "segzero_rt.operators": ["*.cpp", "*.hpp"],
        "segzero_rt.training": ["accelerate/*.yaml"],
    },
    install_requires=CORE,
    extras_require={
        "cpu": CPU,
        "gpu": ["onnxruntime-gpu>=1.23"],
        "tensorrt": ["tensorrt>=10.3"],
        # Builds without a GPU, so the tests have it; there are wheels for x86 alone.
        "tensorrt-rtx": ['tensorrt-rtx-cu13>=1.7; platform_machine == "x86_64" or platform_machine == "AMD64"'],
        "cuda": ["pycuda>=2024.1"],
        "export": EXPORT,
        # `optimum-cli export segzero`
        "optimum": [*EXPORT, "optimum>=2.0"],
        "train": TRAIN,
        # These bring or build CUDA code: never part of [train], which CI installs.
        "qlora": [*TRAIN, "bitsandbytes>=0.45"],
        "deepspeed": [*TRAIN, "deepspeed>=0.18"],
        "vllm": [*TRAIN, "vllm>=0.12"],
        "eval": EVAL,
        "plot": ["matplotlib>=3.8"],
        # ROS 2's wheels exist for Python 3.11 alone.
        "ros": [
            'ros-rclpy[fastrtps]; python_version == "3.11"',
            'ros-sensor-msgs; python_version == "3.11"',
            'ros-std-msgs; python_version == "3.11"',
        ],
        "dev": DEV,
    },
    entry_points={
        "console_scripts": ["segzero = segzero_rt.cli:main"],
        # Commands outside the runtime. Each entry resolves to an object with NAME, HELP, configure and execute.
        "segzero.commands": [
            "export = segzero_rt.export.command",
            "train = segzero_rt.training.command:TRAIN",
            "scenes = segzero_rt.training.command:SCENES",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
