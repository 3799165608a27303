"""Log records of this application go where Serve writes its own.

Serve configures one logger, `ray.serve`: its handlers write to the console of `serve run` and to
the log file of the replica, as text or JSON. The loggers of this application are named by module,
so Serve's handlers never see their records. `attach` passes these records on.

Fields for log processing are given as `extra`: `revision` and `rollout` where there is one. Serve
adds the request id, the route and the replica. Its JSON encoding writes all of them; its text
encoding leaves out `extra`, so a message names what its reader needs.
"""

from __future__ import annotations

import logging

SERVE_LOGGER = "ray.serve"
_OURS = ("serve_app", "hotswap_lib")
_ACCESS_LOG = "serve_access_log"  # Serve marks its access records with this field


class _ToServe(logging.Handler):
    """Passes records on to Serve's logger, under the level that it has at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        serve = logging.getLogger(SERVE_LOGGER)
        if serve.isEnabledFor(record.levelno):
            serve.handle(record)


def attach(*, access_log: bool = True) -> None:
    """Sends the records of this application to Serve's handlers. To be called in each deployment.

    `access_log` False: Serve does not log the calls of this process. A filter rather than the
    deployment's `logging_config`, which would hide the operator's own (`applications` in a config
    file) from the deployment.

    A forwarding handler rather than a copy of Serve's handlers: Serve replaces those when its
    logging configuration changes. Calling it again changes nothing.
    """
    for name in _OURS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _ToServe) for handler in logger.handlers):
            logger.addHandler(_ToServe())
        logger.setLevel(logging.DEBUG)  # Serve's logger decides
        logger.propagate = False
    if not access_log:
        logging.getLogger(SERVE_LOGGER).addFilter(_is_no_access)


def _is_no_access(record: logging.LogRecord) -> bool:
    return not getattr(record, _ACCESS_LOG, False)
