"""The policy in transformers: eager with its growing cache, or compiled with a static one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .device_graph import own_stream
from .policy import Task, folder_of, inputs_of, keep_tokens, open_checkpoint, reached, task_of
from .roofline import read_peaks
from .stages import Context, Figures
from .timing import Clock, seconds_each

if TYPE_CHECKING:
    import torch

DTYPE = "bfloat16"


def eager(context: Context, like: str) -> Figures:
    """PyTorch as it is, with scaled-dot-product attention."""
    return _measured(context, like, compiled=False)


def compiled(context: Context, like: str) -> Figures:
    """The decoder through `torch.compile`; without Inductor at tiny size. The tower stays eager: windows break it."""
    return _measured(context, like, compiled=True)


class TorchDecoder:
    """The decoder and its cache in PyTorch."""

    def __init__(self, model: Any, task: Task, positions: torch.Tensor, *, backend: str | None) -> None:
        import torch

        self._model, self._task, self._positions = model, task, positions
        self._static = backend is not None
        self._text = model.model.language_model
        # Graph capture is what makes a token cheap; the prompt is read once and need not be captured.
        options: dict[str, Any] = {"mode": "reduce-overhead"} if backend == "inductor" else {"backend": backend}
        self._step = torch.compile(self._text.forward, dynamic=False, **options) if self._static else self._text.forward
        self._cache: Any = None
        self._length = 0

    def start(self) -> None:
        """An empty cache; a static one stays where it is, since captured graphs hold its address."""
        from transformers import DynamicCache, StaticCache

        config = self._text.config
        if self._static and self._cache is not None:
            self._cache.reset()
        elif self._static:
            self._cache = StaticCache(config=config, max_cache_len=self._task.max_length)
        else:
            self._cache = DynamicCache()
        self._length = 0

    def read(self, embeds: torch.Tensor) -> torch.Tensor:
        """Adds a prompt [1, n, hidden]; returns the logits of its last token, [1, vocab]."""
        return self._add(self._text.forward, embeds)

    def step(self, embeds: torch.Tensor) -> torch.Tensor:
        """Adds a token, likewise."""
        return self._add(self._step, embeds)

    def _add(self, forward: Any, embeds: torch.Tensor) -> torch.Tensor:
        count = embeds.shape[1]
        places = self._positions[:, :, self._length : self._length + count]
        states = forward(inputs_embeds=embeds, position_ids=places, past_key_values=self._cache, use_cache=True)
        self._length += count
        logits: torch.Tensor = self._model.lm_head(states.last_hidden_state[:, -1])
        return logits


def _measured(context: Context, like: str, *, compiled: bool) -> Figures:
    import torch
    from transformers import AutoModelForImageTextToText

    own_stream(context.device)
    checkpoint, task, clock = open_checkpoint(context, like), task_of(context), Clock(context.device)
    peaks, dtype = read_peaks(context), getattr(torch, DTYPE if context.device == "cuda" else "float32")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, dtype=dtype, attn_implementation="sdpa")
    model = model.eval().to(context.device)
    patches, ids, positions = inputs_of(context, checkpoint)
    # The published tower takes each frame twice.
    frames = patches.reshape(len(patches), 3, 1, -1).repeat(1, 1, 2, 1).reshape(len(patches), -1).to(dtype)
    grid = torch.tensor([[1, *(2 * length for length in task.picture.grid_hw)]], device=context.device)
    backend = ("aot_eager" if context.tiny else "inductor") if compiled else None
    with torch.inference_mode():
        decoder = TorchDecoder(model, task, positions, backend=backend)
        start = time.perf_counter()
        features = model.model.visual(frames, grid).pooler_output
        tokens, _ = _reply(model, decoder, task, ids, features, clock)
        first_s = time.perf_counter() - start
        vision_s = seconds_each(clock, lambda: model.model.visual(frames, grid), task.rounds)
        embeds = _embeds(model, task, ids, features)

        def prefill() -> None:
            decoder.start()
            decoder.read(embeds)

        prefill_s = seconds_each(clock, prefill, task.rounds)
        tokens, token_s = _reply(model, decoder, task, ids, features, clock)
    seconds = {"vision": vision_s, "prefill": prefill_s, "token": token_s}
    rate_dtype = DTYPE if context.device == "cuda" else "float32"
    return {
        "dtype": str(dtype),
        "backend": backend or "eager",
        "first_run_s": first_s,
        "tokens_per_second": 1 / token_s,
        "stages": reached(peaks, checkpoint, task, seconds, rate_dtype),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if context.device == "cuda" else None,
        **keep_tokens(context, like, f"pytorch {backend or 'eager'}", tokens),
        "checkpoint": folder_of(context, like).name,
    }


def _embeds(model: Any, task: Task, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    embeds: torch.Tensor = model.get_input_embeddings()(ids).clone()
    embeds[:, task.picture.start : task.picture.end] = features
    return embeds


def _reply(
    model: Any, decoder: TorchDecoder, task: Task, ids: torch.Tensor, features: torch.Tensor, clock: Clock
) -> tuple[list[int], float]:
    """The tokens of a greedy reply, and seconds for each behind the first; the host looks at them only then."""
    words = model.get_input_embeddings()
    decoder.start()
    chosen = [decoder.read(_embeds(model, task, ids, features)).argmax(-1)]

    def go_on() -> None:
        for _ in range(task.new_tokens - 1):
            # A captured graph writes its outputs into the same memory each time.
            chosen.append(decoder.step(words(chosen[-1][None])).argmax(-1).clone())

    seconds = clock(go_on)
    return [int(one) for one in chosen], seconds / (task.new_tokens - 1)
