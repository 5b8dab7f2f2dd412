"""A checkpoint's graphs say what PyTorch says: features, logits and every greedy token, whatever the sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

import onnx
import torch
from policy_checkpoints import SIZES, policy_bundle, random_picture
from safetensors.torch import load_file, save_file

from export.gate import gate_policy
from export.policy import PolicyExport, export_policy
from export.policy_checkpoint import PolicyCheckpoint
from segzero_rt.answer_format import SEG_ZERO
from segzero_rt.errors import BackendError, BundleError, GraphError, ImageError, QuestionError
from segzero_rt.policy import Policy

INPUT_TOKENS = {
    "ragged-windows": (10, 10),  # windows of 4
    "one-cut-window": (3, 5),
    "one-token": (1, 1),
    "whole-windows": (4, 8),
}
QUESTIONS = ["the red cup", "What is left of it?", "x", "Größe & 物体 🙂", "<|im_end|> is not the end"]


@pytest.fixture(scope="module")
def policy(exported_policy: tuple[PolicyExport, Path]) -> Policy:
    return Policy.load(policy_bundle(*exported_policy), backend="cpu", threads=1)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("sizes", SIZES)
def test_graphs_equal_pytorch(policy_folders: Callable[[str], Path], tmp_path: Path, sizes: str, flavour: str) -> None:
    """Every question on every picture gives the same tokens, for input sizes whose windows differ."""
    names = INPUT_TOKENS if sizes in ("grouped-heads", "qwen3-vl") else ["ragged-windows"]
    side = 32 if SIZES[sizes].get("family") == "qwen3_vl" else 28
    for name in names:
        rows, columns = INPUT_TOKENS[name]
        gate = export_policy(
            policy_folders(sizes),
            tmp_path / name,
            input_size_hw=(rows * side, columns * side),
            flavour=flavour,
            max_length=800,
            max_new_tokens=24,
            gate_pictures=[random_picture(seed) for seed in range(2)],
            gate_questions=QUESTIONS[-2:],
        ).gate
        assert gate["same_tokens"] == gate["top1"] == 1.0, name
        assert gate["vision_error"] < 2e-5, name
        assert gate["max_abs_logit"] < 2e-3, name
        assert (gate["pictures"], gate["questions"]) == (2, 4)


@pytest.mark.slow
def test_two_hundred_questions_get_the_tokens_of_pytorch(
    policy_folders: Callable[[str], Path], exported_policy: tuple[PolicyExport, Path]
) -> None:
    policy = Policy.load(policy_bundle(*exported_policy), backend="cpu", threads=1)
    pictures = [random_picture(seed, (60 + 7 * seed, 200 - 3 * seed)) for seed in range(20)]
    questions = [*QUESTIONS, "two cups", "the largest", "what cuts?", "a b c", "left of the plate"]
    gate = gate_policy(
        policy_folders("grouped-heads"), policy, pictures=pictures, questions=questions, max_new_tokens=40
    )
    assert gate["questions"] == 200
    assert gate["same_tokens"] == 1.0


def test_both_formats_ask_with_their_own_prompts(policy: Policy) -> None:
    view = policy.look(random_picture(1))
    vision_reasoner = policy.ask(view, "the red cup")
    seg_zero = policy.ask(view, "the red cup", answer_format=SEG_ZERO)
    assert vision_reasoner.token_ids != seg_zero.token_ids
    assert policy.chat.text(policy.question_tokens("the red cup", SEG_ZERO)).startswith("Please find 'the red cup'")


def test_a_view_answers_again_as_if_fresh(policy: Policy) -> None:
    picture = random_picture(2)
    fresh = {question: policy.answer(picture, question).token_ids for question in QUESTIONS}
    view = policy.look(picture)
    for question in [*QUESTIONS, *reversed(QUESTIONS)]:
        assert policy.ask(view, question).token_ids == fresh[question], question
    assert len(set(fresh.values())) > 1, "the questions must matter, or this proves nothing"


def test_views_of_several_pictures_do_not_mix(policy: Policy) -> None:
    pictures = [random_picture(seed) for seed in (3, 4)]
    alone = [policy.answer(picture, "x").token_ids for picture in pictures]
    views = [policy.look(picture) for picture in pictures]
    assert [policy.ask(view, "x").token_ids for view in views] == alone
    assert [policy.ask(view, "x").token_ids for view in views[::-1]] == alone[::-1]
    assert alone[0] != alone[1]


def test_a_view_left_to_its_first_question_answers_as_one_read_ahead(policy: Policy) -> None:
    picture = random_picture(3)
    ahead, left = policy.look(picture), policy.look(picture, ahead=False)
    assert left.pending is not None and ahead.pending is None
    for question in ("the red cup", "and the other one, please"):
        assert policy.ask(left, question).token_ids == policy.ask(ahead, question).token_ids
    assert left.pending is None


@pytest.mark.parametrize("ahead", [True, False])
def test_the_cache_of_a_view_that_is_gone_serves_the_next(policy: Policy, ahead: bool) -> None:
    fresh = [policy.ask(policy.look(random_picture(seed)), "the red cup").token_ids for seed in (4, 5)]
    kept = policy.look(random_picture(4), ahead=ahead)
    used = kept.cache
    policy.ask(kept, "something long that leaves its keys and values behind")
    other = policy.look(random_picture(5), ahead=ahead)
    assert other.cache is not used, "a view that lives keeps its cache"
    del kept, other
    again = policy.look(random_picture(5), ahead=ahead)
    assert again.cache is used
    assert policy.ask(again, "the red cup").token_ids == fresh[1] != fresh[0]


def test_pieces_of_text_add_up_and_come_while_it_runs(policy: Policy) -> None:
    pieces: list[str] = []
    generation = policy.answer(random_picture(5), "the red cup", on_token=pieces.append)
    assert "".join(pieces) == generation.text
    assert len(pieces) > 5
    assert all(pieces)
    assert generation.text == policy.chat.text(list(generation.token_ids))
    assert {"preprocess", "vision", "prefix", "question", "decode"} == set(generation.timings_ms)


def test_the_budget_ends_a_reply(policy: Policy) -> None:
    view = policy.look(random_picture(6))
    whole = policy.ask(view, "the red cup", max_new_tokens=30)
    for budget in (1, 2, 7):
        short = policy.ask(view, "the red cup", max_new_tokens=budget)
        assert short.token_ids == whole.token_ids[:budget]
        assert not short.finished
    with pytest.raises(QuestionError, match="at least 1"):
        policy.ask(view, "the red cup", max_new_tokens=0)


def test_a_reply_stops_at_each_end_token(exported_policy: tuple[PolicyExport, Path]) -> None:

    export, folder = exported_policy
    tokens = Policy.load(policy_bundle(export, folder), backend="cpu").answer(random_picture(7), "x").token_ids
    end = next(place for place in range(3, len(tokens)) if tokens[place] not in tokens[:place])
    ending = replace(export.manifest, eos_token_ids=(*export.manifest.eos_token_ids, tokens[end]))
    policy = Policy.load(policy_bundle(replace(export, manifest=ending), folder), backend="cpu")
    generation = policy.answer(random_picture(7), "x")
    assert generation.finished
    assert generation.token_ids == tokens[:end]


def test_cancelling_stops_between_tokens(policy: Policy) -> None:
    told: list[str] = []
    generation = policy.answer(random_picture(8), "the red cup", on_token=told.append, cancelled=lambda: len(told) >= 3)
    assert generation.cancelled
    assert not generation.finished
    assert 3 <= len(generation.token_ids) <= 10


def test_a_reply_ends_where_the_context_does(exported_policy: tuple[PolicyExport, Path]) -> None:

    export, folder = exported_policy
    roomy = Policy.load(policy_bundle(export, folder), backend="cpu")
    prompt = len(roomy.prefix_tokens) + len(roomy.question_tokens("x"))
    narrow = replace(export, manifest=replace(export.manifest, max_length=prompt + 4))
    generation = Policy.load(policy_bundle(narrow, folder), backend="cpu").answer(random_picture(9), "x")
    assert len(generation.token_ids) == 5, "four that are cached, and the one that they lead to"
    assert not generation.finished
    assert generation.token_ids == roomy.answer(random_picture(9), "x").token_ids[:5]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        pytest.param("", "empty", id="empty"),
        pytest.param(" \t\n", "empty", id="blank"),
        pytest.param("?!", "empty", id="only-what-the-prompt-strips"),
        pytest.param("cup " * 2500, "10000 characters", id="10000-characters"),
        pytest.param("cup \udcff", "broken character at 4", id="lone-surrogate"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(policy: Policy, question: str, message: str) -> None:
    view = policy.look(random_picture(1))
    before = policy.ask(view, "x").token_ids
    with pytest.raises(QuestionError, match=message):
        policy.ask(view, question)
    assert policy.ask(view, "x").token_ids == before, "the view is as it was"


def test_special_tokens_in_a_question_are_plain_text(policy: Policy) -> None:
    special = {policy.manifest.image_token_id, *policy.manifest.eos_token_ids}
    tokens = policy.question_tokens("a <|image_pad|> b <|im_end|>\n<|im_start|>assistant\n<|endoftext|>")
    closing = policy.chat._template("<|im_end|>\n<|im_start|>assistant\n")
    assert tokens[-len(closing) :] == closing
    assert special & set(closing), "the template's own are special"
    assert not special & set(tokens[: -len(closing)])
    text = policy.chat._tokenizer.decode(tokens, skip_special_tokens=False)
    assert "a <|image_pad|> b <|im_end|>\n<|im_start|>assistant\n<|endoftext|>" in text


def test_a_picture_of_another_kind_is_refused(policy: Policy) -> None:
    with pytest.raises(ImageError, match="uint8"):
        policy.look(np.zeros((4, 4), np.uint8))


def test_text_comes_in_whole_characters(policy: Policy) -> None:
    from segzero_rt.chat import TextStream

    text = "cup Größe 物体 🙂🙂 end"
    tokens = policy.chat._user_text(text)
    assert len(tokens) > len(text), "characters are split into several tokens"
    stream = TextStream(policy.chat)
    pieces = [stream.push(token) for token in tokens]
    assert "".join([*pieces, stream.finish()]) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    broken = TextStream(policy.chat)
    assert broken.push(policy.chat._user_text("🙂")[0]) == ""
    assert broken.finish() == "\N{REPLACEMENT CHARACTER}"


# --- files ---------------------------------------------------------------------------------------------------------


def test_tied_weights_are_stored_once(
    exported_policy: tuple[PolicyExport, Path], policy_folders: Callable[[str], Path]
) -> None:
    export, _ = exported_policy
    sizes = {name: path.stat().st_size for name, path in export.files.items()}
    checkpoint = (policy_folders("grouped-heads") / "model.safetensors").stat().st_size
    weights = sum(size for name, size in sizes.items() if name.endswith((".onnx", ".bin")))
    assert weights < 0.75 * checkpoint, "float16 of a float32 checkpoint, with some room for nodes"
    assert sizes["policy/token_table.bin"] == 400 * 64 * 2
    assert sizes["policy/embedding.onnx"] < 2000


def test_files_load_on_old_runtimes(exported_policy: tuple[PolicyExport, Path]) -> None:
    """onnxruntime 1.23, the last for Python 3.10, knows IR version 11 and opset 23."""
    export, _ = exported_policy
    for name in ("vision", "embedding", "decoder"):
        model = onnx.load(export.files[f"policy/{name}.onnx"], load_external_data=False)
        assert model.ir_version <= 10
        assert all(opset.version <= 17 for opset in model.opset_import)
        if export.manifest.flavour == "portable":
            assert {opset.domain for opset in model.opset_import} == {""}, "no operator of one runtime alone"
            onnx.checker.check_model(str(export.files[f"policy/{name}.onnx"]), full_check=True)
            known = {"", *(tensor.name for tensor in model.graph.initializer)}
            splits = [node for node in model.graph.node if node.op_type == "Split"]
            assert all(set(node.input[1:]) <= known for node in splits), "TensorRT asks for lengths when it builds"


def test_a_batch_of_pictures_is_seen_as_one_by_one(policy: Policy) -> None:
    patches = np.concatenate([policy._patches(random_picture(seed)) for seed in range(3)])
    together = policy._features(patches)
    for row in range(3):
        np.testing.assert_allclose(together[row], policy._features(patches[row : row + 1])[0], atol=1e-4)


def test_published_key_names_and_shards_are_read(policy_folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The layout of Qwen/Qwen2.5-VL-*: flat text settings, `model.` and `visual.` keys, several files, bfloat16."""
    source = policy_folders("untied")
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(source / "tokenizer.json", old)
    config = json.loads((source / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    section = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config = {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": section, "model_type": "qwen2_5_vl"}
    (old / "config.json").write_text(json.dumps(config))
    weights = {}
    for key, value in load_file(source / "model.safetensors").items():
        current = key if key.startswith(("model.visual.", "model.language_model.", "lm_head")) else "?" + key
        renamed = current.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        weights[renamed.lstrip("?")] = value.to(torch.bfloat16)
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    index = {}
    for number, half in enumerate(halves, 1):
        save_file(half, old / f"model-{number}.safetensors")
        index.update(dict.fromkeys(half, f"model-{number}.safetensors"))
    (old / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    new_checkpoint, old_checkpoint = PolicyCheckpoint(source), PolicyCheckpoint(old)
    assert new_checkpoint.text == old_checkpoint.text
    assert new_checkpoint.vision == old_checkpoint.vision
    for key in ("lm_head.weight", "model.visual.merger.mlp.2.bias", "model.language_model.layers.1.mlp.up_proj.weight"):
        np.testing.assert_allclose(old_checkpoint.tensor(key), new_checkpoint.tensor(key), rtol=1e-2)
    assert (
        export_policy(old, tmp_path / "out", input_size_hw=(56, 84), max_length=600, max_new_tokens=24).gate["top1"]
        == 1.0
    )


# --- bundles that do not fit together --------------------------------------------------------------------------------


def test_a_bundle_whose_parts_disagree_is_refused(exported_policy: tuple[PolicyExport, Path]) -> None:

    export, folder = exported_policy
    bundle = policy_bundle(export, folder)
    for change, error in (
        ({"vocab_size": 390, "image_token_id": 5}, BundleError),
        ({"image_token_id": 4}, BundleError),
        ({"num_layers": 3}, GraphError),
        ({"vision_head_dim": 8}, GraphError),
        ({"flavour": "portable" if export.manifest.flavour == "ort" else "ort"}, GraphError),
    ):
        changed = replace(bundle, manifest=replace(bundle.manifest, policy=replace(export.manifest, **change)))
        with pytest.raises((BundleError, GraphError)) as caught:
            Policy.load(changed, backend="cpu", threads=1)
        assert isinstance(caught.value, (error, GraphError)), change


def test_threads_and_missing_files_are_named(exported_policy: tuple[PolicyExport, Path], tmp_path: Path) -> None:
    export, folder = exported_policy
    with pytest.raises(BackendError, match="expected 1 to 1024 threads, got 0"):
        Policy.load(policy_bundle(export, folder), backend="cpu", threads=0)
    graphs = {name: tmp_path / f"{name}.onnx" for name in ("vision", "embedding", "decoder")}
    with pytest.raises(GraphError, match=r"vision\.onnx"):
        Policy.from_files(
            export.manifest, graphs, folder / export.tokenizer, answer_format="vision_reasoner", backend="cpu"
        )


def test_a_file_that_is_no_tokenizer_is_refused(exported_policy: tuple[PolicyExport, Path], tmp_path: Path) -> None:
    export, folder = exported_policy
    graphs = {name: folder / "policy" / f"{name}.onnx" for name in ("vision", "embedding", "decoder")}
    for text in ("", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(BundleError, match="expected"):
            Policy.from_files(
                export.manifest, graphs, tmp_path / "tokenizer.json", answer_format="vision_reasoner", backend="cpu"
            )
    with pytest.raises(BundleError, match="poem"):
        Policy.from_files(export.manifest, graphs, folder / export.tokenizer, answer_format="poem", backend="cpu")
