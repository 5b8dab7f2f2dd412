"""llama.cpp through llama-cpp-python, on a file that `write_gguf.py` made."""

from typing import Any

import llama_cpp
import numpy as np
from worker import Generate, serve


def load(settings: dict[str, Any]) -> tuple[str, Generate]:
    length = len(settings["prompt"]) + settings["new_tokens"]
    model = llama_cpp.Llama(
        settings["model"],
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        flash_attn=settings.get("flash_attn", False),
        verbose=False,
    )

    def generate(prompt: list[int], new_tokens: int):
        model.reset()
        tokens = prompt
        for _ in range(new_tokens):
            model.eval(tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
            tokens = [int(logits.argmax())]
            yield tokens[0]

    return f"llama-cpp-python {llama_cpp.__version__}", generate


serve(load)
