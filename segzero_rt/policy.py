"""The policy at run time: a picture and a question to text, greedily, without PyTorch.

look(picture):  patches ─► vision graph ─► features ─► decoder over the prefix ─► View (its KV cache)
ask(view, question):  View cut back to its prefix ─► decoder over the question ─► `decoding.py` to the end
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from segzero_rt.answer_format import FORMATS, AnswerFormat
from segzero_rt.bundle import Bundle
from segzero_rt.chat import Chat, TextStream
from segzero_rt.decoding import DecodeCounts, GreedyReply, TokenRuns, rows_are_independent
from segzero_rt.drafting import Draft, Drafter
from segzero_rt.errors import BackendError, BundleError, QuestionError
from segzero_rt.external_data import graph_bytes
from segzero_rt.graph import Backend, Graph, resolve_backend
from segzero_rt.graph_spec import GraphSpec, decoder_spec, embedding_spec, embeds_width, vision_spec
from segzero_rt.kv_cache import CacheSizes, KVCache
from segzero_rt.manifest import PolicyManifest
from segzero_rt.positions import PictureSpan, policy_layout, policy_rotary
from segzero_rt.preprocess import Preprocessor

if TYPE_CHECKING:  # most replies are free
    from segzero_rt.constrained import AnswerConstraint
    from segzero_rt.kernels.sample_token import GrammarTable

DRAFT_TOKENS = 5
"""Guesses in one run of the decoder, by default: six tokens take a sixth longer than one, eight half as long again."""
MAX_DRAFT_TOKENS = 64
SMALL_DECODER_BYTES = 64 << 20
"""Decoders below this run on one thread unless the caller says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What the policy said to one question."""

    text: str
    token_ids: tuple[int, ...]
    """Tokens of the reply, without the one that ended it."""
    finished: bool
    """The policy ended its reply by itself; False at the token budget or when cancelled."""
    cancelled: bool = False
    timings_ms: dict[str, float] = field(default_factory=dict)
    """"question" (prefill of the question) and "decode" (all tokens of the reply)."""
    counts: DecodeCounts = field(default_factory=DecodeCounts)


@dataclass(kw_only=True, eq=False)
class View:
    """A picture that the policy has looked at: its cache ends where questions begin. One question at a time.

    The cache belongs to the view for as long as there is one, and to a later view then.
    """

    cache: KVCache
    prefix_length: int
    timings_ms: dict[str, float]
    """"preprocess", "vision" and "prefix" (prefill up to the question, unless that is left to the first question)."""
    pending: NDArray[np.float32] | None = None
    """What the cache still lacks of the prefix, float32 [1, tokens, hidden]; read together with the first question."""


class Policy:
    """Vision graph, embedding graph, decoder graph and decode loop. Use `Policy.load`."""

    def __init__(
        self,
        manifest: PolicyManifest,
        chat: Chat,
        *,
        vision: Graph,
        embedding: Graph,
        decoder: Graph,
        answer_format: AnswerFormat,
        draft_tokens: int | None = None,
        constrained: bool = False,
    ) -> None:
        if draft_tokens is not None and not 0 <= draft_tokens <= MAX_DRAFT_TOKENS:
            raise BackendError(f"expected 0 to {MAX_DRAFT_TOKENS} guessed tokens a run, got {draft_tokens}")
        if chat.image_token_id != manifest.image_token_id or chat.vocab_size > manifest.vocab_size:
            raise BundleError(
                f"expected a tokenizer with <|image_pad|> = {manifest.image_token_id} and at most "
                f"{manifest.vocab_size} tokens, got {chat.image_token_id} and {chat.vocab_size}; export it again"
            )
        self.manifest = manifest
        self.chat = chat
        self.default_format = answer_format
        self.preprocessor = Preprocessor(
            input_size_hw=manifest.input_size_hw,
            patch_size=manifest.patch_size,
            merge_size=manifest.merge_size,
            image_mean=manifest.image_mean,
            image_std=manifest.image_std,
            resampler=manifest.resampler,
        )
        self.vision, self.embedding, self.decoder = vision, embedding, decoder
        self.layout = policy_layout(manifest)
        self._layout_inputs = self.layout.inputs()
        self._spare_caches: list[KVCache] = []
        self._draft_tokens = _default_draft(decoder) if draft_tokens is None else draft_tokens
        self._drafters: dict[AnswerFormat, Drafter] = {}
        self._rows_independent: bool | None = None
        self.constrained = constrained
        self._grammars: dict[AnswerFormat, GrammarTable] = {}
        self.rotary = policy_rotary(manifest)
        self.before_picture = chat.before_picture(self.default_format.system_prompt)
        placeholders = [manifest.image_token_id] * (self.preprocessor.grid_hw[0] * self.preprocessor.grid_hw[1])
        self.prefix_tokens = [*self.before_picture, *placeholders, *chat.after_picture()]
        """Tokens of every view, up to where questions begin."""
        if len(self.prefix_tokens) >= manifest.max_length:
            raise BundleError(
                f"expected a max_length beyond the {len(self.prefix_tokens)} tokens of the picture and what stands "
                f"before it, got {manifest.max_length}; export it again"
            )

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        *,
        backend: str | Backend = "auto",
        threads: int | None = None,
        draft_tokens: int | None = None,
        constrained: bool = False,
    ) -> Policy:
        """Loads the policy's graphs and tokenizer from a bundle.

        Args:
            draft_tokens: guesses that the decoder checks in one run, 0 for none; by default `DRAFT_TOKENS` on the CPU.
                They change how fast a reply comes, and nothing else: where they would, none are made.
            constrained: hold replies to their format's grammar (`answer_grammar`), so that each ends with an answer
                that can be read, within its budget. What a policy says by itself shows what it has learnt; this shows
                what it would say if it could not misspell.

        Raises:
            BackendError: the backend is not there, or more guesses than `MAX_DRAFT_TOKENS`.
            GraphError: a graph differs from its spec.
            BundleError: the tokenizer does not fit the manifest.
        """
        manifest = bundle.manifest
        graphs = {
            name: bundle.file(getattr(manifest.policy.graphs, name)) for name in ("vision", "embedding", "decoder")
        }
        return cls.from_files(
            manifest.policy,
            graphs,
            bundle.file(manifest.tokenizer),
            answer_format=manifest.answer_format,
            backend=backend,
            threads=threads,
            draft_tokens=draft_tokens,
            constrained=constrained,
        )

    @classmethod
    def from_files(
        cls,
        manifest: PolicyManifest,
        graphs: Mapping[str, Path],
        tokenizer: Path,
        *,
        answer_format: str,
        backend: str | Backend = "auto",
        threads: int | None = None,
        draft_tokens: int | None = None,
        constrained: bool = False,
    ) -> Policy:
        """Loads a policy that is not in a bundle yet; `graphs` are the files of "vision", "embedding" and "decoder".

        Raises:
            as `load`.
        """
        if answer_format not in FORMATS:
            raise BundleError(
                f"expected an answer format of {', '.join(FORMATS)}, got {answer_format!r}; "
                "a newer segzero-rt may know it"
            )
        resolved = backend if isinstance(backend, Backend) else resolve_backend(backend)
        small = is_small_decoder(graphs["decoder"])
        loaded = {}
        for name, spec in policy_specs(manifest).items():
            # A small decoder's products are so short that waking a second thread costs more than it saves.
            chosen = 1 if small and threads is None and name != "vision" else threads
            short = small and name == "decoder"
            loaded[name] = Graph.load(graphs[name], spec, backend=resolved, threads=chosen, short_prompts=short)
        chat, form = Chat(tokenizer), FORMATS[answer_format]
        return cls(manifest, chat, answer_format=form, draft_tokens=draft_tokens, constrained=constrained, **loaded)

    @property
    def backend(self) -> Backend:
        return self.decoder.backend

    def look(self, image_rgb: NDArray[np.uint8], *, ahead: bool = True) -> View:
        """Takes in a picture, uint8 [H, W, 3] of any size; any number of questions may follow.

        Args:
            ahead: read everything up to the question now. False leaves it to the first question, which is then read in
                the same run: faster as a whole where the question is there already.

        Raises:
            ImageError: not such an array.
        """
        clock = _Clock()
        patches = self._patches(image_rgb)
        clock.lap("preprocess")
        features = self._features(patches)
        clock.lap("vision")
        picture = PictureSpan(start=len(self.before_picture), grid_hw=self.preprocessor.grid_hw)
        embeds = self.embed(self.prefix_tokens)
        embeds[:, picture.start : picture.end] = features
        cache, known = self._empty_cache(picture)
        view = View(cache=cache, prefix_length=embeds.shape[1], timings_ms=clock.timings_ms, pending=embeds[:, known:])
        if ahead:
            cache.extend(embeds[:, known:], np.zeros((1, 0), dtype=np.int64))
            view.pending = None
        clock.lap("prefix")
        weakref.finalize(view, self._take_back, cache).atexit = False
        return view

    def ask(
        self,
        view: View,
        question: str,
        *,
        answer_format: AnswerFormat | None = None,
        max_new_tokens: int | None = None,
        reply_start: str = "",
        on_token: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generation:
        """Answers one question on a picture; earlier questions on the same view leave no trace.

        Args:
            question: any text; special tokens in it are taken as the characters that they are written with.
            answer_format: the bundle's by default.
            max_new_tokens: budget of the reply; the bundle's by default. Ends earlier where the context is full.
            reply_start: what the reply is made to begin with, such as a thinking that was written elsewhere; the policy
                goes on from there. It is part of the reply's text and tokens, but not of the budget.
            on_token: gets each piece of text as soon as it is certain.
            cancelled: asked before each token; True ends the reply.

        Raises:
            QuestionError: the question is empty, or leaves no room for a reply.
        """
        budget = self.manifest.max_new_tokens if max_new_tokens is None else max_new_tokens
        if budget < 1:
            raise QuestionError(f"expected a budget of at least 1 new token, got {budget}")
        started = self.chat.reply_start(reply_start)
        prompt = [*self.question_tokens(question, answer_format), *started]
        if view.prefix_length + len(prompt) >= view.cache.capacity:
            raise QuestionError(f"expected a reply_start that leaves room, got {len(started)} tokens; shorten it")
        clock = _Clock()
        cache, embeds = view.cache, self.embed(prompt)
        if view.pending is None:
            cache.truncate(view.prefix_length)
        else:
            embeds = np.concatenate([view.pending, embeds], axis=1)
        logits = cache.extend(embeds, np.array([[embeds.shape[1] - 1]], dtype=np.int64))
        view.pending = None
        clock.lap("question")
        budget = min(budget, cache.capacity - int(cache.lengths[0]) + 1)
        stream = TextStream(self.chat)
        pieces: list[str] = []
        for given in started:
            tell(stream.push(given), pieces, on_token)
        runs = TokenRuns(self.embedding, cache)
        form = answer_format or self.default_format
        draft = self._draft(runs, cache, form, prompt)
        constraint = self._constraint(form, started) if self.constrained else None
        ends = self.manifest.eos_token_ids
        reply = GreedyReply(runs, cache, end_token_ids=ends, draft=draft, constraint=constraint)
        first = logits.reshape(1, -1)
        said = int(first.argmax()) if constraint is None else constraint.choices(first, [], budget)[0]
        tokens = reply.tokens(said, budget)
        stopped = False
        for _ in range(budget):
            if cancelled is not None and cancelled():
                stopped = True
                break
            if (token_id := next(tokens, None)) is None:
                break
            tell(stream.push(token_id), pieces, on_token)
        tell(stream.finish(), pieces, on_token)
        clock.lap("decode")
        return Generation(
            text="".join(pieces),
            token_ids=stream.token_ids,
            finished=reply.finished,
            cancelled=stopped,
            timings_ms=clock.timings_ms,
            counts=reply.counts,
        )

    def forget_replies(self) -> None:
        """Lets later guesses know nothing of what was asked and said before, as if the policy had just been loaded."""
        for drafter in self._drafters.values():
            drafter.forget()

    def answer(
        self,
        image_rgb: NDArray[np.uint8],
        question: str,
        *,
        answer_format: AnswerFormat | None = None,
        max_new_tokens: int | None = None,
        on_token: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generation:
        """`look` and `ask` in one; the timings are of both.

        Raises:
            ImageError: the picture is not uint8 [H, W, 3].
            QuestionError: the question is empty, or leaves no room for a reply.
        """
        view = self.look(image_rgb, ahead=False)
        generation = self.ask(
            view,
            question,
            answer_format=answer_format,
            max_new_tokens=max_new_tokens,
            on_token=on_token,
            cancelled=cancelled,
        )
        return replace(generation, timings_ms={**view.timings_ms, **generation.timings_ms})

    def features(self, image_rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the vision tower makes of a picture, float32 [tokens, hidden] in raster order.

        Raises:
            ImageError: the picture is not uint8 [H, W, 3].
        """
        features: NDArray[np.float32] = self._features(self._patches(image_rgb))[0]
        return features

    def question_tokens(self, question: str, answer_format: AnswerFormat | None = None) -> list[int]:
        """Tokens from the picture's end to where the reply begins.

        Raises:
            QuestionError: the question is empty, or leaves no room for a reply.
        """
        form = answer_format or self.default_format
        if not form.normalise_question(question).strip():
            raise QuestionError("expected a question, got an empty one; say what to look for")
        try:
            question.encode()
        except UnicodeEncodeError as error:
            raise QuestionError(f"expected a question in Unicode, got a broken character at {error.start}") from error
        prompt = self.chat.question(form.user_prompt(question))
        room = self.manifest.max_length - len(self.prefix_tokens)
        if len(prompt) >= room:
            raise QuestionError(
                f"expected a question that leaves room for a reply, got one of {len(question)} characters "
                f"({len(prompt)} tokens of {room}); shorten it"
            )
        return prompt

    def _patches(self, image_rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """In window order, [1, patches, patch_dim]."""
        return self.preprocessor.patches(image_rgb, order=self.layout.patch_order)[None]

    def _empty_cache(self, picture: PictureSpan) -> tuple[KVCache, int]:
        """A cache for a new view, and how many of the prefix's tokens it holds: what stands before every picture.

        Allocating a cache and tying it to the graph takes longer than a token does, so they go from view to view.
        """
        try:
            cache = self._spare_caches.pop()
        except IndexError:
            return KVCache.create(self.decoder, cache_sizes(self.manifest), self.rotary, picture), 0
        cache.truncate(picture.start)
        return cache, picture.start

    def _take_back(self, cache: KVCache) -> None:
        """Keeps the cache of a view that is gone, if it was filled and none is kept yet."""
        if not self._spare_caches and cache.lengths[0] >= len(self.before_picture):
            self._spare_caches.append(cache)

    def _draft(self, runs: TokenRuns, cache: KVCache, answer_format: AnswerFormat, prompt: list[int]) -> Draft | None:
        """Guesses for one reply; None where they are switched off, or could change what is said."""
        if not self._draft_tokens:
            return None
        if self._rows_independent is None:  # found out once, at the first question
            different = [*dict.fromkeys(prompt)][-1 - DRAFT_TOKENS :]
            if len(different) < 4 or cache.lengths[0] + len(different) > cache.capacity:
                return None
            self._rows_independent = rows_are_independent(runs, cache, different)
        if not self._rows_independent:
            return None
        if answer_format not in self._drafters:
            end_token_id = self.manifest.eos_token_ids[0]
            self._drafters[answer_format] = Drafter.of_format(answer_format, self.chat.reply_start, end_token_id)
        return Draft(self._drafters[answer_format], prompt, self._draft_tokens)

    def _constraint(self, answer_format: AnswerFormat, started: list[int]) -> AnswerConstraint:
        """One reply's; the grammar itself is made at the first question in a format."""
        from segzero_rt.constrained import AnswerConstraint

        return AnswerConstraint(self.grammar(answer_format), started)

    def grammar(self, answer_format: AnswerFormat) -> GrammarTable:
        """The grammar of replies in a format, made once.

        Raises:
            BundleError: the tokenizer cannot spell such replies.
        """
        from segzero_rt.constrained import grammar_of

        if answer_format not in self._grammars:
            self._grammars[answer_format] = grammar_of(self.chat, answer_format, self.manifest)
        return self._grammars[answer_format]

    def _features(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.vision.run({"patches": patches, **self._layout_inputs})["image_features"]

    def embed(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Rows of the token table, float32 [1, tokens, hidden]."""
        return self.embedding.run({"input_ids": np.array([token_ids], dtype=np.int64)})["inputs_embeds"]


def is_small_decoder(graph: Path) -> bool:
    """Whether a decoder is so small that it runs best on one thread, beside which the other cores have time."""
    return graph.is_file() and graph_bytes(graph) < SMALL_DECODER_BYTES


class _Clock:
    """Milliseconds between laps, by name."""

    def __init__(self) -> None:
        self.timings_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.timings_ms[name] = (now - self._last) * 1e3
        self._last = now


def _default_draft(decoder: Graph) -> int:
    """None on a device, where nothing here has measured what a run of several tokens takes."""
    return DRAFT_TOKENS if decoder.backend.device == "cpu" else 0


def policy_specs(manifest: PolicyManifest) -> dict[str, GraphSpec]:
    """Specs of the three graphs of a policy of these sizes, by the names that the manifest gives their files."""
    return {
        "vision": vision_spec(
            patch_dim=3 * manifest.patch_size**2,
            head_dim=manifest.vision_head_dim,
            hidden_size=manifest.hidden_size,
            deepstack=manifest.deepstack,
            learned_positions=manifest.position_side > 0,
        ),
        "embedding": embedding_spec(hidden_size=manifest.hidden_size, deepstack=manifest.deepstack),
        "decoder": decoder_spec(
            flavour=manifest.flavour,
            num_layers=manifest.num_layers,
            num_kv_heads=manifest.num_kv_heads,
            head_dim=manifest.head_dim,
            hidden_size=manifest.hidden_size,
            vocab_size=manifest.vocab_size,
            cache_dtype=manifest.cache_dtype,
            deepstack=manifest.deepstack,
            max_length=manifest.max_length,
        ),
    }


def cache_sizes(manifest: PolicyManifest) -> CacheSizes:
    return CacheSizes(
        num_layers=manifest.num_layers,
        num_kv_heads=manifest.num_kv_heads,
        head_dim=manifest.head_dim,
        hidden_size=embeds_width(manifest.hidden_size, manifest.deepstack),
        vocab_size=manifest.vocab_size,
    )


def tell(piece: str, pieces: list[str], on_token: Callable[[str], None] | None) -> None:
    if piece:
        pieces.append(piece)
        if on_token is not None:
            on_token(piece)
