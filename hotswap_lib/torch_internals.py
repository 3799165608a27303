"""Every private attribute of torch that this library uses, each behind one function.

tests/hotswap_lib/test_torch_internals.py fails with the reason when a new torch changes one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch


def is_compiled(module: torch.nn.Module) -> bool:
    """True after ``torch.compile(module)`` and ``module.compile()``; torch has no public test."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside ``torch.compile``'s wrapper, or the model itself.

    The wrapper has no public attribute for the module that it wraps.
    """
    inner: torch.nn.Module = getattr(model, "_orig_mod", model)
    return inner


def is_wrapper_of(held: object, module: object) -> bool:
    """True if ``held`` is ``torch.compile``'s wrapper around ``module``; see `unwrap`."""
    return getattr(held, "_orig_mod", None) is module


def parameters(module: torch.nn.Module) -> Mapping[str, torch.nn.Parameter | None]:
    """A module's own parameters, as the live dict.

    ``named_parameters`` builds a list on each call. A commit has to look up single names in
    microseconds, and to see a later rebinding.
    """
    return module._parameters


def buffers(module: torch.nn.Module) -> Mapping[str, torch.Tensor | None]:
    """A module's own buffers, as the live dict; see `parameters`."""
    return module._buffers


def children(module: torch.nn.Module) -> Mapping[str, torch.nn.Module | None]:
    """A module's own submodules, as the live dict; see `parameters`."""
    return module._modules


def is_saved_buffer(module: torch.nn.Module, name: str) -> bool:
    """True if ``state_dict`` contains this buffer; only a private set tells them apart."""
    return name in module._buffers and name not in module._non_persistent_buffers_set


def with_parameters(
    module: torch.nn.Module, values: Mapping[str, torch.Tensor | None]
) -> torch.nn.Module:
    """A shallow copy of the module that computes with other parameters.

    ``torch.func.functional_call`` only calls a module, and PEFT's functions take one.
    """
    other = copy.copy(module)
    other._parameters = {**dict.fromkeys(module._parameters), **values}  # type: ignore[dict-item]
    return other


def freezes_weights() -> bool:
    """True while inductor copies weights into compiled code.

    The setting is only in ``torch._inductor.config``.
    """
    import torch._inductor.config as inductor

    return bool(inductor.freezing)


def compiled_graphs() -> int:
    """Graphs that dynamo has compiled in this process, in any thread.

    Dynamo's counters are private. ``stats/unique_graphs`` grows with every graph, the first one
    of a function included.
    """
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def recompile_limit_hits() -> int:
    """Functions that fell back to eager in this process because a recompile limit was hit.

    Each one leaves its message in dynamo's private counters, under ``unimplemented``.
    """
    from torch._dynamo.utils import counters

    # list(): another thread may compile, and count, while this one reads
    messages = list(counters["unimplemented"].items())
    return sum(count for message, count in messages if "recompile limit exceeded" in message)
