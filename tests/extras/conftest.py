"""Libraries that the main environment does not have: they slow every PEFT injection down.

    pip install --no-deps --target FOLDER bitsandbytes torchao diffusers pillow
    PYTHONPATH=FOLDER python -m pytest tests/extras

Without them these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = [
        # PEFT 0.21 reads a property that transformers 5.23 deprecates, on every get_peft_model
        "ignore:`is_gradient_checkpointing`:FutureWarning",
    ]
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for warning in known:
                item.add_marker(pytest.mark.filterwarnings(warning))
