"""Each undocumented part of accelerate that the library reads is still there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hotswap_lib import accelerate_internals

# imported like this because it has no types
accelerate: Any = pytest.importorskip("accelerate")


def test_a_module_that_accelerate_offloads_is_recognised() -> None:
    module = torch.nn.Linear(2, 2)
    accelerate.cpu_offload(torch.nn.Sequential(module), execution_device=torch.device("cpu"))
    assert accelerate_internals.moves_weights(module), (
        "accelerate no longer keeps its hook in _hf_hook, or AlignDevicesHook its offload: "
        "see moves_weights"
    )
    hook = accelerate.hooks.AlignDevicesHook(io_same_device=True)
    accelerate.hooks.add_hook_to_module(module, hook, append=True)
    assert isinstance(vars(module)["_hf_hook"], accelerate.hooks.SequentialHook)
    assert accelerate_internals.moves_weights(module), (
        "accelerate no longer joins hooks in SequentialHook.hooks: see moves_weights"
    )


def test_a_model_that_moves_as_a_whole_is_recognised() -> None:
    model, _ = accelerate.cpu_offload_with_hook(torch.nn.Linear(2, 2), execution_device="cpu")
    assert accelerate_internals.moves_as_a_whole(model), (
        "accelerate no longer keeps CpuOffload in _hf_hook: see moves_as_a_whole"
    )


def test_modules_that_stay_are_not_mistaken() -> None:
    plain, hooked = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    accelerate.hooks.add_hook_to_module(
        hooked, accelerate.hooks.AlignDevicesHook(torch.device("cpu"))
    )
    for module in (plain, hooked):
        assert not accelerate_internals.moves_weights(module)
        assert not accelerate_internals.moves_as_a_whole(module)
