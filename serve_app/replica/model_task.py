"""The task that a model is served for, from its config and the settings."""

from __future__ import annotations

from typing import Any, Literal

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
)

from serve_app.settings import Settings

Task = Literal["causal", "seq2seq", "classify", "embed"]

_WORDS: dict[Task, str] = {
    "causal": "a causal language model",
    "seq2seq": "a text-to-text model",
    "classify": "a model for text classification",
    "embed": "a text encoder",
}
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ENCODES = ("ForMaskedLM", "ForPreTraining", "Model")


class UnsupportedModel(Exception):
    """No engine can serve the base model. Nothing was started."""

    code = "unsupported_model"

    def __init__(self, model: str, why: str) -> None:
        super().__init__(model, why)
        self.model, self.why = model, why

    def __str__(self) -> str:
        return f"the model {self.model} cannot be served: {self.why}"


def task_of(config: Any, settings: Settings) -> Task:
    """Returns the task of the settings, or else the one that the checkpoint was saved for.

    Raises:
        UnsupportedModel: the model cannot do the task, or was saved for one that no engine has.
    """
    if settings.task == "generate":
        task: Task = "seq2seq" if config.is_encoder_decoder else "causal"
    elif settings.task == "auto":
        task = _saved_for(config, settings)
    else:
        task = settings.task
    if why := _obstacle(config, task):
        raise UnsupportedModel(settings.model, why)
    return task


def auto_class(config: Any, task: Task) -> Any:
    """Returns the Auto class for the task, with the module names that adapters are saved with."""
    if task == "embed":
        return AutoModelForTextEncoding if _is_half(config) else AutoModel
    return {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "classify": AutoModelForSequenceClassification,
    }[task]


def _classes(config: Any, task: Task) -> Any:
    """Returns the classes of `auto_class` by config class."""
    if task == "embed":
        return MODEL_FOR_TEXT_ENCODING_MAPPING if _is_half(config) else MODEL_MAPPING
    return {
        "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
        "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        "classify": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }[task]


def reads_forward(config: Any) -> bool:
    """Returns True if the model attends from left to right only.

    Having a class for causal language modeling does not say so: transformers has one for BERT too.
    """
    if config.is_encoder_decoder:
        return False
    if _is_masked(config) and not getattr(config, "is_decoder", False):
        return False
    return _has_class(config, "causal")


def architecture(config: Any) -> str:
    """Returns the name of the class that saved the checkpoint, or "" if it is not recorded."""
    return str((getattr(config, "architectures", None) or [""])[0])


def _saved_for(config: Any, settings: Settings) -> Task:
    name = architecture(config)
    generates: Task = "seq2seq" if config.is_encoder_decoder else "causal"
    if name.endswith("ForSequenceClassification"):
        return "classify"
    if name.endswith(_GENERATES):
        return generates
    if name.endswith(_ENCODES):  # bart-base and the Marian models are saved as "...Model"
        return "seq2seq" if config.is_encoder_decoder and not _is_half(config) else "embed"
    if not name:
        encodes = not config.is_encoder_decoder and _is_masked(config)
        return "embed" if encodes and not reads_forward(config) else generates
    why = f"{name} is neither for generation nor embeddings nor text classification"
    raise UnsupportedModel(settings.model, f"{why}; set task to use it for one of them")


def _obstacle(config: Any, task: Task) -> str | None:
    """Returns the reason why this kind of model cannot do the task, or None if it can."""
    kind = config.model_type
    if task == "embed" and config.is_encoder_decoder and not _is_half(config):
        return f"{kind} has an encoder and a decoder, and embeddings need an encoder alone"
    if not _has_class(config, task) or (task == "causal" and not reads_forward(config)):
        return f"{kind} is not {_WORDS[task]}"
    if task == "classify" and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return f"{kind} classifies by the end token of a text, and requests need not have one"
    reads = _modalities(config, task)
    if "text" not in reads or (task in ("embed", "classify") and reads != {"text"}):
        return f"{kind} reads {' and '.join(sorted(reads))}, and a request has only text"
    return None


def _is_half(config: Any) -> bool:
    """Returns True for the encoder alone of an encoder-decoder, as T5EncoderModel saves it."""
    known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    return known and architecture(config).endswith("EncoderModel")


def _is_masked(config: Any) -> bool:
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def _has_class(config: Any, task: Task) -> bool:
    """Returns True if transformers, or the model's own repository, has a class for the task."""
    remote = getattr(config, "auto_map", None) or {}
    return type(config) in _classes(config, task) or auto_class(config, task).__name__ in remote


def _modalities(config: Any, task: Task) -> set[str]:
    classes = _classes(config, task)
    if type(config) not in classes:
        return {"text"}  # code of the model's repository, which does not say
    found = classes[type(config)]
    model = found[0] if isinstance(found, tuple) else found
    reads = getattr(model, "input_modalities", "text")
    return {reads} if isinstance(reads, str) else set(reads)
