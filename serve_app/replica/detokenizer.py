"""Token ids to text, piece by piece, and the name of a single token.

`Detokenizer` is not `tokenizers.decoders.DecodeStream`, which was tried and lacks four things. Each
is held by a test in tests/serve_app/replica/test_detokenizer.py.

- The text that is still held back at the end cannot be read
  (`test_bytes_that_never_become_a_character_come_at_the_end`).
- A run of bytes that never become a character is decoded again with each token: 4,000 of them take
  4.6 s instead of 0.06 s (`test_a_long_run_of_broken_bytes_costs_the_same_for_each_token`).
- It raises where a decoder takes back a character
  (`test_a_decoder_that_takes_back_a_character_breaks_nothing`).
- It needs a tokenizer of the `tokenizers` library (`test_a_tokenizer_in_python_works_too`).
"""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BROKEN = "\ufffd"  # decoders put it where bytes are not a character, or not yet
_HELD_TOKENS = 8  # more than the bytes of any character
_CHARACTER_TOKENS = 3  # up to this many last tokens can still become a character with the next one
_BYTE_OF_CHAR = {char: byte for byte, char in bytes_to_unicode().items()}
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class Detokenizer:
    """Decodes one stream of tokens. Holds back a character whose bytes are not complete yet.

    It decodes a short window only: the tokens of the last piece, because the text of a token can
    depend on the tokens before it, and the tokens that are held back. So each token costs the same,
    also in a long run of bytes that never become a character.
    """

    def __init__(self, tokenizer: Any) -> None:
        # transformers' wrapper, where there is one, makes each call three times slower
        self._backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []

    def step(self, token_id: int) -> str:
        """Returns the text that this token completes. It may be empty."""
        self._held.append(token_id)
        text = self._held_text()
        if text and not text.endswith(_BROKEN):
            self._release(len(self._held))
            return text
        if len(self._held) <= _HELD_TOKENS:
            return ""
        if not text:  # a run of special tokens; the context stays
            self._held.clear()
            return ""
        rest = self._held[-_CHARACTER_TOKENS:]
        del self._held[-_CHARACTER_TOKENS:]
        text = self._held_text()
        self._release(len(self._held))
        self._held = rest
        return text

    def rest(self) -> str:
        """Returns the text that is held back at the end: bytes that never became a character."""
        text = self._held_text()
        self._held.clear()
        return text

    def _held_text(self) -> str:
        text = self._decode(self._context + self._held)
        if text.startswith(self._context_text):
            return text.removeprefix(self._context_text)
        return self._decode(self._held)  # the decoder takes back a character that was sent already

    def _release(self, tokens: int) -> None:
        """Makes the first `tokens` held tokens the context of those that follow."""
        self._context, self._held = self._held[:tokens], self._held[tokens:]
        self._context_text = self._decode(self._context)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text


class TokenNames:
    """The name of a single token: its text, and its bytes.

    A token that is a part of a character has the name that OpenAI gives it: ``bytes:\\xe2\\x82``.
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


def _raw_bytes(raw: str) -> bytes | None:
    """Returns the bytes of a vocabulary entry, or None if it is in no alphabet of bytes."""
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
