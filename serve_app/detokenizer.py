"""Tokens to text, piece by piece, so that the pieces add up to the whole text."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """For one stream. A character whose bytes are not complete yet is held back."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._sent = ""

    def step(self, token_ids: list[int]) -> str:
        """The text that these new tokens complete; may be empty."""
        backend = self._tokenizer.backend_tokenizer
        pieces = (self._stream.step(backend, token) for token in token_ids)
        text = "".join(piece for piece in pieces if piece)
        self._sent += text
        return text

    def rest(self, token_ids: list[int]) -> str:
        """What is missing at the end, given all tokens: bytes that never became a character."""
        whole: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return whole.removeprefix(self._sent) if whole.startswith(self._sent) else ""
