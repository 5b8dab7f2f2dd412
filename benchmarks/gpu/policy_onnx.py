"""The policy's exported graphs in ONNX Runtime, over memory that stays on the device; no token goes by the host."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from segzero_rt.graph_spec import MASKED
from segzero_rt.positions import VISION_ROPE_THETA, MropeTable, vision_layout

from .device_graph import DeviceGraph, own_stream
from .policy import Task, folder_of, inputs_of, keep_tokens, open_checkpoint, reached, task_of
from .roofline import read_peaks
from .stages import Context, Figures
from .timing import Clock, seconds_each

if TYPE_CHECKING:
    import torch

    from export.policy_checkpoint import PolicyCheckpoint


class OnnxDecoder:
    """The `portable` decoder with its cache: the graph reads it and gives new rows, which are put into it here."""

    def __init__(self, context: Context, checkpoint: PolicyCheckpoint, like: str, *, replay: bool) -> None:
        import torch

        text, self._task = checkpoint.text, task_of(context)
        folder = folder_of(context, like) / "graphs"
        self._graph = DeviceGraph(folder / "decoder.onnx", context.device, replay=replay)
        self._words = DeviceGraph(folder / "embedding.onnx", context.device)
        self._device, self._text = context.device, text
        self._capacity = self._task.max_length
        table = MropeTable(
            head_dim=text.head_dim,
            theta=text.rope_theta,
            mrope_section=text.mrope_section,
            max_length=self._capacity,
            interleaved=text.mrope_interleaved,
        )
        self._rotary = [torch.from_numpy(part)[None].to(self._device) for part in table.rows(self._task.picture)]
        self._names = [f"{part}_{layer}" for layer in range(text.num_layers) for part in ("key", "value")]
        self._cache = [self._cache_rows(self._capacity) for _ in self._names]
        self._tied: dict[int, dict[str, torch.Tensor]] = {}
        self._latest = 0
        self._length = 0

    def start(self) -> None:
        """An empty cache."""
        self._length = 0

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [1, n] to float32 [1, n, hidden]."""
        import torch

        embeds = torch.empty(1, ids.shape[1], self._text.hidden_size, device=self._device)
        self._words.bind({"input_ids": ids.contiguous()}, {"inputs_embeds": embeds})
        self._words.run()
        return embeds

    def add(self, embeds: torch.Tensor) -> torch.Tensor:
        """Adds tokens, float32 [1, n, hidden]; returns the logits of the last one, [1, vocab]."""
        new = embeds.shape[1]
        tied = self._tied.setdefault(new, self._tensors(new))
        tied["inputs_embeds"].copy_(embeds)
        places = slice(self._length, self._length + new)
        for name, table in zip(("rotary_cos", "rotary_sin"), self._rotary, strict=True):
            tied[name].copy_(table[:, places])
        tied["attention_bias"][..., : self._length] = 0.0
        tied["attention_bias"][..., self._length : self._capacity] = MASKED
        if self._latest != new:
            self._bind(tied)
            self._latest = new
        self._graph.run(capture=new == 1)
        self._keep([tied[f"new_{name}"] for name in self._names], places)
        self._length += new
        return tied["logits"][:, 0]

    def _keep(self, rows: list[torch.Tensor], places: slice) -> None:
        import torch

        torch._foreach_copy_([cache[:, :, places] for cache in self._cache], rows)

    def _bind(self, tied: dict[str, torch.Tensor]) -> None:
        written = {name: tensor for name, tensor in tied.items() if name == "logits" or name.startswith("new_")}
        read = {name: tensor for name, tensor in tied.items() if name not in written}
        past = {f"past_{name}": cache for name, cache in zip(self._names, self._cache, strict=True)}
        self._graph.bind({**read, **past}, written)

    def _tensors(self, new: int) -> dict[str, torch.Tensor]:
        import torch

        half = self._text.head_dim // 2
        bias = torch.zeros(1, 1, new, self._capacity + new, device=self._device)
        bias[..., self._capacity :] = torch.full((new, new), MASKED, device=self._device).triu(1)
        return {
            "inputs_embeds": torch.empty(1, new, self._text.hidden_size, device=self._device),
            "logits_rows": torch.tensor([[new - 1]], device=self._device),
            "attention_bias": bias,
            "rotary_cos": torch.empty(1, new, half, device=self._device),
            "rotary_sin": torch.empty(1, new, half, device=self._device),
            "logits": torch.empty(1, 1, self._text.vocab_size, device=self._device),
            **{f"new_{name}": self._cache_rows(new) for name in self._names},
        }

    def _cache_rows(self, rows: int) -> torch.Tensor:
        import torch

        shape = (1, self._text.num_kv_heads, rows, self._text.head_dim)
        return torch.zeros(shape, dtype=torch.float16, device=self._device)


