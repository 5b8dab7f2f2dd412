"""Compiled operators that ONNX Runtime runs in place of several of its own; see `library`."""

DOMAIN = "segzero"
"""Of the operators' names in graphs."""
