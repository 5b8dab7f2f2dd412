"""The compiled kernels against the libraries that do the same job: `python -m benchmarks.kernels`.

Parser: real replies (../shared/assets) whose answer `re` + `json.loads` can read, since most parsers would fail on the
others. The peer's job is the same: find thinking and answer, decode, take boxes and points, scale to source pixels.
Both sides must find the same boxes before anything is timed. Masks: three objects' logits to a full-HD picture against
OpenCV, NumPy and pycocotools. Frames: policy patches and segmenter planes against Pillow with NumPy or OpenCV, which
must give the same numbers. Tokens: one greedy choice within the grammar against a masked argmax. Sides take turns, in
one process on one core; medians.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import paired, pin_to_cores, write_result
from segzero_rt.answer_format import VISION_REASONER
from segzero_rt.answer_grammar import answer_automaton, token_table
from segzero_rt.answer_parser import parse_answer, read_reply
from segzero_rt.bundle import EMBEDDED, Bundle
from segzero_rt.chat import Chat
from segzero_rt.kernels.backend import resolve_kernels
from segzero_rt.kernels.parse_prompts import encode_reply, parse_prompts
from segzero_rt.kernels.postprocess_masks import postprocess_masks
from segzero_rt.kernels.preprocess import Frame, InputTensor, preprocess
from segzero_rt.kernels.sample_token import sample_token
from segzero_rt.resampling import resize

REAL = Path(__file__).resolve().parent / "../../shared/assets/model_outputs.jsonl.gz"
INPUT_HW, SOURCE_HW = (840, 840), (1080, 1920)
MASK_HW, FRAME_HW = (256, 256), (1080, 1920)
_THINK = re.compile(r"<think>([^<]+)</think>")
_ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_ROUNDS, _BATCH = 15, 2000
_MASK_ROUNDS = 31
FRAMES_HW = ((384, 384), (480, 640), (1080, 1920))
_FRAME_ROUNDS = 41

Decode = Callable[[str], Any]
Peer = tuple[str, list[tuple[int, ...]]]


def peer_reading(text: str, decode: Decode) -> Peer:
    """Thinking and scaled boxes the usual way. Fails, with whatever error, on a reply that is not as it should be."""
    thinking = _THINK.search(text)
    value = decode(_ANSWER.search(text)[1])  # type: ignore[index]
    objects = value if isinstance(value, list) else [value]
    x_factor, y_factor = SOURCE_HW[1] / INPUT_HW[1], SOURCE_HW[0] / INPUT_HW[0]
    boxes = []
    for entry in objects:
        box = entry["bbox_2d"]
        left, top, right, bottom = (max(0, min(side, 840)) for side in box)
        scaled = [int(left * x_factor + 0.5), int(top * y_factor + 0.5)]
        boxes.append((*scaled, int(right * x_factor + 0.5), int(bottom * y_factor + 0.5)))
        if "point_2d" in entry:
            x, y = entry["point_2d"]
            boxes.append((int(x * x_factor + 0.5), int(y * y_factor + 0.5)))
    return (thinking[1].strip() if thinking else "", boxes)


def readable_replies(limit: int) -> list[str]:
    """Real replies that both sides read as the same boxes."""
    with gzip.open(REAL, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["output"] for line in lines]
    kept = []
    for text in texts:
        try:
            boxes = [box for box in peer_reading(text, json.loads)[1] if len(box) == 4]
        except (ValueError, TypeError, KeyError):
            continue
        ours = [tuple(map(int, prompt.box_xyxy)) for prompt in _ours(text).prompts]
        if boxes and ours == boxes:
            kept.append(text)
    return kept[:: max(1, len(kept) // limit)][:limit]


def _ours(text: str) -> Any:
    return parse_answer(text, answer_format=VISION_REASONER, input_size_hw=INPUT_HW, source_size_hw=SOURCE_HW)


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round, after one round that is not timed; who begins alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(-1, rounds):
        for name in names if number % 2 else names[::-1]:
            start = time.perf_counter()
            sides[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _compared(seconds: dict[str, list[float]], ours: str, unit: float, per: int) -> dict[str, Any]:
    """Median per item in the unit given, and how many times longer each other side took, with its interval."""
    medians = {name: statistics.median(values) * unit / per for name, values in seconds.items()}
    ratios = {
        name: {key: paired(seconds[ours], values)[key] for key in ("ratio", "ratio_interval_95")}
        for name, values in seconds.items()
        if name != ours
    }
    return {"medians": medians, "against": ratios}


def measure_parser() -> dict[str, Any]:
    """Microseconds per reply: compute alone (a batch, results in arrays), and as a Python call for one reply."""
    texts = readable_replies(_BATCH)
    data = [encode_reply(text) for text in texts]
    host = resolve_kernels("host")
    arguments: dict[str, Any] = {
        "answer_format": VISION_REASONER,
        "input_size_hw": INPUT_HW,
        "source_size_hw": SOURCE_HW,
    }
    decoders = _decoders()
    batch: dict[str, Callable[[], object]] = {
        "segzero": lambda: parse_prompts(data, **arguments, kernels=host),
        "segzero reference": lambda: [read_reply(text, **arguments) for text in texts[: len(texts) // 10]],
    }
    single: dict[str, Callable[[], object]] = {"segzero": lambda: [parse_answer(text, **arguments) for text in texts]}
    for name, decode in decoders.items():
        batch[f"re + {name}"] = single[f"re + {name}"] = lambda decode=decode: [peer_reading(t, decode) for t in texts]
    batch_seconds = take_turns(batch, _ROUNDS)
    batch_seconds["segzero reference"] = [10 * value for value in batch_seconds["segzero reference"]]
    return {
        "num_replies": len(texts),
        "mean_bytes": round(sum(map(len, data)) / len(data), 1),
        "microseconds_per_reply_in_a_batch": _compared(batch_seconds, "segzero", 1e6, len(texts)),
        "microseconds_per_python_call": _compared(take_turns(single, _ROUNDS), "segzero", 1e6, len(texts)),
    }


def measure_documents() -> dict[str, Any]:
    """`rfc8259` mode on the answers alone: bytes per second."""
    answers = [_ANSWER.search(text)[1] for text in readable_replies(_BATCH)]  # type: ignore[index]
    listed = [answer if answer.startswith("[") else f"[{answer}]" for answer in answers]
    data = [answer.encode() for answer in listed]
    host = resolve_kernels("host")
    arguments: dict[str, Any] = {
        "answer_format": VISION_REASONER,
        "input_size_hw": INPUT_HW,
        "source_size_hw": SOURCE_HW,
    }
    sides: dict[str, Callable[[], object]] = {
        "segzero": lambda: parse_prompts(data, **arguments, mode="rfc8259", kernels=host)
    }
    for name, decode in _decoders().items():
        sides[name] = lambda decode=decode: [decode(document) for document in data]
    seconds = take_turns(sides, _ROUNDS)
    num_bytes = sum(map(len, data))
    compared = _compared(seconds, "segzero", 1e6, len(data))
    rates = {name: num_bytes / statistics.median(values) for name, values in seconds.items()}
    return {"num_documents": len(data), "mean_bytes": num_bytes / len(data), "bytes_per_second": rates, **compared}


def _decoders() -> dict[str, Decode]:
    decoders: dict[str, Decode] = {"json.loads": json.loads}
    try:
        import orjson
    except ImportError:
        return decoders
    return {**decoders, "orjson.loads": orjson.loads}


def outlines(count: int) -> NDArray[np.float32]:
    """Logits of `count` objects, float32 [N, 256, 256]: an ellipse each with a soft, uneven outline and some specks."""
    rng = np.random.default_rng(4)
    y, x = np.mgrid[: MASK_HW[0], : MASK_HW[1]].astype(np.float32)
    logits = []
    for _ in range(count):
        (cy, cx), (ry, rx) = rng.uniform(90, 166, 2), rng.uniform(30, 80, 2)
        distance = np.sqrt(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)
        uneven = cv2.GaussianBlur(rng.normal(0, 1, MASK_HW).astype(np.float32), (0, 0), 3)
        logits.append((12 * (1 - distance)).clip(-9, 9) + 14 * uneven)
    return np.stack(logits).astype(np.float32)


def peer_masks(logits: NDArray[np.float32], max_area: int) -> list[tuple[Any, ...]]:
    """Mask, box, area and run lengths with OpenCV, NumPy and pycocotools, each as it is fastest."""
    from pycocotools import mask as coco

    results = []
    for coarse in logits:
        cleaned = _peer_cleaned(coarse, max_area) if max_area else coarse
        mask = (cv2.resize(cleaned, FRAME_HW[::-1], interpolation=cv2.INTER_LINEAR) > 0).view(np.uint8)
        rle = coco.encode(np.asfortranarray(mask))
        results.append((mask, cv2.boundingRect(mask), cv2.countNonZero(mask), rle["counts"]))
    return results


def _peer_cleaned(coarse: NDArray[np.float32], max_area: int) -> NDArray[np.float32]:
    inside = (coarse > 0).view(np.uint8)
    small = []
    for pixels in (1 - inside, inside):
        _, labels = cv2.connectedComponents(pixels, connectivity=8)
        few = np.bincount(labels.ravel()) <= max_area
        few[0] = False
        small.append(few[labels])
    return np.where(small[1], np.float32(-10), np.where(small[0], np.float32(10), coarse))


def measure_masks() -> dict[str, Any]:
    """Milliseconds for three masks, without and with removal of holes and islands."""
    logits = outlines(3)
    builds = {"segzero": resolve_kernels("host"), "segzero reference": resolve_kernels("reference")}
    results: dict[str, Any] = {}
    for name, max_area in (("plain", 0), ("cleaned", 100)):
        rules = {"max_hole_area": max_area, "max_sprinkle_area": max_area}
        sides: dict[str, Callable[[], object]] = {
            build: lambda kernels=kernels, rules=rules: postprocess_masks(logits, FRAME_HW, **rules, kernels=kernels)
            for build, kernels in builds.items()
        }
        sides["OpenCV + pycocotools"] = lambda max_area=max_area: peer_masks(logits, max_area)
        ours = postprocess_masks(logits, FRAME_HW, **rules, kernels=builds["segzero"])
        others = [
            int(np.count_nonzero(a != b[0])) for a, b in zip(ours.masks, peer_masks(logits, max_area), strict=True)
        ]
        results[name] = {
            "pixels_that_differ_from_opencv": others,
            "mask_pixels": ours.areas.tolist(),
            **_compared(take_turns(sides, _MASK_ROUNDS), "segzero", 1e3, 1),
        }
    return results


def peer_planes(frame: NDArray[np.uint8], tensor: InputTensor) -> NDArray[np.float32]:
    """Pillow, then a table of 256 numbers per channel with OpenCV."""
    resized = resize(frame, tensor.size_hw, tensor.resampler)
    levels = np.arange(256, dtype=np.float32)[:, None] * np.float32(1 / 255)
    table = (levels - np.asarray(tensor.image_mean, np.float32)) / np.asarray(tensor.image_std, np.float32)
    planes = np.empty(tensor.shape, np.float32)
    for channel in range(3):
        cv2.LUT(cv2.extractChannel(resized, channel), np.ascontiguousarray(table[:, channel]), dst=planes[channel])
    return planes


def measure_frames() -> dict[str, Any]:
    """Milliseconds from a frame to what the embedded bundle's policy and segmenter take, and a 7B policy."""
    manifest = Bundle.open(EMBEDDED).manifest
    small = manifest.policy
    normal: dict[str, Any] = {"image_mean": small.image_mean, "image_std": small.image_std}
    patches: dict[str, Any] = {"patch_size": small.patch_size, "merge_size": small.merge_size, **normal}
    planes = InputTensor(
        size_hw=manifest.segmenter.input_size_hw,
        image_mean=manifest.segmenter.image_mean,
        image_std=manifest.segmenter.image_std,
    )
    tensors = {
        "policy": InputTensor(size_hw=small.input_size_hw, **patches),
        "policy 840": InputTensor(size_hw=INPUT_HW, **patches),
        "segmenter": planes,
    }
    host, reference = resolve_kernels("host"), resolve_kernels("reference")
    results: dict[str, Any] = {}
    for size_hw in FRAMES_HW:
        pixels = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
        frame = Frame.rgb(pixels)
        for name, tensor in tensors.items():
            sides: dict[str, Callable[[], object]] = {
                "segzero": lambda tensor=tensor, frame=frame: preprocess(frame, tensor, kernels=host),
                "Pillow + NumPy": lambda tensor=tensor, frame=frame: preprocess(frame, tensor, kernels=reference),
            }
            if not tensor.patch_size:
                sides["Pillow + OpenCV"] = lambda tensor=tensor, pixels=pixels: peer_planes(pixels, tensor)
            made = [side() for side in sides.values()]
            if not all(np.array_equal(made[0], other) for other in made[1:]):
                raise ValueError(f"expected the same numbers of every side, got others for {name} of {size_hw}")
            key = f"{name}, {size_hw[0]} x {size_hw[1]}"
            results[key] = _compared(take_turns(sides, _FRAME_ROUNDS), "segzero", 1e3, 1)
    return results


