"""Records of the application's loggers reach Serve's handlers, as text and as JSON."""

from __future__ import annotations

import json
import logging
import logging.handlers
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger, log_access_log_filter
from ray.serve.schema import LoggingConfig

from serve_app import logs

LOGGERS = (logs.SERVE_LOGGER, "serve_app", "hotswap_lib")


Configure = Callable[..., Callable[[], list[str]]]


@pytest.fixture
def configure(tmp_path: Path) -> Iterator[Configure]:
    """Configures Serve's logger as a replica does. Returns a function that reads its log file."""
    before = {
        name: (one.level, one.propagate, one.handlers[:])
        for name in LOGGERS
        if (one := logging.getLogger(name))
    }

    def as_serve_does(folder: str = "logs", **config: str) -> Callable[[], list[str]]:
        path = tmp_path / folder
        close_handlers(logging.getLogger(logs.SERVE_LOGGER), keep=before[logs.SERVE_LOGGER][2])
        configure_component_logger(
            component_name="default_Model",
            component_id="r1",
            component_type=ServeComponentType.REPLICA,
            logging_config=LoggingConfig(logs_dir=str(path), **config),
            max_bytes=2**20,
            backup_count=1,
        )
        return lambda: [line for file in path.iterdir() for line in file.read_text().splitlines()]

    yield as_serve_does
    for name, (level, propagate, handlers) in before.items():
        logger = logging.getLogger(name)
        close_handlers(logger, keep=handlers)
        logger.level, logger.propagate, logger.handlers = level, propagate, handlers
        logger.filters.clear()


def close_handlers(logger: logging.Logger, *, keep: list[logging.Handler]) -> None:
    for handler in set(logger.handlers) - set(keep):
        file = handler.target if isinstance(handler, logging.handlers.MemoryHandler) else None
        handler.close()  # flushes to the file, and forgets it
        if file is not None:
            file.close()


def test_text_has_the_message_in_serves_format_whatever_extra_fields_it_has(
    configure: Configure,
) -> None:
    read = configure()
    logs.attach()
    extra = {"revision": "pirate@1234abcd", "rollout": "7"}
    logging.getLogger("serve_app.replica.reconciler").info("swapped", extra=extra)
    [line] = read()
    assert line.startswith("INFO ")
    assert line.endswith("default_Model r1 -- swapped")


def test_json_has_the_extra_fields_and_those_of_serve(configure: Configure) -> None:
    read = configure(encoding="JSON")
    logs.attach()
    extra = {"revision": "pirate@1234abcd", "rollout": "7", "request_id": "abc"}
    logging.getLogger("serve_app.replica.reconciler").info("swapped", extra=extra)
    logging.getLogger("hotswap_lib.slot").warning("an odd adapter")
    swapped, odd = map(json.loads, read())
    assert swapped["message"] == "swapped"
    assert {name: swapped[name] for name in extra} == extra
    assert (swapped["replica"], swapped["levelname"]) == ("r1", "INFO")
    assert (odd["message"], odd["levelname"]) == ("an odd adapter", "WARNING")


def test_the_level_is_the_one_that_serve_has_at_that_moment(configure: Configure) -> None:
    read = configure("quiet", log_level="WARNING")
    logs.attach()
    logger = logging.getLogger("serve_app.app")
    logger.info("left out")
    assert read() == []
    read = configure("verbose", log_level="DEBUG")  # as Serve does for a new logging_config
    logger.debug("shown")
    assert [line.rpartition(" -- ")[2] for line in read()] == ["shown"]


def test_a_process_can_leave_out_serves_access_log(configure: Configure) -> None:
    read = configure()
    logs.attach(access_log=False)
    serve = logging.getLogger(logs.SERVE_LOGGER)
    serve.info("CALL report OK 2003.5ms", extra={"serve_access_log": True})
    serve.info("something else")
    assert [line.rpartition(" -- ")[2] for line in read()] == ["something else"]
    record = logging.makeLogRecord({"serve_access_log": True})
    assert not log_access_log_filter(record), "Serve marks its access records in another way now"


def test_attaching_twice_does_not_write_a_record_twice(configure: Configure) -> None:
    read = configure()
    logs.attach()
    logs.attach()
    logging.getLogger("serve_app").info("once")
    assert len(read()) == 1
