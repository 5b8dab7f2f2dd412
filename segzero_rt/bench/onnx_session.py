"""ONNX Runtime sessions that measurements make for themselves: with a profile, or of a graph that exists in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segzero_rt.graph import Backend


def open_session(
    model: str | bytes, backend: Backend, threads: int, *, profile: str | None = None, library: Path | None = None
) -> Any:
    """A session on a backend that is known to be there.

    Args:
        model: a file, or its contents.
        threads: of one run.
        profile: path prefix of a profile of all runs. Its nodes are then the graph's own as far as ONNX Runtime leaves
            them, with weights in their declared shapes: neither packed nor blocked for one processor's kernels.
        library: of compiled operators, which then take the place of functions in the graph.
    """
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.disable_prepacking", "1")
    return runtime.InferenceSession(model, options, providers=list(backend.providers))


def device_value(array: Any, backend: Backend) -> Any:
    """A copy of a NumPy array where the backend computes."""
    import onnxruntime as runtime

    return runtime.OrtValue.ortvalue_from_numpy(array, backend.device, 0)
