"""Which CUDA devices have the number types that a bundle's graphs are stored in, told from the files' headers alone.

A strongly typed engine computes in the types of its file, so TensorRT builds none of a graph for a device that lacks
one of them. TensorRT-RTX 1.7 says so itself when it builds ("Cannot compile for target(s) sm86, because the model
contains HW-specific datatypes: fp8_e4m3"), after minutes for a large graph; here it is known before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from segzero_rt.bundle import Bundle
from segzero_rt.onnx_summary import read_summary

LEAST_CAPABILITY = {"bfloat16": "8.0", "float8": "8.9", "float4": "10.0"}
"""Number type to the first compute capability that has it, ascending: TensorRT's support matrix
(https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html). TensorRT-RTX 1.7 was seen to
refuse 7.5, 8.6 and 8.9 for want of them, and to build for 8.0, 8.9 and 12.0."""
CUDA_ONLY = ("float4",)
"""Types of weights that ONNX Runtime reads on no CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeNeed:
    """A number type that not every CUDA device has, and where a bundle stores it."""

    dtype: str
    """A name of `LEAST_CAPABILITY`."""
    graphs: tuple[str, ...]
    """Paths inside the bundle."""

    @property
    def least_capability(self) -> str:
        return LEAST_CAPABILITY[self.dtype]

    def met_by(self, capability: str) -> bool:
        """Whether devices of this compute capability, such as "8.9", have the type."""
        return _numbers(capability) >= _numbers(self.least_capability)

    def __str__(self) -> str:
        return f"{self.dtype} of {', '.join(self.graphs)}"


def type_needs(bundle: Bundle, graphs: Collection[str] = ()) -> tuple[TypeNeed, ...]:
    """What a bundle's graphs need, the most common type first.

    Args:
        graphs: paths inside the bundle; all of its graphs by default.

    Raises:
        GraphError: a graph cannot be read.
    """
    stored = {path: _types(bundle, path) for path in graphs or _graphs(bundle)}
    found = {dtype: tuple(path for path, types in stored.items() if dtype in types) for dtype in LEAST_CAPABILITY}
    return tuple(TypeNeed(dtype=dtype, graphs=paths) for dtype, paths in found.items() if paths)


def _types(bundle: Bundle, path: str) -> set[str]:
    return {weight.dtype for weight in read_summary(bundle.file(path)).weights}


def _graphs(bundle: Bundle) -> list[str]:
    policy, segmenter = bundle.manifest.policy.graphs, bundle.manifest.segmenter.graphs
    listed = (policy.vision, policy.embedding, policy.decoder, segmenter.encoder, segmenter.decoder)
    return [path for path in (*listed, segmenter.mask_prompt) if path is not None]


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
