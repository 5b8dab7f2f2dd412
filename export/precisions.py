"""Names of precisions: of weights in the files, and of what is computed with them."""

from __future__ import annotations

STORAGES = ("float16", "float32", "int8")
"""Of weights in the files of both models."""
POLICY_STORAGES = (*STORAGES, "bfloat16", "int4", "fp8", "nvfp4")
NVFP4 = "nvfp4"
EXPLICIT_STORAGES = ("fp8", NVFP4)
"""That plain operators alone spell out, in flavours other than "ort"."""
QUANTIZED_STORAGES = ("int8", "int4")
"""Whose products are operators of ONNX Runtime's own in flavour "ort"."""
COMPUTED = ("float32", "float16")
"""ONNX Runtime has no products of bfloat16 on CPUs, so that no gate could try them; as storage it is fine."""
ENCODER_COMPUTED = (*COMPUTED, "bfloat16")
"""Of the segmenter's image encoder, whose gate runs a twin of it that rounds alike."""
INT4_METHODS = ("rtn", "awq")
"""How weights get their 4 bits: rounded to nearest, or scaled before by the activations that they meet."""
