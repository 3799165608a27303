"""Settings: values that are accepted, and one sentence for each that is not."""

from __future__ import annotations

import pickle

import pytest

from serve_app.settings import InvalidSettings, Settings, parse


def test_by_default_two_replicas_serve_the_embedded_model() -> None:
    settings = parse({})
    assert (settings.model, settings.replicas, settings.adapter) == ("embedded", 2, None)
    assert settings.model_name == "SmolLM2-135M-Instruct"


def test_every_setting_has_a_description() -> None:
    fields = Settings.model_fields
    assert [name for name, field in fields.items() if not field.description] == []


def test_words_of_a_command_line_become_numbers_and_truths() -> None:
    words = {"replicas": "3", "compile": "false", "poll_s": "0.5", "num_gpus": "0"}
    settings = parse(words)
    assert (settings.replicas, settings.compile, settings.poll_s) == (3, False, 0.5)
    assert settings.num_gpus == 0.0


def test_settings_that_were_parsed_already_come_back_as_they_are() -> None:
    settings = Settings(replicas=1)
    assert parse(settings) is settings


def test_an_unknown_setting_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(InvalidSettings) as refused:
        parse({"replica": 2})
    sentence = str(refused.value)
    assert sentence.startswith("settings refused: there is no setting 'replica' (there are ")
    assert "replicas" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replicas", 0),
        ("replicas", "two"),
        ("replicas", 1.5),
        ("dtype", "float8"),
        ("max_rank", 0),
        ("max_rank", 2000),
        ("poll_s", 0),
        ("poll_s", 61),
        ("poll_s", "nan"),
        ("drain_timeout_s", "nan"),
        ("start_timeout_s", -1),
        ("num_gpus", -1),
        ("model", ""),
        ("model", "   "),
        ("admin_token", ""),
        ("compile", "perhaps"),
        ("max_model_len", 1),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_setting(name: str, value: object) -> None:
    with pytest.raises(InvalidSettings) as refused:
        parse({name: value})
    assert str(refused.value).startswith(f"settings refused: {name}={value!r}: ")


def test_every_wrong_setting_is_named_not_only_the_first() -> None:
    with pytest.raises(InvalidSettings, match=r"dtype='x': .*; replicas=0: "):
        parse({"replicas": 0, "dtype": "x"})


def test_a_refusal_survives_pickle() -> None:
    with pytest.raises(InvalidSettings) as refused:
        parse({"replicas": 0})
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"model": "org/Tiny-1B"}, "Tiny-1B"),
        ({"model": "/models/tiny/"}, "tiny"),
        ({"model": "org/Tiny", "served_model_name": "mine"}, "mine"),
    ],
)
def test_clients_call_the_model_by_its_last_part_or_as_the_operator_says(
    values: dict[str, str], name: str
) -> None:
    assert parse(dict(values)).model_name == name


def test_a_replica_counts_as_gone_after_three_polls_of_silence_and_not_too_soon() -> None:
    assert Settings(poll_s=4).silence_s == 12.0
    assert Settings(poll_s=0.1).silence_s == 5.0, "a busy node may stall a replica for a second"
