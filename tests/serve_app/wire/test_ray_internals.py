"""The private parts of Ray that are used: each test says what to replace when Ray changes."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve import context
from ray.serve._private.client import ServeControllerClient
from ray.serve.schema import ServeInstanceDetails

from serve_app.wire.ray_internals import http_url


def test_serves_client_knows_the_address() -> None:
    assert hasattr(context, "_get_global_client"), (
        "ray.serve.context._get_global_client is gone: http_url needs another way to the client"
    )
    assert hasattr(ServeControllerClient, "get_serve_details"), (
        "Serve's client has no get_serve_details: http_url needs another source of the address"
    )
    assert {"http_options", "proxies", "applications"} <= ServeInstanceDetails.model_fields.keys()


@pytest.mark.parametrize(
    ("host", "prefix", "proxies", "url"),
    [
        ("127.0.0.1", "/", 1, "http://127.0.0.1:8123"),
        ("0.0.0.0", "/llm", 1, "http://127.0.0.1:8123/llm"),
        ("10.1.2.3", "/", 1, "http://10.1.2.3:8123"),
        ("127.0.0.1", "/", 0, None),
    ],
)
def test_the_address_of_an_application(
    monkeypatch: pytest.MonkeyPatch, host: str, prefix: str, proxies: int, url: str | None
) -> None:
    details: dict[str, Any] = {
        "controller_info": {},
        "http_options": {"host": host, "port": 8123},
        "proxies": {f"node{i}": {"status": "HEALTHY"} for i in range(proxies)},
        "applications": {
            "default": {
                "name": "default",
                "route_prefix": prefix,
                "status": "RUNNING",
                "message": "",
                "last_deployed_time_s": 0.0,
                "deployments": {},
                "source": "declarative",
                "docs_path": None,
                "external_scaler_enabled": False,
            }
        },
        "target_capacity": None,
    }

    class Client:
        def get_serve_details(self) -> dict[str, Any]:
            return details

    monkeypatch.setattr(context, "_get_global_client", Client)
    assert http_url("default") == url
