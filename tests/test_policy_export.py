"""A checkpoint's graphs say what PyTorch says: features, logits and every greedy token, whatever the sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with PyTorch")
pytest.importorskip("transformers", reason="compares with transformers")

import onnx
import torch
from policy_checkpoints import policy_bundle, random_picture, write_checkpoint
from safetensors.torch import load_file, save_file

from export.gate import EXACT, GateLimits, gate_policy
from export.policy import PolicyExport, export_policy
from export.policy_checkpoint import PolicyCheckpoint
from segzero_rt.answer_format import SEG_ZERO
from segzero_rt.errors import BackendError, BundleError, ExportError, GraphError, ImageError, QuestionError
from segzero_rt.policy import Policy

SIZES: dict[str, dict[str, Any]] = {
    "grouped-heads": {"kv_heads": 2},
    "one-kv-head": {"kv_heads": 1, "heads": 4},
    "own-kv-heads": {"kv_heads": 4, "heads": 4, "window_size": 56},
    "untied": {"tied": False, "vision_heads": 2},
    "three-groups-all-windows": {"hidden": 96, "heads": 6, "kv_heads": 3, "layers": 3, "full_attention": ()},
    "no-windows": {"full_attention": (0, 1, 2)},
}
INPUT_SIZES = {
    "ragged-windows": (280, 280),  # 10 x 10 tokens, windows of 4
    "one-cut-window": (84, 140),
    "one-token": (28, 28),
    "whole-windows": (112, 224),
}
QUESTIONS = ["the red cup", "What is left of it?", "x", "Größe & 物体 🙂", "<|im_end|> is not the end"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a checkpoint by the name of its sizes; each is made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name
            write_checkpoint(made[name], seed=len(made), **SIZES[name])
        return made[name]

    return folder


@pytest.fixture(scope="module", params=["ort", "portable"])
def exported(
    request: pytest.FixtureRequest, checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PolicyExport, Path]:
    folder = tmp_path_factory.mktemp("exported")
    options: dict[str, Any] = {"input_size_hw": (280, 280), "max_length": 700, "max_new_tokens": 40}
    return export_policy(checkpoints("grouped-heads"), folder, flavour=request.param, **options), folder


@pytest.fixture(scope="module")
def policy(exported: tuple[PolicyExport, Path]) -> Policy:
    return Policy.load(policy_bundle(*exported), backend="cpu", threads=1)


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("sizes", SIZES)
def test_graphs_equal_pytorch(checkpoints: Callable[[str], Path], tmp_path: Path, sizes: str, flavour: str) -> None:
    """Every question on every picture gives the same tokens, for input sizes whose windows differ."""
    names = INPUT_SIZES if sizes == "grouped-heads" else ["ragged-windows"]
    for name in names:
        gate = export_policy(
            checkpoints(sizes),
            tmp_path / name,
            input_size_hw=INPUT_SIZES[name],
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
    checkpoints: Callable[[str], Path], exported: tuple[PolicyExport, Path]
) -> None:
    policy = Policy.load(policy_bundle(*exported), backend="cpu", threads=1)
    pictures = [random_picture(seed, (60 + 7 * seed, 200 - 3 * seed)) for seed in range(20)]
    questions = [*QUESTIONS, "two cups", "the largest", "what cuts?", "a b c", "left of the plate"]
    gate = gate_policy(checkpoints("grouped-heads"), policy, pictures=pictures, questions=questions, max_new_tokens=40)
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


def test_a_reply_stops_at_each_end_token(exported: tuple[PolicyExport, Path]) -> None:
    from dataclasses import replace

    export, folder = exported
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


def test_a_reply_ends_where_the_context_does(exported: tuple[PolicyExport, Path]) -> None:
    from dataclasses import replace

    export, folder = exported
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


def test_tied_weights_are_stored_once(exported: tuple[PolicyExport, Path], checkpoints: Callable[[str], Path]) -> None:
    export, _ = exported
    sizes = {name: path.stat().st_size for name, path in export.files.items()}
    checkpoint = (checkpoints("grouped-heads") / "model.safetensors").stat().st_size
    weights = sum(size for name, size in sizes.items() if name.endswith((".onnx", ".bin")))
    assert weights < 0.75 * checkpoint, "float16 of a float32 checkpoint, with some room for nodes"
    assert sizes["policy/token_table.bin"] == 400 * 64 * 2
    assert sizes["policy/embedding.onnx"] < 2000


def test_files_load_on_old_runtimes(exported: tuple[PolicyExport, Path]) -> None:
    """onnxruntime 1.23, the last for Python 3.10, knows IR version 11 and opset 23."""
    export, _ = exported
    for name in ("vision", "embedding", "decoder"):
        model = onnx.load(export.files[f"policy/{name}.onnx"], load_external_data=False)
        assert model.ir_version <= 10
        assert all(opset.version <= 17 for opset in model.opset_import)
        if export.manifest.flavour == "portable":
            assert {opset.domain for opset in model.opset_import} == {""}, "no operator of one runtime alone"
            onnx.checker.check_model(str(export.files[f"policy/{name}.onnx"]), full_check=True)


def test_a_batch_of_pictures_is_seen_as_one_by_one(policy: Policy) -> None:
    patches = np.concatenate([policy._patches(random_picture(seed)) for seed in range(3)])
    together = policy._features(patches)
    for row in range(3):
        np.testing.assert_allclose(together[row], policy._features(patches[row : row + 1])[0], atol=1e-4)


def test_published_key_names_and_shards_are_read(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """The layout of Qwen/Qwen2.5-VL-*: flat text settings, `model.` and `visual.` keys, several files, bfloat16."""
    source = checkpoints("untied")
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


# --- what must not become a bundle ---------------------------------------------------------------------------------


def damaged_copy(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            config["text_config"][key] = value
        path.write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def last_of(weights: dict[str, torch.Tensor], ending: str) -> str:
    return sorted(key for key in weights if key.endswith(ending))[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda f: (f / "config.json").unlink(), "config.json", id="no-config"),
        pytest.param(lambda f: (f / "config.json").write_text("{"), "JSON", id="broken-config"),
        pytest.param(lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "llama", id="other-family"),
        pytest.param(lambda f: (f / "model.safetensors").unlink(), "neither", id="no-weights"),
        pytest.param(lambda f: (f / "model.safetensors").write_bytes(b"\x08" * 50), "safetensors", id="rubbish"),
        pytest.param(lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json", id="no-tokenizer"),
        pytest.param(edit_config(num_hidden_layers=5), "layers.2", id="more-layers-than-weights"),
        pytest.param(edit_config(intermediate_size=77), "of shape", id="other-width"),
        pytest.param(edit_config(num_key_value_heads=3), "shared evenly", id="heads-do-not-divide"),
        pytest.param(edit_config(use_sliding_window=True), "sliding", id="sliding-window"),
        pytest.param(
            edit_weights(lambda w: w[last_of(w, "down_proj.weight")].fill_(7e4)), "float16", id="too-large-for-float16"
        ),
        pytest.param(
            edit_weights(lambda w: w[last_of(w, "q_proj.bias")].fill_(float("nan"))), "finite", id="not-a-number"
        ),
    ],
)
def test_checkpoints_that_cannot_be_exported_are_named(
    checkpoints: Callable[[str], Path], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = damaged_copy(checkpoints("grouped-heads"), tmp_path / "hf", change)
    with pytest.raises(ExportError, match=message):
        export_policy(folder, tmp_path / "out", input_size_hw=(56, 56), max_length=600)


@pytest.mark.parametrize(
    "ending",
    ["q_proj.bias", "down_proj.weight", "attn.qkv.weight", "merger.mlp.0.weight", "ln_q.weight", "embed_tokens.weight"],
)
def test_the_gate_notices_one_changed_weight(
    checkpoints: Callable[[str], Path], tmp_path: Path, exported: tuple[PolicyExport, Path], ending: str
) -> None:
    """The graphs against a checkpoint in which one tensor has another sign."""

    def negate(weights: dict[str, torch.Tensor]) -> None:
        weights[last_of(weights, ending)].neg_()

    other = damaged_copy(checkpoints("grouped-heads"), tmp_path / "hf", edit_weights(negate))
    policy = Policy.load(policy_bundle(*exported), backend="cpu", threads=1)
    with pytest.raises(ExportError, match="differ from PyTorch"):
        gate_policy(other, policy, pictures=[random_picture(0)], limits=EXACT, max_new_tokens=20)


def test_the_gate_says_which_figure_failed(
    checkpoints: Callable[[str], Path], exported: tuple[PolicyExport, Path]
) -> None:
    policy = Policy.load(policy_bundle(*exported), backend="cpu", threads=1)
    with pytest.raises(ExportError, match=r"vision_error .* \(limit 1e-12\)"):
        gate_policy(
            checkpoints("grouped-heads"),
            policy,
            pictures=[random_picture(0)],
            limits=GateLimits(max_vision_error=1e-12),
            max_new_tokens=3,
        )


def test_the_gate_sees_a_nan_in_a_later_picture(
    checkpoints: Callable[[str], Path], exported: tuple[PolicyExport, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(policy_bundle(*exported), backend="cpu", threads=1)
    features = policy.features
    pictures = [random_picture(0), random_picture(1)]
    monkeypatch.setattr(policy, "features", lambda image: features(image) * (np.nan if image is pictures[1] else 1))
    with pytest.raises(ExportError, match="vision_error nan"):
        gate_policy(checkpoints("grouped-heads"), policy, pictures=pictures, questions=["x"], max_new_tokens=2)


def test_a_picture_that_fills_the_context_is_refused(exported: tuple[PolicyExport, Path]) -> None:
    export, _ = exported
    with pytest.raises(BundleError, match="max_length"):
        Policy.from_files(
            replace(export.manifest, max_length=10),
            {name: export.files[f"policy/{name}.onnx"] for name in ("vision", "embedding", "decoder")},
            export.files["policy/tokenizer.json"],
            answer_format="vision_reasoner",
            backend="cpu",
        )


def test_rounded_weights_are_measured_by_looser_limits(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights that float16 cannot hold: the export says so by its limits, and float32 storage is exact."""

    def blur(weights: dict[str, torch.Tensor]) -> None:
        for value in weights.values():
            value.mul_(1 + 1e-4)

    folder = damaged_copy(checkpoints("grouped-heads"), tmp_path / "hf", edit_weights(blur))
    options: dict[str, Any] = {"input_size_hw": (56, 56), "max_length": 600, "max_new_tokens": 24}
    half = export_policy(folder, tmp_path / "half", storage="float16", **options).gate
    whole = export_policy(folder, tmp_path / "whole", storage="float32", **options).gate
    assert not half["limits"]["same_tokens"]
    assert whole["limits"]["same_tokens"]
    assert whole["kl_max"] < half["kl_max"]


