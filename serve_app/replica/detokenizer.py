"""Tokens to text, piece by piece, and the name of a single token."""

from __future__ import annotations

import re
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

_BROKEN = "\ufffd"  # what decoders put where bytes are no character, or not yet
_HELD_TOKENS = 8  # more than the bytes of any character
_CHARACTER_TOKENS = 3  # so many of the last tokens can still become one character with the next


class Detokenizer:
    """For one stream. A character whose bytes are not complete yet is held back.

    Decoded is always a short window: the tokens of the last piece, since a token's text can depend
    on what stands before it, and the tokens that are held back. So a token costs the same wherever
    it stands, also in a long run of bytes that never become a character.
    """

    def __init__(self, tokenizer: Any) -> None:
        # without transformers' wrapper where there is one: three times faster, for each token
        self._backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []

    def step(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        self._held.append(token_id)
        text = self._text()
        if text and not text.endswith(_BROKEN):
            self._say(len(self._held))
            return text
        if len(self._held) <= _HELD_TOKENS:
            return ""
        if not text:  # a run of tokens that are not text; the context stays
            self._held.clear()
            return ""
        rest = self._held[-_CHARACTER_TOKENS:]
        del self._held[-_CHARACTER_TOKENS:]
        text = self._text()
        self._say(len(self._held))
        self._held = rest
        return text

    def rest(self) -> str:
        """What is missing at the end: bytes that never became a character."""
        text = self._text()
        self._held.clear()
        return text

    def _text(self) -> str:
        """The text of the tokens that are held back."""
        text = self._decode(self._context + self._held)
        if text.startswith(self._context_text):
            return text.removeprefix(self._context_text)
        return self._decode(self._held)  # decoders may take back a character; this one is sent

    def _say(self, tokens: int) -> None:
        self._context, self._held = self._held[:tokens], self._held[tokens:]
        self._context_text = self._decode(self._context)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text


class TokenNames:
    """What one token by itself is called: its text, and its bytes.

    A token that is a part of a character is called as OpenAI calls it: ``bytes:\\xe2\\x82``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}  # at most the vocabulary

    def __call__(self, token_id: int) -> tuple[str, bytes]:
        if token_id not in self._known:
            self._known[token_id] = self._name(token_id)
        return self._known[token_id]

    def _name(self, token_id: int) -> tuple[str, bytes]:
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        raw: str = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        data = _raw_bytes(raw) if _BROKEN in text else None
        if data is not None and not _is_text(data):
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
        if raw.startswith("▁") and not text.startswith(" "):
            text = f" {text}"  # sentencepiece decoders drop the first space of a text
        return text, text.encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: bytes that print stand for themselves, the others come after 255."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    table = {chr(byte): byte for byte in printed}
    table |= {chr(256 + i): byte for i, byte in enumerate(others)}
    assert table.keys() == set(ByteLevel.alphabet())
    return table


_BYTE_OF_CHAR = _byte_of_char()
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _raw_bytes(raw: str) -> bytes | None:
    """The bytes that a vocabulary entry stands for; None when that cannot be told."""
    if match := _BYTE_FALLBACK.fullmatch(raw):
        return bytes([int(match[1], 16)])
    if all(char in _BYTE_OF_CHAR for char in raw):
        return bytes(_BYTE_OF_CHAR[char] for char in raw)
    return None


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
