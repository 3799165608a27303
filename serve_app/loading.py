"""From settings to a prepared model: load the base, its tokenizer, and make it swappable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hotswap_lib import Envelope, Slot, prepare

from . import embedded
from .settings import EMBEDDED, Settings


class UnsupportedModel(Exception):
    """The base model is one that the engine cannot serve; nothing was started."""

    code = "unsupported_model"

    def __init__(self, model: str, why: str) -> None:
        super().__init__(model, why)
        self.model, self.why = model, why

    def __str__(self) -> str:
        return f"the model {self.model} cannot be served: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    slot: Slot
    tokenizer: Any
    eos_token_ids: list[int]


def check(settings: Settings) -> None:
    """Say now what `load` would say later, from the model's config alone.

    Raises `UnsupportedModel` for anything but a causal language model that can be found.
    """
    if settings.model == EMBEDDED:
        embedded.check()
        return
    try:
        config = AutoConfig.from_pretrained(settings.model, **_hub(settings))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(settings.model, str(error).splitlines()[0]) from error
    if not _is_causal(config):
        why = f"{config.model_type} is not a causal language model"
        raise UnsupportedModel(settings.model, why)


def envelope(settings: Settings) -> Envelope:
    """What the fleet's adapters may be.

    Raises:
        InvalidEnvelope: two of the settings exclude each other.
    """
    targets, saved = settings.target_modules, settings.modules_to_save
    return Envelope(
        max_rank=settings.max_rank,
        target_modules=targets if targets == "all-linear" else _names(targets),
        modules_to_save=None if saved is None else _names(saved),
        use_dora=settings.use_dora,
        lora_bias=settings.lora_bias,
        bias=settings.bias,
    )


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def load(settings: Settings) -> Loaded:
    """Load on the best device this process sees, and prepare for the settings' envelope."""
    check(settings)
    path = str(embedded.base_model_path()) if settings.model == EMBEDDED else settings.model
    hub = _hub(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=settings.dtype, attn_implementation="sdpa", **hub
    ).to(device)
    tokenizer = AutoTokenizer.from_pretrained(path, **hub)
    slot = prepare(model, envelope=envelope(settings))
    return Loaded(slot=slot, tokenizer=tokenizer, eos_token_ids=_eos_token_ids(model, tokenizer))


def _is_causal(config: Any) -> bool:
    """Whether it reads from left to right. Encoders have a causal head as well, when asked for."""
    encoder = type(config) in AutoModelForMaskedLM._model_mapping
    if config.is_encoder_decoder or (encoder and not getattr(config, "is_decoder", False)):
        return False
    return type(config) in AutoModelForCausalLM._model_mapping


def _hub(settings: Settings) -> dict[str, Any]:
    return {
        "revision": settings.model_revision,
        "trust_remote_code": settings.trust_remote_code,
    }


def _eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Where an answer ends: the generation config's word, and the tokenizer's own."""
    eos = model.generation_config.eos_token_id
    ids = set(eos if isinstance(eos, list) else [eos])
    return sorted((ids | {tokenizer.eos_token_id}) - {None})
