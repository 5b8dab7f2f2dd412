"""OpenVINO GenAI on the same file as llama.cpp, which it reads itself; CPU defaults but for the number of threads."""

import queue
import threading
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import Generate, serve


class Tokens(openvino_genai.StreamerBase):
    """Hands each token on as soon as it is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.said: queue.SimpleQueue[int] = queue.SimpleQueue()

    def write(self, token: Any) -> openvino_genai.StreamingStatus:
        for one in token if isinstance(token, list) else [token]:
            self.said.put(int(one))
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def load(settings: dict[str, Any]) -> tuple[str, Generate]:
    options = {"INFERENCE_NUM_THREADS": settings["threads"]}
    if settings["bits"] == 32:
        options["INFERENCE_PRECISION_HINT"] = "f32"  # else it computes in bfloat16 where the processor can
    pipeline = openvino_genai.LLMPipeline(settings["model"], "CPU", **options)

    def generate(prompt: list[int], new_tokens: int):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.do_sample, config.ignore_eos = False, True
        ids = np.array([prompt], np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        tokens = Tokens()
        # It answers in one call; what it says meanwhile is read beside that.
        call = threading.Thread(target=pipeline.generate, args=(inputs, config, tokens))
        call.start()
        for _ in range(new_tokens):
            yield tokens.said.get(timeout=600)
        call.join()

    return f"openvino-genai {openvino_genai.__version__.partition('-')[0]}", generate


serve(load)