def onnxruntime(context: Context, like: str, replay: str = "") -> Figures:
    """Vision tower, prompt and tokens; with `replay`, a token is a recorded CUDA graph."""
    import torch

    own_stream(context.device)
    checkpoint, task, clock = open_checkpoint(context, like), task_of(context), Clock(context.device)
    peaks = read_peaks(context)
    start = time.perf_counter()
    vision, features = _vision(context, checkpoint, like)
    decoder = OnnxDecoder(context, checkpoint, like, replay=bool(replay))
    loaded_s = time.perf_counter() - start
    _, ids, _ = inputs_of(context, checkpoint)
    vision.run()
    embeds = decoder.embed(ids)
    embeds[:, task.picture.start : task.picture.end] = features

    def prefill() -> None:
        decoder.start()
        decoder.add(embeds)

    _reply(decoder, task, embeds, clock)  # records, where it is to be replayed
    seconds = {
        "vision": seconds_each(clock, vision.run, task.rounds),
        "prefill": seconds_each(clock, prefill, task.rounds),
    }
    tokens, seconds["token"] = _reply(decoder, task, embeds, clock)
    free, total = torch.cuda.mem_get_info() if context.device == "cuda" else (0, 0)
    return {
        "loaded_s": loaded_s,
        "tokens_per_second": 1 / seconds["token"],
        "stages": reached(peaks, checkpoint, task, seconds, "float16" if context.device == "cuda" else "float32"),
        "device_bytes_in_use": total - free if total else None,
        **keep_tokens(context, like, f"onnxruntime{' replayed' if replay else ''}", tokens),
    }


def _vision(context: Context, checkpoint: PolicyCheckpoint, like: str) -> tuple[DeviceGraph, torch.Tensor]:
    """The tower with its picture tied to it, and where its features will be, [1, tokens, hidden]."""
    import torch

    task, sizes = task_of(context), checkpoint.vision
    layout = vision_layout(
        task.picture.grid_hw,
        merge_size=sizes.merge_size,
        window_tokens=sizes.window_size // (sizes.patch_size * sizes.merge_size),
        head_dim=sizes.head_dim,
        theta=VISION_ROPE_THETA,
        masked=MASKED,
    )
    patches, _, _ = inputs_of(context, checkpoint)
    in_order = patches[torch.from_numpy(layout.patch_order).to(context.device)][None].contiguous()
    inputs: dict[str, Any] = {
        name: torch.from_numpy(array).contiguous().to(context.device) for name, array in layout.inputs().items()
    }
    features = torch.empty(1, task.picture.num_tokens, checkpoint.text.hidden_size, device=context.device)
    graph = DeviceGraph(folder_of(context, like) / "graphs" / "vision.onnx", context.device)
    graph.bind({"patches": in_order, **inputs}, {"image_features": features})
    return graph, features


def _reply(decoder: OnnxDecoder, task: Task, embeds: torch.Tensor, clock: Clock) -> tuple[list[int], float]:
    """The tokens of a greedy reply, and seconds for each behind the first."""
    decoder.start()
    chosen = [decoder.add(embeds).argmax(-1)]

    def go_on() -> None:
        for _ in range(task.new_tokens - 1):
            chosen.append(decoder.add(decoder.embed(chosen[-1][None])).argmax(-1))

    seconds = clock(go_on)
    return [int(one) for one in chosen], seconds / (task.new_tokens - 1)
