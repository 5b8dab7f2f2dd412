"""llama.cpp through llama-cpp-python, on a file that `write_gguf.py` made."""

from typing import Any

import llama_cpp
import numpy as np
from worker import Generate, serve


def load(settings: dict[str, Any]) -> tuple[str, Generate]:
    length = len(settings["prompt"]) + settings["new_tokens"]
    if settings["plain"]:
        leave_weights_as_they_are()
    model = llama_cpp.Llama(
        settings["model"],
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
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

    return f"llama-cpp-python {llama_cpp.__version__}{', weights as in the file' * settings['plain']}", generate


def leave_weights_as_they_are() -> None:
    """Without the layouts that it repacks weights into for AMX and others; `Llama` has no argument for that."""
    defaults = llama_cpp.llama_model_default_params

    def changed():
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = llama_cpp.llama_model_default_params = changed


serve(load)
