"""An ONNX graph over PyTorch's memory, on PyTorch's current stream: nothing is copied and nobody waits.

The runtime's own way to share a device's memory does without PyTorch; here both are measured side by side, with the
same clock, so that they have to use one stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import GpuCheckError

if TYPE_CHECKING:
    import torch

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_DTYPES = {"torch.float32": np.float32, "torch.float16": np.float16, "torch.int64": np.int64, "torch.int32": np.int32}
_NO_CAPTURE, _CAPTURE = "-1", "1"


def own_stream(device: str) -> None:
    """Makes a stream of this process the current one: ONNX Runtime takes the default stream for none at all."""
    if device == "cuda":
        import torch

        torch.cuda.set_stream(torch.cuda.Stream())


class DeviceGraph:
    """A session whose inputs and outputs are tensors that stay where they are.

    Args:
        path: the ONNX file.
        device: "cuda" or "cpu".
        replay: runs are recorded once as a CUDA graph and replayed then; shapes and tensors must stay as they are.

    Raises:
        GpuCheckError: ONNX Runtime has no such device, or puts the graph on another one.
    """

    def __init__(self, path: Path, device: str, *, replay: bool = False) -> None:
        import onnxruntime

        provider = PROVIDERS[device]
        if provider not in onnxruntime.get_available_providers():
            raise GpuCheckError(
                f"expected ONNX Runtime with {provider}, {onnxruntime.__version__} in {onnxruntime.__file__} has none; "
                "carry onnxruntime-gpu"
            )
        self._device, self._replay = device, replay and device == "cuda"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._runtime = onnxruntime
        others = [one for one in PROVIDERS.values() if one != provider and device != "cpu"]
        providers = [(provider, self._provider_options()), *others]
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if self._session.get_providers()[0] != provider:
            raise GpuCheckError(
                f"expected {path.name} on {provider}, ONNX Runtime started {self._session.get_providers()[0]}; see its "
                "log for the library that is missing"
            )
        self._binding = self._session.io_binding()
        self._tensors: dict[str, Any] = {}

    def bind(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Ties tensors to the graph; those that were tied before under other names stay.

        Raises:
            GpuCheckError: a tensor is not contiguous, or of a type that graphs do not have.
        """
        for binds, tensors in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                if not tensor.is_contiguous() or str(tensor.dtype) not in _DTYPES:
                    raise GpuCheckError(f"expected {name} contiguous, of {', '.join(_DTYPES)}, got {tensor.dtype}")
                binds(name, self._device, 0, _DTYPES[str(tensor.dtype)], tuple(tensor.shape), tensor.data_ptr())
        self._tensors |= {**inputs, **outputs}  # ONNX Runtime holds addresses only

    def run(self, *, capture: bool = True) -> None:
        """Enqueues a run. `capture=False` keeps a run of other shapes out of the recorded ones."""
        options = self._runtime.RunOptions()
        if self._device == "cuda":
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            if self._replay:
                options.add_run_config_entry("gpu_graph_id", _CAPTURE if capture else _NO_CAPTURE)
        self._session.run_with_iobinding(self._binding, options)

    def _provider_options(self) -> dict[str, str]:
        if self._device == "cpu":
            return {}
        import torch

        stream = torch.cuda.current_stream().cuda_stream
        if stream == 0:
            raise GpuCheckError("expected a stream of this process's own, got the default one; call own_stream first")
        # Matrices in float32 are computed in tf32 otherwise, and compared with PyTorch's that are not.
        options = {"user_compute_stream": str(stream), "use_tf32": "0"}
        return options | ({"enable_cuda_graph": "1"} if self._replay else {})
