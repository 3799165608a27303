"""The tokenizer of the tiny model."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.e2e.tiny_world import TinyWorld


@pytest.fixture(scope="module")
def tokenizer(world: TinyWorld) -> Any:
    return AutoTokenizer.from_pretrained(world.model)
