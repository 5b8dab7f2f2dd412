"""The policy's token embedding as a graph, and the table that it may share with the decoder's output layer."""

from __future__ import annotations

from pathlib import Path

from segzero_rt.graph_spec import embedding_spec

from .graph_builder import GraphBuilder, float_storage
from .policy_checkpoint import PolicyCheckpoint
from .weight_encoding import FloatEncoding
from .weight_store import FileStore, WeightStore

TABLE_FILE = "token_table.bin"
"""Raw rows of the token table in the storage precision; a file of its own, so that tied weights are stored once."""
TOKEN_TABLE_KEY = "model.language_model.embed_tokens.weight"


def write_token_table(
    checkpoint: PolicyCheckpoint, folder: Path, *, storage: str, store: WeightStore | None = None
) -> WeightStore:
    """Writes the token table, [vocab, hidden], as raw little-endian numbers.

    Args:
        store: takes it instead, when it is a `DryStore` or takes up what an earlier export left.

    Returns:
        the store, closed; its `lossless` says whether no number was rounded.
    """
    store = store or FileStore(folder / TABLE_FILE, f"{storage} {checkpoint.fingerprint()}", whole_file=True)
    table = checkpoint.weight(TOKEN_TABLE_KEY, (checkpoint.text.vocab_size, checkpoint.text.hidden_size))
    store.add(FloatEncoding("token embeddings", table, name="token_table", dtype=float_storage(storage)))
    store.close()
    return store


def build_embedding(checkpoint: PolicyCheckpoint, *, storage: str) -> GraphBuilder:
    """Token numbers to rows of the table; the rows are cast, so the table stays in its storage precision."""
    text = checkpoint.text
    deepstack = len(checkpoint.vision.deepstack_blocks)
    spec = embedding_spec(hidden_size=text.hidden_size, deepstack=deepstack)
    builder = GraphBuilder(spec, storage=storage)
    table = builder.external_weight("token_table", (text.vocab_size, text.hidden_size), TABLE_FILE)
    rows = builder.node("Gather", [table, "input_ids"], axis=0)
    if deepstack:  # zeros for what only pictures add behind the first layers
        behind = builder.constant([0, 0, 0, 0, 0, deepstack * text.hidden_size])
        rows = builder.node("Pad", [builder.as_float32(rows), behind])
        builder.node("Identity", [rows], output="inputs_embeds")
    else:
        builder.as_float32(rows, "inputs_embeds")
    return builder
