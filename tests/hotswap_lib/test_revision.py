from __future__ import annotations

import pickle

import pytest

from hotswap_lib import BASE, AdapterNameInvalid, Revision

DIGEST = "3f2a9c1d" + "0" * 56
REVISION = Revision("support-bot", DIGEST)


def test_a_revision_is_shown_with_eight_characters_of_its_digest() -> None:
    assert str(Revision("support-bot", "3f2a9c1d" + "0" * 56)) == "support-bot@3f2a9c1d"
    assert str(BASE) == "base@00000000"


@pytest.mark.parametrize("name", ["", "a b", "a@b", "a:b", "a\nb", "a\x00", "\t"])
def test_a_name_that_would_break_a_model_id_is_refused(name: str) -> None:
    with pytest.raises(AdapterNameInvalid):
        Revision(name, "0" * 64)


def test_a_digest_that_is_no_digest_is_refused() -> None:
    with pytest.raises(ValueError, match="64 hex"):
        Revision("x", "abc")


def test_revisions_are_values() -> None:
    revision = Revision("x", "1" * 64)
    assert revision == pickle.loads(pickle.dumps(revision)) == Revision("x", "1" * 64)
    assert len({revision, Revision("x", "1" * 64)}) == 1


def test_a_key_is_the_full_text_and_parses_back() -> None:
    assert REVISION.key == f"support-bot@{DIGEST}"
    assert Revision.parse(REVISION.key) == REVISION
    assert Revision.parse(BASE.key) == BASE


@pytest.mark.parametrize(
    "key", ["support-bot", "support-bot@3f2a9c1d", f"support-bot:{DIGEST}", ""]
)
def test_a_text_that_is_not_a_key_does_not_parse(key: str) -> None:
    with pytest.raises((ValueError, AdapterNameInvalid)):
        Revision.parse(key)


def test_a_key_without_a_name_does_not_parse() -> None:
    with pytest.raises(AdapterNameInvalid):
        Revision.parse(f"@{DIGEST}")


@pytest.mark.parametrize("pin", ["support-bot", "support-bot@3f2a9c1d", f"support-bot@{DIGEST}"])
def test_a_pin_is_the_name_or_the_name_with_a_short_or_full_digest(pin: str) -> None:
    assert REVISION.matches(pin)


@pytest.mark.parametrize(
    "pin", ["", "support", "support-bot@", "support-bot@3f2a", "other@3f2a9c1d", DIGEST]
)
def test_no_other_text_matches(pin: str) -> None:
    assert not REVISION.matches(pin)
