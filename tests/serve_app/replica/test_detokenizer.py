"""Tokens to text: pieces that add up to what the tokenizer decodes at once, in linear time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from serve_app.replica.detokenizer import Detokenizer, TokenNames

EURO = [0xE2, 0x82, 0xAC]


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """As Llama 2 has it: words with a leading ▁, and bytes for what is no word."""
    vocabulary = {"<unk>": 0, "<s>": 1, "▁hello": 2, "▁world": 3, "▁": 4, "a": 5}
    vocabulary |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.step(id) for id in ids), detokenizer.rest()]


def bytes_ids(tokenizer: Any, data: bytes) -> list[int]:
    """The tokens of these bytes, valid text or not."""
    names = TokenNames(tokenizer)
    of_byte = {names(id)[1]: id for id in range(256)}
    return [of_byte[bytes([byte])] for byte in data]


@settings(deadline=None)  # a busy machine is no failure
@given(data=st.data())
def test_pieces_add_up_to_what_is_decoded_at_once(tokenizer: Any, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 259), max_size=60))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(deadline=None)  # a busy machine is no failure
@given(text=st.text())
def test_every_text_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == text


def test_a_character_comes_with_the_last_of_its_bytes(tokenizer: Any) -> None:
    ids = bytes_ids(tokenizer, "a€b🦜".encode())
    assert pieces(tokenizer, ids) == ["a", "", "", "€", "b", "", "", "", "🦜", ""]


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer: Any) -> None:
    assert pieces(tokenizer, bytes_ids(tokenizer, b"a\xe2\x82")) == ["a", "", "", "\ufffd"]


class CountingTokenizer:
    """Remembers how many tokens it decoded at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.decoded: list[int] = []

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        self.decoded.append(len(ids))
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


@pytest.mark.parametrize("byte", [b"\x80", b"\xff", b"\xe2"])
def test_a_long_run_of_broken_bytes_costs_the_same_for_each_token(
    tokenizer: Any, byte: bytes
) -> None:
    ids = bytes_ids(tokenizer, byte * 50 + "€".encode())
    counting = CountingTokenizer(tokenizer)
    assert "".join(pieces(counting, ids)) == tokenizer.decode(ids)
    assert max(counting.decoded) < 20


def test_a_long_run_of_special_tokens_says_nothing_and_keeps_what_stood_before(
    sentencepiece: Any,
) -> None:
    ids = [2, *[1] * 50, 3]
    assert "".join(pieces(sentencepiece, ids)) == "hello world"


def test_a_decoder_that_takes_back_a_character_breaks_nothing(sentencepiece: Any) -> None:
    ids = [2, *bytes_of(EURO), 6 + 0xFF, 5]  # with the 0xFF all four bytes decode to nothing
    assert "".join(pieces(sentencepiece, ids)) == "hello€\ufffda"
    stream, backend = DecodeStream(skip_special_tokens=True), sentencepiece.backend_tokenizer
    for id in ids[:-1]:
        stream.step(backend, id)
    with pytest.raises(Exception, match="Invalid prefix"):  # why DecodeStream is not used
        stream.step(backend, ids[-1])


def test_a_tokenizer_in_python_works_too() -> None:
    tokenizer = ByT5Tokenizer()
    assert not hasattr(tokenizer, "backend_tokenizer")
    ids = tokenizer("a€b", add_special_tokens=False)["input_ids"]
    assert pieces(tokenizer, ids) == ["a", "", "", "€", "b", ""]


def bytes_of(data: list[int]) -> list[int]:
    return [6 + byte for byte in data]


def test_a_token_is_called_by_its_text(tokenizer: Any, sentencepiece: Any) -> None:
    [id] = tokenizer("a")["input_ids"]
    assert TokenNames(tokenizer)(id) == ("a", b"a")
    assert TokenNames(tokenizer)(259) == ("<e>", b"<e>")
    assert TokenNames(sentencepiece)(3) == (" world", b" world")


def test_a_part_of_a_character_is_called_by_its_bytes(tokenizer: Any, sentencepiece: Any) -> None:
    [id] = bytes_ids(tokenizer, b"\xe2")
    assert TokenNames(tokenizer)(id) == (r"bytes:\xe2", b"\xe2")
    assert TokenNames(sentencepiece)(6 + 0xE2) == (r"bytes:\xe2", b"\xe2")


def test_a_token_that_the_tokenizer_does_not_know_has_no_name(tokenizer: Any) -> None:
    assert TokenNames(tokenizer)(100_000) == ("", b"")
