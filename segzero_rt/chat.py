"""Text in and out of a policy: the chat template of Qwen2.5-VL as token numbers, and tokens back to text as they come.

What a user wrote can never become a special token: it is encoded with special tokens switched off, so that
"<|im_end|>" in a question is just ten characters to the policy.
"""

from __future__ import annotations

from pathlib import Path

from segzero_rt.errors import BundleError
from segzero_rt.tokenizer import Tokenizer

_SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Chat:
    """Encodes the turns of one question and decodes the reply.

    Raises:
        BundleError: the file is no tokenizer, or lacks a token that the template needs.
    """

    def __init__(self, tokenizer_path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(tokenizer_path)
        for token in _SPECIAL_TOKENS:
            if self._tokenizer.token_to_id(token) is None:
                raise BundleError(f"expected the special token {token} in {tokenizer_path}, got none")
        self.image_token_id = self._tokenizer.encode("<|image_pad|>", special=True)[0]

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def token_bytes(self) -> list[bytes | None]:
        """Of each token number up to the last, its bytes in a reply; None for special tokens and unused numbers."""
        return [self._tokenizer.token_bytes(number) for number in range(self._tokenizer.end)]

    def before_picture(self, system_prompt: str) -> list[int]:
        """Tokens up to the picture's first."""
        return [
            *self._template("<|im_start|>system\n"),
            *self._user_text(system_prompt),
            *self._template("<|im_end|>\n<|im_start|>user\n<|vision_start|>"),
        ]

    def after_picture(self) -> list[int]:
        """The token that closes the picture."""
        return self._template("<|vision_end|>")

    def question(self, user_prompt: str) -> list[int]:
        """Tokens from the closed picture to the first token of the reply."""
        return [*self._user_text(user_prompt), *self._template("<|im_end|>\n<|im_start|>assistant\n")]

    def reply_start(self, text: str) -> list[int]:
        """Tokens of what a reply is made to begin with."""
        return self._user_text(text)

    def text(self, token_ids: list[int]) -> str:
        """Plain text of tokens; special tokens are left out."""
        return self._tokenizer.decode(token_ids)

    def _template(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=True)

    def _user_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)


class TextStream:
    """Text of a reply, piece by piece, never half a character.

    A token may hold a part of a character, and how it reads can depend on the token before it. So the last few tokens
    are decoded again with each new one, and a piece that ends in an unfinished character waits for the next token.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._tokens: list[int] = []
        self._context = 0
        """First token that is decoded again."""
        self._told = 0
        """Tokens whose text has been given out."""

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is now certain, often one word, sometimes nothing."""
        self._tokens.append(token_id)
        known = self._chat.text(self._tokens[self._context : self._told])
        text = self._chat.text(self._tokens[self._context :])
        if text.endswith(_UNFINISHED):
            return ""
        self._context, self._told = self._told, len(self._tokens)
        return text[len(known) :]

    def finish(self) -> str:
        """What is left when no token follows: at most one unfinished character."""
        known = self._chat.text(self._tokens[self._context : self._told])
        rest = self._chat.text(self._tokens[self._context :])[len(known) :]
        self._context, self._told = self._told, len(self._tokens)
        return rest

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self._tokens)
