"""This repository's decoder, as the runtime runs it without guessing ahead."""

from pathlib import Path
from typing import Any

import numpy as np
from worker import Generate, serve

from segzero_rt.decoding import TokenRuns
from segzero_rt.graph import Graph, resolve_backend
from segzero_rt.graph_spec import decoder_spec, embedding_spec
from segzero_rt.kv_cache import CacheSizes, KVCache
from segzero_rt.positions import MropeTable


def load(settings: dict[str, Any]) -> tuple[str, Generate]:
    shape, folder = settings["shape"], Path(settings["model"])
    backend = resolve_backend("cpu")
    sizes = CacheSizes(
        **{name: shape[name] for name in ("num_layers", "num_kv_heads", "head_dim", "hidden_size", "vocab_size")}
    )
    names = ("num_layers", "num_kv_heads", "head_dim", "hidden_size", "vocab_size")
    spec = decoder_spec(flavour="ort", **{name: shape[name] for name in names})
    decoder = Graph.load(folder / "decoder.onnx", spec, backend=backend, threads=settings["threads"])
    words = embedding_spec(hidden_size=shape["hidden_size"])
    embedding = Graph.load(folder / "embedding.onnx", words, backend=backend, threads=settings["threads"])
    table = MropeTable(
        head_dim=shape["head_dim"],
        theta=shape["rope_theta"],
        mrope_section=tuple(shape["mrope_section"]),
        max_length=len(settings["prompt"]) + settings["new_tokens"],
    )
    cache = KVCache.create(decoder, sizes, table)
    runs = TokenRuns(embedding, cache)

    def generate(prompt: list[int], new_tokens: int):
        cache.truncate(0)
        ids = np.array([prompt], np.int64)
        embeds = embedding.run({"input_ids": ids})["inputs_embeds"]
        token_id = int(cache.extend(embeds, np.array([[len(prompt) - 1]], np.int64)).argmax())
        yield token_id
        for _ in range(new_tokens - 1):
            (token_id,) = runs.choices([token_id])
            yield token_id

    return f"segzero-rt on onnxruntime {backend.version}", generate


serve(load)
