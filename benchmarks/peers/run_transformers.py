"""transformers' own Qwen2 in float32: eager with its growing cache, or compiled with a static one."""

from typing import Any

import torch
import transformers
from transformers import DynamicCache, Qwen2ForCausalLM, StaticCache
from worker import Generate, serve


def load(settings: dict[str, Any]) -> tuple[str, Generate]:
    torch.set_num_threads(settings["threads"])
    model = Qwen2ForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    compiled = settings["compiled"]
    step = torch.compile(model.forward, dynamic=False) if compiled else model.forward

    def generate(prompt: list[int], new_tokens: int):
        length = len(prompt) + new_tokens
        cache = StaticCache(config=model.config, max_cache_len=length) if compiled else DynamicCache()
        ids, start = torch.tensor([prompt]), 0
        with torch.inference_mode():
            for _ in range(new_tokens):
                places = torch.arange(start, start + ids.shape[1])[None]
                said = step(input_ids=ids, past_key_values=cache, position_ids=places, logits_to_keep=1, use_cache=True)
                start += ids.shape[1]
                ids = said.logits[:, -1].argmax(-1)[:, None]
                yield int(ids)

    return f"transformers {transformers.__version__}, torch {torch.__version__}", generate


serve(load)
