"""Each private part of torch that the library uses still works as the library expects."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hotswap_lib import torch_internals


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_module_is_recognised_and_unwrapped() -> None:
    plain, in_place = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    in_place.compile(backend="eager")
    wrapper: Any = torch.compile(plain, backend="eager")
    assert not torch_internals.is_compiled(plain)
    assert torch_internals.is_compiled(in_place), (
        "torch no longer sets _compiled_call_impl in Module.compile: see is_compiled"
    )
    assert torch_internals.is_compiled(wrapper), (
        "torch.compile's wrapper no longer has _orig_mod: see is_compiled"
    )
    assert torch_internals.unwrap(wrapper) is plain
    assert torch_internals.unwrap(plain) is plain
    assert torch_internals.is_wrapper_of(wrapper, plain)
    assert not torch_internals.is_wrapper_of(plain, plain)


def test_a_modules_own_dicts_show_what_is_bound_later() -> None:
    module = torch.nn.BatchNorm1d(2)
    parent = torch.nn.Sequential(module)
    parameters, buffers = torch_internals.parameters(module), torch_internals.buffers(module)
    children = torch_internals.children(parent)
    module.weight = torch.nn.Parameter(torch.zeros(2))
    module.running_mean = torch.ones(2)
    parent[0] = other = torch.nn.Identity()
    message = "torch.nn.Module no longer keeps {0} in {0}: see hotswap_lib/torch_internals.py"
    assert parameters["weight"] is module.weight, message.format("_parameters")
    assert buffers["running_mean"] is module.running_mean, message.format("_buffers")
    assert children["0"] is other, message.format("_modules")


def test_buffers_that_state_dict_leaves_out_are_known() -> None:
    module = torch.nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("left_out", torch.zeros(1), persistent=False)
    known = {name for name in ("kept", "left_out") if torch_internals.is_saved_buffer(module, name)}
    assert known == set(module.state_dict()), (
        "torch no longer lists buffers in _non_persistent_buffers_set: see is_saved_buffer"
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_module_computes_with_other_parameters_and_is_left_alone(bias: bool) -> None:
    module = torch.nn.Linear(2, 3, bias=False)
    before = module.weight
    values: dict[str, torch.Tensor | None] = {"weight": torch.ones(3, 2)}
    if bias:
        values["bias"] = torch.ones(3)
    other = torch_internals.with_parameters(module, values)
    assert torch.equal(other(torch.ones(2)), torch.full((3,), 3.0 if bias else 2.0)), (
        "a copy of a module no longer computes with replaced _parameters: see with_parameters"
    )
    assert module.weight is before


def test_freezing_is_seen() -> None:
    import torch._inductor.config as inductor

    assert not torch_internals.freezes_weights()
    patched: Any = inductor
    with patched.patch(freezing=True):
        assert torch_internals.freezes_weights(), (
            "torch._inductor.config.freezing was moved: see freezes_weights"
        )


def test_dynamos_counters_count_graphs_and_limits() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    compiled = torch.compile(double, backend="eager", dynamic=False)
    graphs, limits = torch_internals.compiled_graphs(), torch_internals.recompile_limit_hits()
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(torch.ones(1))
        assert torch_internals.compiled_graphs() == graphs + 1, (
            "dynamo no longer counts graphs in counters['stats']['unique_graphs']: "
            "see compiled_graphs"
        )
        compiled(torch.ones(2))
    assert torch_internals.recompile_limit_hits() == limits + 1, (
        "dynamo no longer counts 'recompile limit exceeded' in counters['unimplemented']: "
        "see recompile_limit_hits"
    )
