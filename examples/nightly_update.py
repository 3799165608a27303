"""What a scheduler starts every night: put the newest adapter of a folder on the fleet, if new.

    python -m examples.nightly_update s3://models/support-bot/nightly

The folder has one adapter a night; the last one in the order of their names is the newest. A night
without a new one changes nothing. The date is the idempotency key, so a scheduler that fires twice
starts one rollout; and the fleet's generation as it was seen here has to be the fleet's still, so
that the update never goes over what somebody decided meanwhile. Exit codes as `hotswap` has them.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence

import fsspec

from serve_app.client.http import DEFAULT_URL, HotswapClient, RequestRejected, ServerUnreachable
from serve_app.rollout.plan import Plan


def newest(folder: str) -> str | None:
    """The last adapter in the folder, by name; None when there is none."""
    fs, path = fsspec.url_to_fs(folder)
    found = sorted(fs.glob(f"{path.rstrip('/')}/*/adapter_config.json"))
    if not found:
        return None
    return str(fs.unstrip_protocol(found[-1].rpartition("/")[0])).removeprefix("file://")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="any fsspec URI; one adapter in each of its folders")
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--token")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds")
    given = parser.parse_args(arguments)
    adapter = newest(given.folder)
    if adapter is None:
        print(f"there is no adapter in {given.folder}", file=sys.stderr)
        return 1
    tonight = datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        with HotswapClient(given.url, token=given.token) as client:
            fleet = client.fleet()
            if fleet.rollout is not None:
                print(f"{fleet.rollout.id} is under way; nothing was started")
                return 0
            if any(each.source == adapter for each in client.rollouts().data):
                print(f"{adapter} is not new; nothing was started")
                return 0
            rollout = client.start(
                Plan(adapter=adapter), expected_generation=fleet.generation, key=tonight
            )
            ended = client.wait(rollout.id, timeout_s=given.timeout)
    except RequestRejected as refused:
        print(f"refused: {refused.message} [{refused.code}]", file=sys.stderr)
        return 1
    except ServerUnreachable as away:
        print(str(away), file=sys.stderr)
        return 4
    print(f"{ended.target}: {ended.state}" + (f", {ended.reason}" if ended.reason else ""))
    return 0 if ended.state == "succeeded" else 3


if __name__ == "__main__":
    sys.exit(main())
