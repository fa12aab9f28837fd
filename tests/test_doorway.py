"""The verbs on a Unix socket: who calls, the kernel says. Two real accounts cannot touch each other's streams."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from serving import serving

from scistream_flows.config import FacilityConfig, load_facility
from scistream_flows.doorway import AT_ONCE_PER_ACCOUNT, LONGEST_QUESTION_BYTES, ask, serve_socket
from scistream_flows.errors import ConfigError, FacilityUnreachable
from scistream_flows.facility import connect_facility
from scistream_flows.functions import answer
from scistream_flows.models import ListQuery, Release, Request
from scistream_flows.s2cs import unix_owner

pytestmark = pytest.mark.usefixtures("state_base")

IDENTITY: Final = "urn:globus:auth:identity:00000000-0000-4000-8000-00000000000a"
TOML: Final = """
[facility]
name = "shared"

[[gateway]]
name = "local"
wan_bind = "127.0.0.1"
lan_bind = "127.0.0.1"

[policy]
targets = ["127.0.0.0/8"]
users = {users}

[service]
socket = "{socket}"
{accounts}
"""
# Imported as root, because this Python may be for root only; then it is that account, for good.
AS_ACCOUNT: Final = """
import json, os, sys
from scistream_flows.functions import answer
uid, gid, verb, document = json.loads(sys.argv[1])
os.setgroups([]), os.setresgid(gid, gid, gid), os.setresuid(uid, uid, uid)
print(json.dumps(answer(verb, document, facility="shared")))
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that every account can look into, and nobody but this one can write in."""
    path = Path(tempfile.mkdtemp(prefix="scistream-", dir="/run" if os.geteuid() == 0 else None))
    path.chmod(0o755)
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(path))
    yield path
    shutil.rmtree(path)


def configured(
    place: Path, *, users: str = '["all_authenticated_users"]', accounts: str = ""
) -> FacilityConfig:
    text = TOML.format(socket=place / "s2cs.sock", users=users, accounts=accounts)
    (place / "shared.toml").write_text(text)
    return load_facility("shared")


class Account:
    """A Unix account of the test."""

    def __init__(self) -> None:
        self.name = f"sf{secrets.token_hex(4)}"
        subprocess.run(
            ["useradd", "--system", "--no-create-home", self.name], check=True, capture_output=True
        )
        self.entry = pwd.getpwnam(self.name)
        self.urn = unix_owner(self.entry.pw_uid)

    def asks(self, verb: str, document: dict[str, Any]) -> dict[str, Any]:
        """What the function of this verb answers in a process of this account."""
        question = json.dumps([self.entry.pw_uid, self.entry.pw_gid, verb, {"protocol": 1, **document}])
        done = subprocess.run(
            [sys.executable, "-c", AS_ACCOUNT, question],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"SCISTREAM_STATE_DIR": "/nonexistent"},
        )
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def remove(self) -> None:
        subprocess.run(["userdel", self.name], check=True, capture_output=True)


@pytest.fixture
def accounts() -> Iterator[tuple[Account, Account]]:
    if os.geteuid() != 0 or not shutil.which("useradd"):
        pytest.skip("Unix accounts are made and removed: this needs root and useradd")
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(2):
            account = Account()
            stack.callback(account.remove)
            made.append(account)
        yield made[0], made[1]


def test_two_accounts_cannot_touch_each_others_streams(
    place: Path, accounts: tuple[Account, Account]
) -> None:
    anna, ben = accounts
    config = configured(place, accounts=f'accounts = {{ {anna.name} = "{IDENTITY}" }}')
    stream = {"uid": "run-1", "role": "PROD"}
    with serve_socket(config):
        opened = anna.asks("request", {**stream, "targets": ["127.0.0.1:9"]})
        assert opened["ok"], opened
        # the same name is free for the other one, who knows nothing of the first
        assert ben.asks("status", stream)["error"]["code"] == "not-found"
        assert ben.asks("list", {})["value"]["streams"] == []
        for verb, more in (
            ("renew", {}),
            ("update", {"peers": []}),
            ("hello", {"targets": ["127.0.0.1:9"]}),
            ("ticket", {}),
        ):
            refused = ben.asks(verb, {**stream, **more})
            assert refused["error"]["code"] == "not-found", verb
            named = ben.asks(verb, {**stream, **more, "owner": IDENTITY})
            assert named["error"]["code"] == "not-found", verb
        assert ben.asks("release", {**stream, "owner": IDENTITY})["value"].get("end") is None
        assert anna.asks("status", stream)["value"]["state"] == "LISTENING"
        own = ben.asks("request", {**stream, "targets": ["127.0.0.1:9"]})
        assert own["ok"]
        assert own["value"]["relays"][0]["relay_id"] != opened["value"]["relays"][0]["relay_id"]
        owners = [account.asks("status", stream)["value"]["owner"] for account in (anna, ben)]
        assert owners == [IDENTITY, ben.urn]
        for account in (anna, ben):
            assert account.asks("release", stream)["value"]["end"]["reason"] == "released"
    lines = [json.loads(line) for line in (config.state_dir / "audit.jsonl").read_text().splitlines()]
    assert [line["owner"] for line in lines if line["event"] == "open"] == [IDENTITY, ben.urn]


def test_an_account_that_is_not_named_opens_nothing(place: Path, accounts: tuple[Account, Account]) -> None:
    anna, ben = accounts
    config = configured(place, users=json.dumps([anna.urn]))
    request = {"uid": "run-1", "role": "PROD", "targets": ["127.0.0.1:9"]}
    with serve_socket(config):
        assert ben.asks("request", request)["error"]["code"] == "denied"
        assert anna.asks("request", request)["ok"]
        assert anna.asks("release", {"uid": "run-1", "role": "PROD"})["ok"]


def test_a_facility_with_a_socket_is_asked_there(place: Path) -> None:
    config = configured(place)
    facility = connect_facility("local:shared")
    with pytest.raises(FacilityUnreachable, match="no service at"):
        facility.list(ListQuery())
    with serve_socket(config) as path:
        assert path == place / "s2cs.sock"
        offer = facility.request(Request(uid="run-1", role="PROD", targets=["127.0.0.1:9"]))
        assert [one.owner for one in facility.list().streams] == [unix_owner()]
        assert answer("list", {"protocol": 1}, facility="shared")["value"]["streams"][0]["uid"] == offer.uid
        facility.release(Release(uid="run-1", role="PROD"))
    assert sorted(one.name for one in place.iterdir()) == ["s2cs.sock.lock", "shared.toml"]


def test_a_socket_is_served_once_and_taken_over_from_the_dead(place: Path) -> None:
    config = configured(place)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place / "s2cs.sock"))
    with serve_socket(config) as path:
        assert path is not None
        with pytest.raises(ConfigError, match="served by another process"), serve_socket(config):
            pass
        assert ask(path, "list", {"protocol": 1})["ok"]


def test_a_file_that_is_no_socket_is_left_alone(place: Path) -> None:
    config = configured(place)
    (place / "s2cs.sock").write_text("somebody's")
    with pytest.raises(ConfigError, match="is no socket"), serve_socket(config):
        pass
    assert (place / "s2cs.sock").read_text() == "somebody's"


def test_a_function_that_is_given_no_object_says_so(place: Path) -> None:
    with serve_socket(configured(place)):
        said = answer("list", ["no", "object"], facility="shared")  # type: ignore[arg-type]
    assert said["error"]["code"] == "bad-request"


def test_a_directory_that_is_open_to_others_is_refused_on_both_sides(place: Path) -> None:
    config = configured(place)
    with serve_socket(config) as path:
        place.chmod(0o777)
        assert path is not None
        with pytest.raises(ConfigError, match="others may write"):
            ask(path, "list", {"protocol": 1})
    with pytest.raises(ConfigError, match="others may write"), serve_socket(config):
        pass
    place.chmod(0o755)


@pytest.mark.parametrize(
    ("question", "code"),
    [
        (b"GET / HTTP/1.1\r\n", "bad-request"),
        (b"[]\n", "bad-request"),
        (b'{"protocol": 2, "verb": "list", "document": {}}\n', "protocol"),
        (b'{"protocol": 1, "verb": "list", "document": {}, "owner": "urn:x"}\n', "bad-request"),
        (b'{"protocol": 1, "verb": "survey", "document": {}}\n', "bad-request"),
        (b'{"protocol": 1, "verb": ["list"], "document": {}}\n', "bad-request"),
        (b"x" * (LONGEST_QUESTION_BYTES + 1), "bad-request"),
    ],
    ids=["http", "list", "protocol", "owner", "administration", "verb", "long"],
)
def test_what_is_no_question_is_refused_in_words(place: Path, question: bytes, code: str) -> None:
    with serve_socket(configured(place)) as path, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(question)
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65_536):
                said += piece
        assert json.loads(said)["error"]["code"] == code


def test_who_asks_for_too_much_at_a_time_is_told_so_and_keeps_nobody_out_for_ever(place: Path) -> None:
    with serve_socket(configured(place)) as path, contextlib.ExitStack() as stack:
        assert path is not None
        silent = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(AT_ONCE_PER_ACCOUNT)]
        for one in silent:
            one.connect(str(path))
        refused = ask(path, "list", {"protocol": 1})
        assert refused["error"]["code"] == "busy"
        for one in silent:
            one.close()
        deadline = threading.Event()
        for _ in range(200):
            if ask(path, "list", {"protocol": 1})["ok"]:
                break
            deadline.wait(0.05)
        else:
            pytest.fail("the service stays busy")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_command_serves_the_socket_beside_http(place: Path, tmp_path: Path, workers: int) -> None:
    path = place / "s2cs.sock"
    table = f'[service]\nsocket = "{path}"\n'
    request = {"protocol": 1, "uid": "run-1", "role": "PROD", "targets": ["127.0.0.1:9"]}
    with serving(tmp_path, "aps", more=table, workers=workers) as served:
        assert ask(path, "request", request)["ok"]
        served.kill()
    with serving(tmp_path, "aps", more=table, workers=workers) as served:
        (stream,) = ask(path, "list", {"protocol": 1})["value"]["streams"]
        assert stream["uid"] == "run-1"
        assert ask(path, "release", {"protocol": 1, "uid": "run-1", "role": "PROD"})["ok"]
        served.stop()
        assert not path.exists()