def measure_tokens() -> dict[str, Any]:
    """Microseconds for one greedy choice inside an answer and inside the thinking, of the embedded bundle's tokens."""
    bundle = Bundle.open(EMBEDDED)
    tokens = Chat(bundle.file(bundle.manifest.tokenizer)).token_bytes()
    automaton = answer_automaton(VISION_REASONER, INPUT_HW)
    grammar = token_table(automaton, tokens, bundle.manifest.policy.eos_token_ids)
    logits = np.random.default_rng(0).normal(0, 3, (1, len(tokens))).astype(np.float32)
    host, results = resolve_kernels("host"), {}
    for name, text in (("thinking", b"<think> a"), ("answer", b'<answer>[{"bbox_2d": [1')):
        states = np.array([automaton.walk(text)], np.int32)
        allowed = grammar.allowed_tokens(int(states[0]))
        sides: dict[str, Callable[[], object]] = {
            "segzero": lambda states=states: [
                sample_token(logits, grammar=grammar, states=states, kernels=host) for _ in range(100)
            ],
            "NumPy": lambda allowed=allowed: [np.where(allowed, logits[0], -np.inf).argmax() for _ in range(100)],
        }
        results[name] = _compared(take_turns(sides, _FRAME_ROUNDS), "segzero", 1e6, 100)
    return {"vocabulary": len(tokens), "states": grammar.ended + 1, **results}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", action="store_true", help="only frames and tokens, into a result file of their own")
    options = parser.parse_args(arguments)
    pin_to_cores(1)
    cv2.setNumThreads(1)
    document: dict[str, Any] = {"kernels": "host", "frames": measure_frames(), "tokens": measure_tokens()}
    if not options.inputs:
        document |= {"frame_hw": FRAME_HW, "mask_hw": MASK_HW, "masks": measure_masks()}
        if REAL.exists():
            document |= {"parser": measure_parser(), "rfc8259_documents": measure_documents()}
    path = write_result("kernels", document, variant="inputs" if options.inputs else "")
    print(f"result: {path}")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
