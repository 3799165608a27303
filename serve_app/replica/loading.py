"""From settings to a prepared model: loads the base and its tokenizer, and prepares a slot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from hotswap_lib import BASE, Envelope, Slot, load_adapter, prepare
from serve_app.engine.pooling import Pooling
from serve_app.replica import embedded_model as embedded
from serve_app.replica.model_task import Task, UnsupportedModel, architecture, auto_class, task_of
from serve_app.replica.pooling_config import pooling_of
from serve_app.settings import EMBEDDED, Settings

__all__ = ["Loaded", "Task", "UnsupportedModel", "check", "envelope", "load", "task_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A prepared model and the facts that its engine needs.

    Attributes:
        pooling: how token vectors become one embedding; None unless the task is `embed`.
        labels: the names of the classes; empty unless the task is `classify`.
        eos_token_ids: tokens that end an answer; empty for tasks that do not generate.
    """

    slot: Slot
    tokenizer: Any
    task: Task
    eos_token_ids: list[int]
    pooling: Pooling | None
    labels: tuple[str, ...]


def check(settings: Settings) -> None:
    """Raises the errors of `load` that the model's config alone can show, in seconds.

    Raises:
        UnsupportedModel: the model cannot be found, cannot do its task, or has no classifier head
            and adapters do not bring one.
        AdapterRefused: the adapter brings the head and cannot be read.
    """
    if settings.model == EMBEDDED:
        embedded.check()
        return
    _config(settings, settings.model)


def envelope(settings: Settings) -> Envelope:
    """Returns the envelope of the settings: the adapters that this fleet can load.

    Raises:
        InvalidEnvelope: two of the settings contradict each other.
    """
    targets = settings.target_modules
    return Envelope(
        max_rank=settings.max_rank,
        target_modules=targets if targets == "all-linear" else _names(targets),
        modules_to_save=_saved(settings) or None,
        use_dora=settings.use_dora,
        lora_bias=settings.lora_bias,
        bias=settings.bias,
    )


def load(settings: Settings) -> Loaded:
    """Loads the model on the GPU, or else the CPU, and prepares it for the envelope.

    Raises the errors of `check`.
    """
    path = str(embedded.base_model_path()) if settings.model == EMBEDDED else settings.model
    config, task, pooling = _config(settings, path)
    hub = _hub(settings)
    tokenizer = AutoTokenizer.from_pretrained(path, **hub)
    model = _model(settings, path, config, task)
    if task == "classify" and config.get_text_config().pad_token_id is None:
        # decoders classify by the last token that is not padding, in training as well
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = 0 if pad is None else pad
    slot = prepare(model, envelope=envelope(settings))
    return Loaded(
        slot=slot,
        tokenizer=tokenizer,
        task=task,
        eos_token_ids=_eos_token_ids(model, tokenizer) if task in ("causal", "seq2seq") else [],
        pooling=pooling,
        labels=_labels(model.config) if task == "classify" else (),
    )


def _config(settings: Settings, path: str) -> tuple[Any, Task, Pooling | None]:
    """Returns the model's config with the number of labels that adapters have, task and pooling."""
    try:
        config = AutoConfig.from_pretrained(path, **_hub(settings))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(settings.model, str(error).splitlines()[0]) from error
    task = task_of(config, settings)
    if task == "classify":
        _fit_head(config, settings)
    return config, task, pooling_of(config, settings, path) if task == "embed" else None


def _fit_head(config: Any, settings: Settings) -> None:
    """Sets the number of labels of a classifier whose head comes with the adapters."""
    head = _head(config, settings)
    brought = [name for name in head if _is_saved(name, settings)]
    if not architecture(config).endswith("ForSequenceClassification"):
        _refuse_random(settings, set(head) - set(brought))
    if brought and settings.adapter not in (None, BASE.name):
        assert settings.adapter is not None
        tensors = load_adapter(settings.adapter, name=settings.adapter_name).tensors
        last = [name for name, dimensions in head.items() if dimensions == 2][-1:]
        for name in last:
            weight = tensors.get(f"base_model.model.{name}")
            if weight is not None:
                config.num_labels = weight.shape[0]  # and `id2label`, unless it has as many


def _head(config: Any, settings: Settings) -> dict[str, int]:
    """Returns the parameters of a classifier's head, in order: name -> number of dimensions."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            config, trust_remote_code=settings.trust_remote_code
        )
    base = f"{model.base_model_prefix}."
    return {n: p.dim() for n, p in model.named_parameters() if not n.startswith(base)}


def _model(settings: Settings, path: str, config: Any, task: Task) -> Any:
    """Returns the base model with its weights. A head that adapters bring has zeros."""
    model, report = auto_class(config, task).from_pretrained(
        path,
        config=config,
        dtype=settings.dtype,
        ignore_mismatched_sizes=task == "classify",
        output_loading_info=True,
        **_hub(settings),
    )
    new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    parameters = {name: p for name, p in model.named_parameters() if name in new}
    if task == "embed":  # poolers are for pretraining; embeddings use the token vectors
        parameters = {n: p for n, p in parameters.items() if not n.startswith("pooler.")}
    _refuse_random(settings, {name for name in parameters if not _is_saved(name, settings)})
    for parameter in parameters.values():
        parameter.data.zero_()  # equal logits, and the same on every replica
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _refuse_random(settings: Settings, names: Iterable[str]) -> None:
    modules = sorted({name.rpartition(".")[0] for name in names})
    if modules:
        listed = ",".join(modules)
        why = (
            f"its checkpoint has no weights for {listed}; if every adapter brings them, "
            f"set modules_to_save={listed}"
        )
        raise UnsupportedModel(settings.model, why)


def _is_saved(parameter: str, settings: Settings) -> bool:
    """Returns True if modules_to_save cover it (by suffix, as PEFT matches them)."""
    parts = parameter.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(module.endswith(name) for module in modules for name in _saved(settings))


def _saved(settings: Settings) -> list[str]:
    return _names(settings.modules_to_save or "")


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _labels(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def _hub(settings: Settings) -> dict[str, Any]:
    return {
        "revision": settings.model_revision,
        "trust_remote_code": settings.trust_remote_code,
    }


def _eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Returns the end tokens of the generation config and of the tokenizer."""
    eos = model.generation_config.eos_token_id
    ids = set(eos if isinstance(eos, list) else [eos])
    return sorted((ids | {tokenizer.eos_token_id}) - {None})
