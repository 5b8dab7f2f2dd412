"""Machine code of the kernels for a CUDA device, by nvcc, in the user's cache.

It is compiled when it is first needed, or ahead of that by `segzero build`: once per source, device architecture, flags
and toolkit. Nothing is compiled at import, and the package's own folder is never written to.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from segzero_rt.errors import BackendError
from segzero_rt.kernels.build import build_once, cache_folder, compiled
from segzero_rt.kernels.sources import DEVICE_FLAGS, HERE, source_digest

NVCC_VARIABLE = "NVCC"
TOOLKIT_VARIABLES = ("CUDA_HOME", "CUDA_PATH")
_TOOLKIT = Path("/usr/local/cuda")
DEVICE_SOURCES: dict[str, tuple[str, ...]] = {
    "handover.cu": ("place_prompts_kernel", "choose_masks_kernel"),
    "parse_prompts.cu": (
        "find_tags_kernel",
        "parse_prompts_kernel",
        "count_prompts_kernel",
        "pack_prompts_kernel",
        "spell_tokens_kernel",
    ),
    "postprocess_masks.cu": (
        "begin_masks_kernel",
        "label_logits_kernel",
        "begin_components_kernel",
        "join_components_kernel",
        "measure_components_kernel",
        "clean_logits_kernel",
        "clean_masks_kernel",
        "upsample_masks_kernel",
        "finish_masks_kernel",
        "count_changes_kernel",
        "place_changes_kernel",
        "write_changes_kernel",
        "write_runs_kernel",
    ),
    "preprocess.cu": ("axis_taps_kernel", "resample_columns_kernel", "resample_rows_kernel"),
    "sample_token.cu": ("sample_token_kernel",),
}
"""Which kernels stand in which file; each file is compiled by itself, since one of them takes half a minute."""


def find_nvcc() -> str | None:
    """Path of nvcc: `NVCC`, else on the path, else in `CUDA_HOME`, `CUDA_PATH` or /usr/local/cuda; None if there is
    none."""
    chosen = os.environ.get(NVCC_VARIABLE)
    if chosen:
        return shutil.which(chosen)
    folders = [*(os.environ[name] for name in TOOLKIT_VARIABLES if os.environ.get(name)), str(_TOOLKIT)]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{folder}/bin" for folder in folders))


def code_path(source: str, capability: str, nvcc: str) -> Path:
    """Where the machine code of a source for a compute capability such as "8.7" is, or would be."""
    real = Path(nvcc).resolve()
    stat = real.stat()  # asking nvcc for its version would start it each time
    facts = (source, source_digest(), DEVICE_FLAGS, str(real), stat.st_size, stat.st_mtime_ns)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
    return cache_folder() / f"{Path(source).stem}_sm{capability.replace('.', '')}_{digest}.cubin"


def device_code(source: str, capability: str) -> bytes:
    """Machine code of a file of `DEVICE_SOURCES`, compiled now if it is not there.

    Raises:
        BackendError: no nvcc, an earlier or present build failed, or the cache cannot be written.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BackendError(
            f"expected nvcc to compile {source} for a device, found none; install the CUDA toolkit, or name nvcc in "
            f"{NVCC_VARIABLE}"
        )
    target = code_path(source, capability, nvcc)
    command = [nvcc, *DEVICE_FLAGS, f"-arch=sm_{capability.replace('.', '')}", "-cubin"]
    return build_once(
        target, nvcc, lambda built: compiled([*command, "-o", str(built), str(HERE / source)])
    ).read_bytes()


def compile_all(capability: str, progress: Callable[[str], None]) -> None:
    """Compiles what is not compiled yet for a device; `progress` is told what comes next, since it takes a minute.

    Raises:
        BackendError: as `device_code`.
    """
    nvcc = find_nvcc()
    for source in DEVICE_SOURCES:
        if nvcc is not None and not code_path(source, capability, nvcc).is_file():
            progress(f"{source} for compute capability {capability}")
        device_code(source, capability)


def is_compiled(capability: str) -> bool:
    """Whether all kernels are there for a device, so that using them compiles nothing."""
    nvcc = find_nvcc()
    return nvcc is not None and all(code_path(source, capability, nvcc).is_file() for source in DEVICE_SOURCES)
