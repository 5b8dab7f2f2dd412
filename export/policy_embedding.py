"""The policy's token embedding as a graph, and the table that it may share with the decoder's output layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segzero_rt.errors import ExportError
from segzero_rt.graph_spec import embedding_spec

from .graph_builder import GraphBuilder, float_storage
from .policy_checkpoint import PolicyCheckpoint

TABLE_FILE = "token_table.bin"
"""Raw rows of the token table in the storage precision; a file of its own, so that tied weights are stored once."""
TOKEN_TABLE_KEY = "model.language_model.embed_tokens.weight"


def write_token_table(checkpoint: PolicyCheckpoint, folder: Path, *, storage: str) -> bool:
    """Writes the token table, [vocab, hidden], as raw little-endian numbers. Returns whether none was rounded."""
    table = checkpoint.tensor(TOKEN_TABLE_KEY, (checkpoint.text.vocab_size, checkpoint.text.hidden_size))
    stored = table.astype(np.dtype(float_storage(storage)).newbyteorder("<"))
    if not np.isfinite(stored).all():
        raise ExportError(
            f"expected token embeddings that fit into {float_storage(storage)}, got values up to {np.abs(table).max()}"
        )
    temporary = folder / (TABLE_FILE + ".part")
    temporary.write_bytes(stored.tobytes())
    temporary.replace(folder / TABLE_FILE)
    return bool(np.array_equal(stored, table))


def build_embedding(checkpoint: PolicyCheckpoint, *, storage: str) -> GraphBuilder:
    """Token numbers to rows of the table; the rows are cast, so the table stays in its storage precision."""
    text = checkpoint.text
    builder = GraphBuilder(embedding_spec(hidden_size=text.hidden_size), storage=storage)
    table = builder.external_weight("token_table", (text.vocab_size, text.hidden_size), TABLE_FILE)
    builder.as_float32(builder.node("Gather", [table, "input_ids"], axis=0), "inputs_embeds")
    return builder
