"""Names of targets: resolved once, at the facility, and checked afterwards; a relay gets numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

# The names are in an /etc/hosts of this process alone, which the test changes as an attacker's name server would.
NAMES: Final = """
import json, pathlib, socket, sys
from scistream_flows.config import load_facility
from scistream_flows.errors import ScistreamError
from scistream_flows.s2cs import S2CS

hosts = pathlib.Path("/etc/hosts")
of = {"protocol": 1, "uid": "s", "role": "PROD"}
with S2CS(load_facility("aps")) as service:
    for addresses, verb, more in json.loads(sys.argv[1]):
        hosts.write_text("".join(f"{one} instrument.example\\n" for one in addresses))
        said = service.answer(verb, {**of, **more})
        relays = service.status(of).relays if said["ok"] else []
        print(json.dumps([said, [relay.targets for relay in relays]]))
    service.release(of)
"""

BOUND: Final = 'mount --bind "$1" /etc/hosts; shift; exec "$@"'

HERE, THERE, FAR = "127.0.0.1", "127.0.0.9", "192.0.2.1"


@pytest.fixture
def in_turn(tmp_path: Path, state_base: Path, site: Callable[..., None]) -> Callable[..., list[Any]]:
    """A function that has verbs done in turn, each with the name pointing to other addresses."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("names are changed in a mount namespace: this needs root and unshare")
    site("aps", {}, targets=[f"{HERE}/32", "[::1/128]"])
    assert state_base.exists()
    hosts = tmp_path / "hosts"

    def run(*steps: tuple[list[str], str, dict[str, Any]]) -> list[Any]:
        hosts.write_text("")
        done = subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c", BOUND, "sh", str(hosts)),
                sys.executable,
                "-c",
                NAMES,
                json.dumps(steps),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_of_several_addresses_only_one_that_is_allowed_is_connected_to(in_turn: Callable[..., Any]) -> None:
    target = {"targets": ["instrument.example:9"]}
    for addresses in ([HERE, FAR], [FAR, HERE], [FAR, HERE, THERE]):
        (said, targets), *_ = in_turn((addresses, "request", target))
        assert said["ok"], said
        assert targets == [[f"{HERE}:9"]]


def test_a_name_of_which_no_address_is_allowed_is_denied_with_what_it_is(in_turn: Callable[..., Any]) -> None:
    ((said, _),) = in_turn(([THERE, FAR], "request", {"targets": ["instrument.example:9"]}))
    assert said["error"]["code"] == "denied"
    assert f"it is {THERE}, {FAR} here" in said["error"]["message"]


def test_a_name_that_changes_after_the_check_leads_nowhere_else(in_turn: Callable[..., Any]) -> None:
    target = {"targets": ["instrument.example:9"]}
    opened, renewed, updated, greeted, back = in_turn(
        ([HERE], "request", target),
        ([FAR], "renew", {}),
        ([FAR], "update", target),
        ([THERE], "hello", target),
        (["::1"], "update", target),
    )
    assert opened[1] == renewed[1] == [[f"{HERE}:9"]]  # numbers: nobody looks the name up again
    assert [one[0]["error"]["code"] for one in (updated, greeted)] == ["denied", "denied"]
    assert back[1] == [["[::1]:9"]]  # asked for again, it is looked up again, and checked