def test_int8_weights_are_smaller_and_close(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Random weights amplify rounding more than trained ones; a wrong scale or sign would still be far outside."""
    options: dict[str, Any] = {"input_size_hw": (140, 84), "max_length": 600, "max_new_tokens": 16}
    half = export_policy(checkpoints("grouped-heads"), tmp_path / "half", storage="float16", **options)
    loose = GateLimits(max_vision_error=0.1, max_kl=5.0, max_kl_mean=0.5, min_top1=0.5, same_tokens=False)
    small = export_policy(checkpoints("grouped-heads"), tmp_path / "int8", storage="int8", gate_limits=loose, **options)
    assert small.gate["limits"]["max_kl"] == 5.0
    for name in ("vision", "decoder"):
        sizes = [exported.files[f"policy/{name}.onnx"].stat().st_size for exported in (half, small)]
        assert sizes[1] < sizes[0], name
    with pytest.raises(ExportError, match="flavour ort"):
        export_policy(checkpoints("grouped-heads"), tmp_path / "no", storage="int8", flavour="portable", **options)


# --- bundles that do not fit together --------------------------------------------------------------------------------


def test_a_bundle_whose_parts_disagree_is_refused(exported: tuple[PolicyExport, Path]) -> None:
    from dataclasses import replace

    export, folder = exported
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


def test_threads_and_missing_files_are_named(exported: tuple[PolicyExport, Path], tmp_path: Path) -> None:
    export, folder = exported
    with pytest.raises(BackendError, match="expected 1 to 1024 threads, got 0"):
        Policy.load(policy_bundle(export, folder), backend="cpu", threads=0)
    graphs = {name: tmp_path / f"{name}.onnx" for name in ("vision", "embedding", "decoder")}
    with pytest.raises(GraphError, match=r"vision\.onnx"):
        Policy.from_files(
            export.manifest, graphs, folder / export.tokenizer, answer_format="vision_reasoner", backend="cpu"
        )


def test_a_file_that_is_no_tokenizer_is_refused(exported: tuple[PolicyExport, Path], tmp_path: Path) -> None:
    export, folder = exported
    graphs = {name: folder / "policy" / f"{name}.onnx" for name in ("vision", "embedding", "decoder")}
    for text in ("", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(BundleError, match="expected"):
            Policy.from_files(
                export.manifest, graphs, tmp_path / "tokenizer.json", answer_format="vision_reasoner", backend="cpu"
            )
    with pytest.raises(BundleError, match="poem"):
        Policy.from_files(export.manifest, graphs, folder / export.tokenizer, answer_format="poem", backend="cpu")
