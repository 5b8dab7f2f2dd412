"""TensorRT's Python module as a recorded surface has it: exactly the recorded names, with just enough behind them.

No engine is made here and nothing is claimed about one: these tests ask which calls the builder makes under which
version. Whatever a version lacks raises AttributeError, as the real module does.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SURFACES = Path(__file__).parent / "tensorrt_surfaces"
VERSIONS = ("10.3.0", "10.8.0.43", "10.15.1.29", "11.0.0.114", "11.4.0.106")


class Member:
    """One value of an enumeration."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value = name, value

    def __int__(self) -> int:
        return self.value


class Strict:
    """Has the recorded names and no others, neither to read nor to write."""

    recorded: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.recorded and not name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        object.__setattr__(self, name, value)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in type(self).recorded and name != "recorded":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return object.__getattribute__(self, name)


class Config(Strict):
    """Keeps what it is told in `_told`; takes a timing cache whose bytes are `_timed_here` alone."""

    def __init__(self) -> None:
        self._told: list[tuple[Any, ...]] = []
        self._timings = b""
        self.hardware_compatibility_level = None

    def __setattr__(self, name: str, value: object) -> None:
        """TensorRT-RTX warns that it does not support hardware levels, and keeps none."""
        ignored = name == "hardware_compatibility_level" and hasattr(type(self)._module, "ComputeCapability")
        super().__setattr__(name, None if ignored else value)

    def set_flag(self, flag: Member) -> None:
        self._told.append(("set", flag.name))

    def clear_flag(self, flag: Member) -> None:
        self._told.append(("clear", flag.name))

    def set_memory_pool_limit(self, pool: Member, size: int) -> None:
        self._told.append((pool.name, size))

    def add_optimization_profile(self, profile: Any) -> int:
        self._told.append(("profile", dict(profile._shapes)))
        return 0

    def create_timing_cache(self, data: bytes) -> bytes:
        return bytes(data)

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if cache not in (b"", b"timed here"):
            return False
        self._told.append(("timings", cache))
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"timed here")


class Profile(Strict):
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
        self._shapes[name] = (tuple(least), tuple(usual), tuple(most))


class Network(Strict):
    """One float input `x` [-1, 3] and one output `y`; with an attention layer where the version knows one."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.name = ""
        self._attention = SimpleNamespace(decomposable=False)

    num_inputs = num_outputs = 1

    def get_input(self, index: int) -> Any:
        return SimpleNamespace(name="x", dtype=self._module.DataType.FLOAT, shape=(-1, 3))

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(name="y", dtype=self._module.DataType.HALF, shape=(-1, 3))

    @property
    def num_layers(self) -> int:
        return 2

    def get_layer(self, index: int) -> Any:
        kinds = self._module.LayerType
        kind = (kinds.ELEMENTWISE, getattr(kinds, "ATTENTION_INPUT", kinds.SOFTMAX))[index]
        return Layer(kind, self._attention, self._module.DataType.HALF)


class Layer:
    num_outputs = 1

    def __init__(self, kind: Member, attention: Any, dtype: Member) -> None:
        self.type, self.name, self._attention, self._dtype = kind, kind.name.lower(), attention, dtype

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(dtype=self._dtype)


class AttentionLayer(Layer):
    @property
    def attention(self) -> Any:
        return self._attention


class Builder(Strict):
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        type(self)._latest = self

    def create_network(self, flags: int) -> Network:
        self._flags = flags
        self._network = type(self)._module.INetworkDefinition(type(self)._module)
        return self._network

    def create_builder_config(self) -> Config:
        self._config = type(self)._module.IBuilderConfig()
        return self._config

    def create_optimization_profile(self) -> Profile:
        return type(self)._module.IOptimizationProfile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        config.progress_monitor.phase_start("Building", None, 2)
        going = config.progress_monitor.step_complete("Building", 0)
        return b"plan" if going else None


class Parser(Strict):
    num_errors = 0

    def __init__(self, network: Network, logger: Any) -> None: ...

    def parse_from_file(self, path: str) -> bool:
        return True


class Logger(Strict):
    def __init__(self) -> None: ...


_BEHAVIOUR = {
    "Builder": Builder,
    "IBuilderConfig": Config,
    "IOptimizationProfile": Profile,
    "INetworkDefinition": Network,
    "OnnxParser": Parser,
    "IAttentionInputLayer": AttentionLayer,
}


def recorded_module(version: str, *, without: tuple[str, ...] = ()) -> Any:
    """A module with the names of one recorded version, less those in `without`."""
    surface = json.loads((SURFACES / f"{version}.json").read_text())
    module = SimpleNamespace(__version__=surface["version"])
    for name in surface["names"][""]:
        if name in without:
            continue
        names = surface["names"][name]
        members = {n: Member(n, i) for i, n in enumerate(n for n in names if n.isupper())}
        if name == "ILogger":
            members = {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)}
            value: Any = type(name, (Logger,), {**members, "recorded": frozenset({*names, "log"})})
        elif name == "IProgressMonitor":
            value = type(name, (), {})
        elif name in _BEHAVIOUR:
            base = _BEHAVIOUR[name]
            own = {n for n in vars(base) if not n.startswith("_")}
            assert own <= {*names, "recorded"}, f"{version} has no {name}.{', '.join(own - set(names))}"
            rest = {n: None for n in names if n not in own}
            value = type(name, (base,), {**rest, "recorded": frozenset(names), "_module": module})
        else:  # an enumeration, or a class that is only asked what it has
            value = type(name, (), {n: members.get(n) for n in names})
        setattr(module, name, value)
    return module
