"""The attributes of accelerate's hooks that this library reads; accelerate documents neither.

tests/hotswap_lib/test_accelerate_internals.py fails with the reason when a new accelerate changes
one.
"""

from __future__ import annotations

import torch
from accelerate.hooks import CpuOffload, SequentialHook


def moves_weights(module: torch.nn.Module) -> bool:
    """True if a hook of accelerate brings this module's weights to a device on every call.

    accelerate has no public way to ask for a module's hook or for what the hook moves.
    """
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return any(isinstance(one, CpuOffload) or getattr(one, "offload", False) for one in hooks)


def moves_as_a_whole(model: torch.nn.Module) -> bool:
    """True after ``accelerate.cpu_offload_with_hook``, which moves a model from call to call."""
    return isinstance(getattr(model, "_hf_hook", None), CpuOffload)
