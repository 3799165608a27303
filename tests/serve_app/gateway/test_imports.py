"""The gateway process loads no deep learning library: it starts fast and stays small."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "peft", "scipy")


def test_the_gateway_and_the_router_import_neither_torch_nor_transformers_nor_peft() -> None:
    code = (
        "import sys, serve_app.gateway.deployment, serve_app.gateway.router\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.split() == []
