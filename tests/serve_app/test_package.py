"""The names that users import from `serve_app` and `serve_app.client`."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import serve_app
import serve_app.client

PUBLIC = {
    serve_app: ["HotswapClient", "Plan", "RequestRejected", "ServerUnreachable", "build"],
    serve_app.client: ["DEFAULT_URL", "HotswapClient", "RequestRejected", "ServerUnreachable"],
}


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_the_public_names_are_these_and_each_can_be_imported(package: ModuleType) -> None:
    assert sorted(package.__all__) == PUBLIC[package]
    assert dir(package) == PUBLIC[package]
    for name in PUBLIC[package]:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_any_other_name_is_an_attribute_error(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Steering'"):
        _ = package.Steering


def test_scripts_that_catch_the_clients_error_under_its_former_name_still_do() -> None:
    assert serve_app.client.RequestRefused is serve_app.client.RequestRejected


@pytest.mark.parametrize(
    "statement",
    ["import serve_app, serve_app.client", "from serve_app import HotswapClient, Plan"],
)
def test_the_packages_and_the_client_are_imported_without_torch_and_ray(statement: str) -> None:
    code = (
        f"import sys\n{statement}\n"
        "heavy = {'ray', 'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
