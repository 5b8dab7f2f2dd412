"""`segzero bench` as a process on one backend: of the bundle that ships, or of one that was carried along."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

from .build import TARGETS, carried_bundle, engine_bundle
from .errors import GpuCheckError, NotHereError
from .stages import Context, Figures

_QUESTIONS = {"full": "32", "tiny": "2"}


def measure(context: Context, backend: str, carried: str = "") -> Figures:
    """The command's document: stages, single stream, offline, memory and energy.

    Args:
        backend: "cuda", or a target of `segzero build`; on a processor its own takes the place of "cuda".
        carried: of the bundle that was carried, whose graphs every provider can run.

    Raises:
        NotHereError: no TensorRT for that, no engines were built, or no bundle was carried.
        GpuCheckError: the command fails.
    """
    command = [sys.executable, "-m", "segzero_rt.cli", "bench", "--json", "--questions", _QUESTIONS[context.size]]
    command += ["--scenario", "single-stream", "--scenario", "offline"]
    if backend == "cuda":
        command += ["--backend", context.device]
        if carried:
            portable = carried_bundle(context)
            if portable is None:
                raise NotHereError(f"no bundle in {context.work}/data: pack one of portable graphs with --bundle")
            command += ["--bundle", str(portable)]
    else:
        bundle = engine_bundle(context, backend)
        if importlib.util.find_spec(TARGETS[backend]) is None or not bundle.is_dir():
            raise NotHereError(f"no {backend} for Python here, or no engines in {bundle}")
        command += ["--bundle", str(bundle), "--backend", backend]
    if context.tiny:
        command += ["--skip-ceiling"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise GpuCheckError(f"expected segzero bench on {backend} to run, it says: {run.stderr.strip()[-800:]}")
    document: Figures = json.loads(run.stdout.splitlines()[-1])
    return document
