"""Opens a bundle for the resident pipeline: one CUDA device, two streams, and graphs that run in them."""

from __future__ import annotations

import os
from dataclasses import replace

from segzero_rt.bundle import Bundle
from segzero_rt.device import Device
from segzero_rt.engines.record import TARGETS
from segzero_rt.errors import BackendError
from segzero_rt.graph import Backend, resolve_backend
from segzero_rt.kernels.device_kernels import DeviceKernels
from segzero_rt.policy import Policy
from segzero_rt.resident.pipeline import ResidentSegZero
from segzero_rt.segmenter import ImageEncoder, MaskDecoder

RESIDENT_BACKENDS = ("cuda", *TARGETS)


def load_resident(
    bundle: Bundle | str | os.PathLike[str] | None = None,
    *,
    backend: str = "cuda",
    allow_ungated: bool = False,
    constrained: bool = False,
    replay: bool = False,
) -> ResidentSegZero:
    """Opens a bundle, checks it, and loads its graphs and the kernels onto the first CUDA device.

    Args:
        bundle: as `SegZero.load`.
        backend: "cuda" runs the ONNX graphs by ONNX Runtime; "tensorrt" and "tensorrt-rtx" the bundle's engines.
        allow_ungated: take engines that were never compared with their reference.
        constrained: hold replies to their format's grammar.
        replay: have ONNX Runtime capture runs of fixed shapes as CUDA graphs and replay them.

    Raises:
        BundleError: not a bundle, or damaged.
        BackendError: an unknown backend, one that is not installed, no device, or no kernels for it.
        GraphError: a graph differs from its spec.
        EngineError: the bundle has no engine that may run here.
    """
    if backend not in RESIDENT_BACKENDS:
        raise BackendError(f"expected a backend on a device, {', '.join(RESIDENT_BACKENDS)}, got {backend[:40]!r}")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    resolved = resolve_backend(backend) if backend == "cuda" else None  # before a device is asked for
    device = Device.open()
    beside = device.fork()

    def in_stream(stream: Device) -> Backend:
        if resolved is not None:
            return replace(resolved, stream_handle=stream.stream_handle, replays=replay)
        from segzero_rt.engines.graph import EngineBackend  # a library that others have not installed

        return EngineBackend.open(opened, backend, allow_ungated=allow_ungated, device=stream)

    kernels = DeviceKernels(device)
    kernels.load()
    main = in_stream(device)
    return ResidentSegZero(
        Policy.load(opened, backend=main, draft_tokens=0, constrained=constrained),
        ImageEncoder.load(opened, backend=in_stream(beside)),
        MaskDecoder.load(opened, backend=main),
        kernels=kernels,
        encoder_kernels=DeviceKernels(beside),
    )
