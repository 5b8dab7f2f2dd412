"""The decoder alone against other runtimes: same shape, weights, bits and prompt; few layers of true width.

    python -m benchmarks.random_policy --layers 2 --tokenizer ../shared/assets/qwen2.5-vl-7b --out BIG
    python -m benchmarks.decoder_peers BIG --bits 4 --work DIR --genai PYTHON --llama-cpp PYTHON --prepare
    python -m benchmarks.decoder_peers BIG --bits 4 --work DIR --genai PYTHON --llama-cpp PYTHON

PYTHON is the interpreter of an environment with that runtime: `onnxruntime-genai torch transformers onnx-ir` for the
one, `llama-cpp-python gguf` for the other, `openvino-genai` for `--openvino`. `--prepare` makes each side's model and
measures nothing. In 4 bits every side has products in blocks of 32 with one scale, rounded to nearest, and 8 bits in
the last product.

Sides are loaded one at a time, for the sake of memory, and generate the same number of tokens after the same prompt;
nobody guesses ahead. In float32 a side whose greedy tokens differ from this repository's is listed and not timed. In 4
bits each quantiser rounds its own way, so that only how many first tokens agree is told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .measuring import RESULTS, pin_to_cores, run_and_exit, write_result

PEERS = Path(__file__).parent / "peers"
STORAGE = {4: "int4", 32: "float32"}
TIMES = ("prefill_ms", "token_ms", "answer_ms")
"""What each side is timed by: to the first token, for each further one, and from the prompt to the last token."""


def main() -> None:
    """Prepares, or measures and writes one result file."""
    arguments = _parse()
    work = arguments.work / f"bits{arguments.bits}"
    if arguments.prepare:
        work.mkdir(parents=True, exist_ok=True)
        prepare(arguments, work)
        return
    pin_to_cores(arguments.threads)
    document = measure(arguments, work)
    path = write_result("decoder_peers", document, arguments.out, variant=STORAGE[arguments.bits])
    print(json.dumps({"result": str(path), **document}))


def prepare(arguments: argparse.Namespace, work: Path) -> None:
    """Makes the model of each side that is asked for; what is there stays."""
    text = text_checkpoint(arguments.policy, arguments.work / "text")
    if not (work / "segzero" / "decoder.onnx").is_file():
        _export(arguments.policy, work / "segzero", STORAGE[arguments.bits])
    if arguments.genai and not (work / "genai" / "genai_config.json").is_file():
        precision = {4: "int4", 32: "fp32"}[arguments.bits]
        # What genai 0.18 writes for a shared table in 8 bits does not load: the tables are apart there.
        options = ["prune_lm_head=true", "hf_token=false", "shared_embeddings=false"]
        options += ["block_size=32", "accuracy_level=4", "matmul_mixed_precision=last_matmul:int8"][
            : 3 * (precision == "int4")
        ]
        _run(
            [
                arguments.genai,
                "-m",
                "onnxruntime_genai.models.builder",
                "-i",
                text,
                "-o",
                work / "genai",
                "-p",
                precision,
                "-e",
                "cpu",
                "-c",
                work / "cache",
                "--extra_options",
                *options,
            ]
        )
    if arguments.llama_cpp and not (work / "llama.gguf").is_file():
        _run([arguments.llama_cpp, PEERS / "write_gguf.py", text, work / "llama.gguf", str(arguments.bits)])


def text_checkpoint(policy: Path, folder: Path) -> Path:
    """The policy's decoder as a plain Qwen2 checkpoint: its own files under a configuration without pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((policy / "config.json").read_text())
    text = {
        name: value for name, value in config.items() if not name.startswith(("vision", "image", "video", "rope_sc"))
    }
    text |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(text, indent=2))
    for path in policy.iterdir():
        if path.name != "config.json" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    return folder


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Each side's medians, and how its reply compares with this repository's."""
    config = json.loads((arguments.policy / "config.json").read_text())
    rng = np.random.default_rng(0)
    settings = {
        "threads": arguments.threads,
        "prompt": rng.integers(0, 150_000, arguments.prompt_tokens).tolist(),
        "new_tokens": arguments.new_tokens,
        "shape": _shape(config),
    }
    sides: dict[str, dict[str, Any]] = {}
    for name, (python, program, extra) in _sides(arguments, work).items():
        sides[name] = _side(python, program, {**settings, **extra}, arguments.rounds)
        print(f"{name}: {json.dumps({k: v for k, v in sides[name].items() if k != 'token_ids'})}", file=sys.stderr)
    return {
        "bits": arguments.bits,
        "threads": arguments.threads,
        "shape": settings["shape"],
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "sides": compare(sides, exact=arguments.bits == 32),
    }


def compare(sides: dict[str, dict[str, Any]], *, exact: bool) -> dict[str, dict[str, Any]]:
    """Adds `equal_tokens` (how many of the first tokens agree with "segzero") and the ratios; or takes the times away.

    Args:
        exact: a side with another reply is not timed.
    """
    ours = sides["segzero"]
    compared = {}
    for name, side in sides.items():
        if "problem" in side:
            compared[name] = side
            continue
        pairs = zip(ours["token_ids"], side["token_ids"], strict=True)
        equal = next((place for place, (a, b) in enumerate(pairs) if a != b), len(ours["token_ids"]))
        row = {key: value for key, value in side.items() if key != "token_ids"} | {"equal_tokens": equal}
        if exact and equal < len(ours["token_ids"]):
            row = {"version": side["version"], "equal_tokens": equal, "problem": "another reply: not timed"}
        elif name != "segzero":
            row["ratios"] = {key: side[key] / ours[key] for key in TIMES}
        compared[name] = row
    return compared


def _sides(arguments: argparse.Namespace, work: Path) -> dict[str, tuple[Any, str, dict[str, Any]]]:
    sides: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "segzero": (sys.executable, "run_segzero.py", {"model": str(work / "segzero")})
    }
    if arguments.genai:
        sides["onnxruntime-genai"] = (arguments.genai, "run_genai.py", {"model": str(work / "genai")})
    if arguments.llama_cpp:
        gguf = {"model": str(work / "llama.gguf"), "plain": arguments.llama_cpp_plain}
        sides["llama.cpp"] = (arguments.llama_cpp, "run_llama_cpp.py", gguf)
    if arguments.openvino:
        gguf = {"model": str(work / "llama.gguf"), "bits": arguments.bits}
        sides["OpenVINO GenAI"] = (arguments.openvino, "run_openvino.py", gguf)
    if arguments.bits == 32 and arguments.transformers:
        text = str(arguments.work / "text")
        sides["transformers"] = (sys.executable, "run_transformers.py", {"model": text, "compiled": False})
        if arguments.compiled:
            sides["transformers, compiled"] = (sys.executable, "run_transformers.py", {"model": text, "compiled": True})
    return sides


def _side(python: Any, program: str, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Version, loading time, medians over `rounds` after one that is not counted; a `problem` where it failed."""
    child = subprocess.run(
        [python, PEERS / program, json.dumps(settings)],
        input="\n" * (rounds + 1),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line[7:]) for line in child.stdout.splitlines() if line.startswith("RESULT ")]
    if child.returncode or len(lines) != rounds + 2:
        last = (child.stderr.strip() or "no message").splitlines()[-1]
        return {"problem": f"ended with status {child.returncode}: {last[:200]}"}
    told, _, *timed = lines
    return {
        **told,
        "token_ids": timed[0]["token_ids"],
        **{key: statistics.median(one[key] for one in timed) for key in TIMES},
        "rounds": rounds,
    }


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": config["num_hidden_layers"],
        "num_kv_heads": config["num_key_value_heads"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_theta"],
        "mrope_section": config["rope_scaling"]["mrope_section"],
    }


