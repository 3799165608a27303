"""What a model is served for: its config and the settings say it, or one sentence says why not."""

from __future__ import annotations

from typing import Any, Literal

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
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
    """The base model is one that no engine can serve; nothing was started."""

    code = "unsupported_model"

    def __init__(self, model: str, why: str) -> None:
        super().__init__(model, why)
        self.model, self.why = model, why

    def __str__(self) -> str:
        return f"the model {self.model} cannot be served: {self.why}"


def task_of(config: Any, settings: Settings) -> Task:
    """The task that the settings name, else the one that the checkpoint was saved for.

    Raises:
        UnsupportedModel: the model cannot do that, or was saved for something else altogether.
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
    """The Auto class whose modules have the names that PEFT saw when it trained for this task."""
    if task == "embed":
        return AutoModelForTextEncoding if _is_half(config) else AutoModel
    return {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "classify": AutoModelForSequenceClassification,
    }[task]


def reads_forward(config: Any) -> bool:
    """Whether it reads from left to right. Encoders have a causal head as well, when asked for."""
    encoder = type(config) in AutoModelForMaskedLM._model_mapping
    if config.is_encoder_decoder or (encoder and not getattr(config, "is_decoder", False)):
        return False
    return _offers(config, AutoModelForCausalLM)


def architecture(config: Any) -> str:
    """The class that wrote the checkpoint; empty when it does not say."""
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
        encodes = (
            not config.is_encoder_decoder and type(config) in AutoModelForMaskedLM._model_mapping
        )
        return "embed" if encodes and not reads_forward(config) else generates
    why = f"{name} is neither for generation nor embeddings nor text classification"
    raise UnsupportedModel(settings.model, f"{why}; set task to use it for one of them")


def _obstacle(config: Any, task: Task) -> str | None:
    """Why this kind of model cannot do the task."""
    kind, auto = config.model_type, auto_class(config, task)
    if task == "embed" and config.is_encoder_decoder and not _is_half(config):
        return f"{kind} has an encoder and a decoder, and embeddings need one that was saved alone"
    if not _offers(config, auto) or (task == "causal" and not reads_forward(config)):
        return f"{kind} is not {_WORDS[task]}"
    if task == "classify" and type(config) in AutoModelForSeq2SeqLM._model_mapping:
        return f"{kind} classifies by its end tokens, which a batch cannot be sure to have"
    reads = _modalities(config, auto)
    if "text" not in reads or (task in ("embed", "classify") and reads != {"text"}):
        return f"{kind} reads {' and '.join(sorted(reads))}, and a request has only text"
    return None


def _is_half(config: Any) -> bool:
    """Saved as the encoder alone of an encoder-decoder: T5EncoderModel and its like."""
    known = type(config) in AutoModelForTextEncoding._model_mapping
    return known and architecture(config).endswith("EncoderModel")


def _offers(config: Any, auto: Any) -> bool:
    """Whether transformers, or the repository's own code, has a class for it."""
    remote = getattr(config, "auto_map", None) or {}
    return type(config) in auto._model_mapping or auto.__name__ in remote


def _modalities(config: Any, auto: Any) -> set[str]:
    if type(config) not in auto._model_mapping:
        return {"text"}  # the repository's own code: nobody can know
    found = auto._model_mapping[type(config)]
    model = found[0] if isinstance(found, tuple) else found
    reads = getattr(model, "input_modalities", "text")
    return {reads} if isinstance(reads, str) else set(reads)
