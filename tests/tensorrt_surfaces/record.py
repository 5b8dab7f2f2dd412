"""Records which names one version of TensorRT's Python bindings has: `python tests/tensorrt_surfaces/record.py 10.3.0`.

See README.md. `rtx` as version reads the installed `tensorrt_rtx`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DISTRIBUTION = "tensorrt-cu12-bindings"
CLASSES = (
    *("Builder", "BuilderFlag", "ComputeCapability", "DataType", "ExecutionContextAllocationStrategy"),
    *(
        "HardwareCompatibilityLevel",
        "IAttention",
        "IAttentionInputLayer",
        "IBuilderConfig",
        "ICudaEngine",
        "IExecutionContext",
        "IHostMemory",
        "ILogger",
    ),
    *("INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "IRuntimeConfig", "ITensor", "ITimingCache"),
    *("LayerType", "Logger", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserRefitter"),
    *("ParserError", "Refitter", "Runtime", "TensorIOMode", "EngineValidity"),
)


def public_names(module: Any) -> dict[str, list[str]]:
    """Name of each recorded class to its public names; "" to those of the module, recorded classes alone."""
    found = {name: getattr(module, name) for name in CLASSES if hasattr(module, name)}
    names = {name: sorted(n for n in dir(value) if not n.startswith("_")) for name, value in found.items()}
    assert all(inspect.isclass(value) for value in found.values())
    return {"": sorted(found), **names}


def record_wheel(version: str) -> dict[str, Any]:
    """Downloads, unpacks and imports the bindings of one version."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary]
        subprocess.run([*command, f"{DISTRIBUTION}=={version}"], check=True)
        (wheel,) = folder.glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        zipfile.ZipFile(wheel).extractall(folder)
        (bindings,) = folder.glob("tensorrt_bindings/*.so")
        libraries = _empty_libraries(bindings, folder / "libraries")
        program = (
            f"import sys; sys.path[:0] = [{temporary!r}, {str(HERE)!r}]; import json, record, tensorrt_bindings as t;"
            "print(json.dumps([t.__version__, record.public_names(t)]))"
        )
        environment = os.environ | {"LD_LIBRARY_PATH": str(libraries)}
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        module_version, names = json.loads(result.stdout.splitlines()[-1])
        return {"source": f"{wheel.name}, sha256 {digest}", "version": module_version, "names": names}


def record_installed() -> dict[str, Any]:
    """Reads the installed TensorRT-RTX."""
    module = importlib.import_module("tensorrt_rtx")
    source = f"tensorrt-rtx-cu13 {module.__version__}, as installed"
    return {"source": source, "version": module.__version__, "names": public_names(module)}


def _empty_libraries(bindings: Path, folder: Path) -> Path:
    """Shared objects under the names that the bindings link against, with the symbols that they want, doing nothing."""
    folder.mkdir()
    header = subprocess.run(["readelf", "-d", bindings], capture_output=True, text=True, check=True).stdout
    wanted = [line.split("[")[1].rstrip("]") for line in header.splitlines() if "NEEDED" in line and "libnv" in line]
    table = subprocess.run(
        ["nm", "-D", "--undefined-only", bindings], capture_output=True, text=True, check=True
    ).stdout
    symbols = {line.split()[-1] for line in table.splitlines() if " U " in line and "@" not in line}
    symbols = {name for name in symbols if not name.startswith(("Py", "_Py", "dl"))}
    source = folder / "empty.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in sorted(symbols)))
    for name in wanted:
        command = ["gcc", "-shared", "-fPIC", "-o", folder / name, source, f"-Wl,-soname,{name}"]
        subprocess.run(command, check=True)
    return folder


if __name__ == "__main__":
    for wanted_version in sys.argv[1:]:
        recorded = record_installed() if wanted_version == "rtx" else record_wheel(wanted_version)
        target = HERE / f"{'rtx-' if wanted_version == 'rtx' else ''}{recorded['version']}.json"
        names_text = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in recorded["names"].items())
        head = json.dumps({"source": recorded["source"], "version": recorded["version"]}, indent=1)[:-2]
        target.write_text(f'{head},\n "names": {{\n{names_text}\n }}\n}}\n')
        print(target, len(recorded["names"]))
