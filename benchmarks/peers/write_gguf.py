"""A Qwen2 checkpoint as a GGUF file: `python write_gguf.py CHECKPOINT OUT 4|32`; needs gguf and safetensors.

The measurement is about token numbers, but OpenVINO GenAI opens no file without a vocabulary and a type. In 4 bits the
products are Q4_0 (blocks of 32 with one scale, as MatMulNBits has them), head and embedding Q8_0.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    folder, out, bits = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if bits == 4 else gguf.LlamaFileType.ALL_F32)
    add_vocabulary(writer, folder / "tokenizer.json", config["vocab_size"])
    for path in sorted(folder.glob("*.safetensors")):
        for name, weight in tensors(path):
            if name.startswith("model."):
                add(writer, gguf_name(name), weight, bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(path: Path):
    """Names and float32 arrays of a safetensors file in bfloat16, which NumPy does not know."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        start = stream.tell()
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16", f"expected bfloat16, got {entry['dtype']} of {name}"
                begin, end = entry["data_offsets"]
                stream.seek(start + begin)
                raw = np.frombuffer(stream.read(end - begin), np.uint16).astype(np.uint32) << 16
                yield name, raw.view(np.float32).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, part, kind = name.replace("self_attn.", "self_attn_").replace("mlp.", "mlp_").split(".")
    return f"blk.{layer}.{NAMES[part.replace('self_attn_', 'self_attn.').replace('mlp_', 'mlp.')]}.{kind}"


def add_vocabulary(writer: gguf.GGUFWriter, path: Path, size: int) -> None:
    """Qwen's vocabulary, merges and special tokens; rows of the table that no token has are unused."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {number: text for text, number in tokenizer["model"]["vocab"].items()} | special
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens.get(number, f"<unused{number}>") for number in range(size)])
    writer.add_token_types([kinds[i in special] if i in tokens else gguf.TokenType.UNUSED for i in range(size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    end = next(number for number, text in special.items() if text == "<|endoftext|>")
    for add_id in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add_id(end)


def add(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, bits: int) -> None:
    if weight.ndim == 1 or bits == 32:
        writer.add_tensor(name, weight)
        return
    kind = gguf.GGMLQuantizationType.Q8_0 if name.startswith("token_embd") else gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


main()