def _export(policy: Path, folder: Path, storage: str) -> None:
    from export.policy_checkpoint import PolicyCheckpoint
    from export.policy_decoder import build_decoder
    from export.policy_embedding import build_embedding, write_token_table
    from export.weight_store import FileStore

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = PolicyCheckpoint(policy)
    write_token_table(checkpoint, folder, storage=storage)
    build_embedding(checkpoint, storage=storage).save(folder / "embedding.onnx")
    with_store = FileStore(folder / "decoder.data", f"{storage} {checkpoint.fingerprint()}")
    builder = build_decoder(checkpoint, flavour="ort", storage=storage, store=with_store)
    with_store.close()
    builder.save(folder / "decoder.onnx")


def _run(command: list[Any]) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the decoder against other runtimes", epilog=__doc__)
    parser.add_argument("policy", type=Path, help="checkpoint folder, as `benchmarks.random_policy` writes it")
    parser.add_argument("--bits", type=int, choices=tuple(STORAGE), default=4)
    parser.add_argument("--work", type=Path, required=True, help="folder for the sides' models")
    parser.add_argument("--prepare", action="store_true", help="make the models, measure nothing")
    parser.add_argument("--genai", type=Path, help="interpreter with onnxruntime-genai")
    parser.add_argument("--llama-cpp", type=Path, help="interpreter with llama-cpp-python")
    parser.add_argument(
        "--llama-cpp-plain",
        action="store_true",
        help="its weights as in the file: 0.3.36 crashes in its layouts for AMX",
    )
    parser.add_argument("--openvino", type=Path, help="interpreter with openvino-genai; it reads llama.cpp's file")
    parser.add_argument("--transformers", action="store_true", help="transformers too, eager, in float32")
    parser.add_argument("--compiled", action="store_true", help="and with torch.compile")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    return parser.parse_args()


if __name__ == "__main__":
    run_and_exit(main, "decoder_peers")
