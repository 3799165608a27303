"""A nightly job: move the fleet to the newest adapter of a folder, unless it has it already.

    python -m examples.nightly_update s3://models/support-bot/nightly

The folder has one folder for each adapter; the last by name is the newest. Without a new adapter,
nothing changes. The date is the idempotency key, so a scheduler that fires twice starts one
rollout. The expected generation is the one that this script read, so the update is rejected if a
user has changed the fleet in the meantime. Exit codes are those of `hotswap`.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence

import fsspec

from serve_app.client import DEFAULT_URL, HotswapClient, RequestRejected, ServerUnreachable
from serve_app.rollout.plan import Plan
from serve_app.wire.admin import RolloutView


def newest(folder: str) -> str | None:
    """The last adapter in the folder, by name; None when there is none."""
    fs, path = fsspec.url_to_fs(folder)
    found = sorted(fs.glob(f"{path.rstrip('/')}/*/adapter_config.json"))
    if not found:
        return None
    return str(fs.unstrip_protocol(found[-1].rpartition("/")[0])).removeprefix("file://")


def start(client: HotswapClient, adapter: str) -> RolloutView | None:
    """A rollout to `adapter`; None if another rollout is running, or the adapter is not new."""
    tonight = datetime.datetime.now(datetime.UTC).date().isoformat()
    fleet = client.fleet()
    if fleet.rollout is not None:
        print(f"{fleet.rollout.id} is running; nothing was started")
        return None
    if any(each.source == adapter for each in client.rollouts().data):
        print(f"{adapter} is not new; nothing was started")
        return None
    return client.start(Plan(adapter=adapter), expected_generation=fleet.generation, key=tonight)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="any fsspec URI; each of its folders is one adapter")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--token")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds")
    given = parser.parse_args(arguments)
    adapter = newest(given.folder)
    if adapter is None:
        print(f"there is no adapter in {given.folder}", file=sys.stderr)
        return 1
    try:
        with HotswapClient(given.url, token=given.token) as client:
            rollout = start(client, adapter)
            if rollout is None:
                return 0
            ended = client.wait(rollout.id, timeout_s=given.timeout)
    except RequestRejected as error:
        print(f"rejected: {error.message} [{error.code}]", file=sys.stderr)
        return 1
    except ServerUnreachable as error:
        print(str(error), file=sys.stderr)
        return 4
    print(f"{ended.target}: {ended.state}" + (f", {ended.reason}" if ended.reason else ""))
    return 0 if ended.state == "succeeded" else 3


if __name__ == "__main__":
    sys.exit(main())
