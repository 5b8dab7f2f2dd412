"""Lets accelerate shard over CPU processes, which it does for GPUs alone: the rest of FSDP is its own and torch's."""

from __future__ import annotations

import os
from typing import Any


def allow_fsdp_on_cpus() -> None:
    """Call before anything makes an `AcceleratorState`. From there on `fsdp_cpu.yaml` shards over gloo."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def begin_sharded(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if sharded and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = begin_sharded
