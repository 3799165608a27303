from __future__ import annotations

import inspect
import pickle

import pytest

import hotswap_lib
from hotswap_lib import HotswapError, errors

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, HotswapError)
]


def make(cls: type[HotswapError]) -> HotswapError:
    parameters = inspect.signature(cls.__init__).parameters
    if "args" in parameters:
        return cls("something")
    numbers = {"recompiles": 3, "limit_hits": 1}
    return cls(*(numbers.get(name, f"a {name}") for name in list(parameters)[1:]))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_pickle_with_its_facts_and_its_sentence(
    cls: type[HotswapError],
) -> None:
    error = make(cls)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert copy.args == error.args
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_drawn_in_the_tree_with_its_code(cls: type[HotswapError]) -> None:
    tree = {line.split()[-2]: line.split()[-1] for line in errors.__doc__.splitlines() if line}
    if cls is not HotswapError:
        assert tree[cls.__name__] == cls.code


def test_every_error_is_public_and_has_its_own_code() -> None:
    assert {cls.__name__ for cls in CLASSES} <= set(hotswap_lib.__all__)
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)


def test_a_refusal_is_one_sentence_with_adapter_tensor_and_rule() -> None:
    error = errors.ShapeMismatch("support-bot", "q.lora_A.weight", "its shape is wrong")
    assert str(error) == "adapter 'support-bot', tensor 'q.lora_A.weight': its shape is wrong"
    assert (error.adapter, error.tensor, error.rule) == error.args
