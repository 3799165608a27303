"""The envelope: the bounds of the adapters that a slot accepts. Needs no torch.

It is chosen once, before the layout, for all adapters to come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import InvalidEnvelope

if TYPE_CHECKING:
    import torch

_DTYPES = {"float16", "bfloat16", "float32", "float64"}
_BIASES = {"none", "lora_only", "all"}


@dataclass(frozen=True, slots=True)
class Envelope:
    """The bounds that every adapter of a slot keeps; the fields have LoraConfig's names.

    Args:
        max_rank: the highest rank; lower ranks are padded with zeros up to it.
        target_modules: module names or suffixes, a regular expression, or ``"all-linear"``.
        modules_to_save: modules whose full weights adapters may replace.
        use_dora: True if adapters may use DoRA.
        bias: the biases that adapters may replace: ``"none"``, ``"lora_only"`` or ``"all"``.
        lora_bias: True if adapters may have a bias on lora_B.
        dtype: the slot's dtype, as ``torch.bfloat16`` or ``"bfloat16"``; None follows PEFT,
            which keeps LoRA weights in float32 over a 16 bit base model.

    Raises:
        InvalidEnvelope: names the field and the rule.
    """

    max_rank: int
    target_modules: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] | None = None
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    dtype: str | None = None

    def __init__(
        self,
        max_rank: int,
        target_modules: str | list[str] | tuple[str, ...] | set[str] = "all-linear",
        modules_to_save: list[str] | tuple[str, ...] | None = None,
        *,
        use_dora: bool = False,
        bias: str = "none",
        lora_bias: bool = False,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        if not isinstance(target_modules, str):
            # sorted, because a set has no order and equal envelopes must be equal
            target_modules = tuple(sorted(target_modules))
        if isinstance(modules_to_save, str):
            raise InvalidEnvelope("modules_to_save", f"is a list of names, not {modules_to_save!r}")
        if dtype is not None:
            dtype = str(dtype).removeprefix("torch.")
        for field, value in {
            "max_rank": max_rank,
            "target_modules": target_modules,
            "modules_to_save": tuple(sorted(modules_to_save)) if modules_to_save else None,
            "use_dora": use_dora,
            "bias": bias,
            "lora_bias": lora_bias,
            "dtype": dtype,
        }.items():
            object.__setattr__(self, field, value)
        self._check()

    def _check(self) -> None:
        if isinstance(self.max_rank, bool) or not isinstance(self.max_rank, int):
            raise InvalidEnvelope("max_rank", f"is a whole number, not {self.max_rank!r}")
        if self.max_rank < 1:
            raise InvalidEnvelope("max_rank", f"is 1 or more, not {self.max_rank}")
        if not self.target_modules:
            raise InvalidEnvelope("target_modules", "names at least one module")
        for field in ("use_dora", "lora_bias"):
            if not isinstance(getattr(self, field), bool):
                raise InvalidEnvelope(field, f"is true or false, not {getattr(self, field)!r}")
        if self.bias not in _BIASES:
            raise InvalidEnvelope("bias", f"is one of {sorted(_BIASES)}, not {self.bias!r}")
        if self.use_dora and self.lora_bias:
            raise InvalidEnvelope("lora_bias", "PEFT has no layers with both DoRA and lora_bias")
        if self.bias == "all" and self.modules_to_save:
            raise InvalidEnvelope("bias", "'all' and modules_to_save would store some biases twice")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise InvalidEnvelope("dtype", f"is one of {sorted(_DTYPES)}, not {self.dtype!r}")
