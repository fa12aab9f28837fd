"""What a relay is started with: refused in words when it is wrong, and never half obeyed."""

import json
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .apps import Applications, Payload
from .gateway import Gateway, RefusedError, is_running, split

USAGE = 64
NOBODY = 65534


@pytest.fixture
def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_ports_are_taken_inside_the_range_and_no_port_twice(gateway: Gateway, free_port: int) -> None:
    first = min(free_port, 65000)
    inside = {"first_port": first, "last_port": first + 400}
    relays = [
        gateway.start(gateway.config("PROD", "tls", listen={**inside, "indices": [4, 0, 2]}))
        for _ in range(3)
    ]
    ports = [split(row["address"])[1] for relay in relays for row in relay.ready["listeners"]]
    assert len(set(ports)) == 9
    assert all(first <= port <= first + 400 for port in ports)
    assert [row["index"] for row in relays[0].ready["listeners"]] == [4, 0, 2]


def test_a_range_that_is_taken_is_refused_and_leaves_nothing(gateway: Gateway, apps: Applications) -> None:
    port = apps.listen().getsockname()[1]
    config = gateway.config("PROD", "tls", listen={"first_port": port, "last_port": port})
    for verb in ("start", "run"):
        done = gateway.call(verb, text=json.dumps(config))
        failed = json.loads(done.stdout)
        assert (done.returncode, failed["event"], failed["code"]) == (1, "failed", "ports-exhausted")
        assert failed["errno"] == "EADDRINUSE"
        assert str(port) in failed["message"]
        assert failed["message"] in done.stderr or verb == "start"
    assert gateway.verb("list")["relays"] == []


def test_a_range_with_fewer_ports_than_listeners_is_refused(gateway: Gateway, free_port: int) -> None:
    listen = {"first_port": free_port, "last_port": free_port, "indices": [0, 1]}
    with pytest.raises(RefusedError) as refusal:
        gateway.start(gateway.config("PROD", "tls", listen=listen))
    assert (refusal.value.exit, refusal.value.code) == (1, "ports-exhausted")
    # All or nothing: the port of the first listener is free again.
    gateway.start(gateway.config("PROD", "tls", listen=listen | {"indices": [0]}))


def test_an_address_of_another_machine_is_refused(gateway: Gateway) -> None:
    with pytest.raises(RefusedError) as refusal:
        gateway.start(gateway.config("PROD", "tls", listen={"address": "192.0.2.1"}))
    assert (refusal.value.exit, refusal.value.code) == (1, "bind")
    assert refusal.value.document["errno"] == "EADDRNOTAVAIL"
    assert "192.0.2.1" in refusal.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": 2}, "protocol 2 was asked, this s2ds speaks protocol 1"),
        ({"colour": "red"}, "unknown field `colour`"),
        ({"listen": {"colour": "red"}}, "unknown field `colour`"),
        ({"peers": [{"public_key": "A" * 43, "colour": "red"}]}, "unknown field `colour`"),
        ({"relay_id": "../../etc/passwd"}, "32 lower-case hex digits"),
        ({"relay_id": "A" * 32}, "32 lower-case hex digits"),
        ({"role": "BOTH"}, "unknown variant `BOTH`"),
        ({"mode": "ssl"}, "unknown variant `ssl`"),
        ({"listen": {"address": "localhost"}}, "invalid IP address"),
        ({"listen": {"addresses": ["127.0.0.1"]}}, "exactly one of address and addresses"),
        ({"listen": {"address": None}}, "exactly one of address and addresses"),
        ({"listen": {"address": None, "addresses": []}}, "one address or one of each IP version"),
        ({"listen": {"address": None, "addresses": ["::1", "::2"]}}, "one address or one of each IP version"),
        ({"listen": {"indices": []}}, "listen.indices"),
        ({"listen": {"indices": [1, 1]}}, "stands twice"),
        ({"listen": {"indices": list(range(257))}}, "listen.indices"),
        ({"listen": {"first_port": 5200, "last_port": 5100}}, "first_port <= last_port"),
        ({"listen": {"first_port": 0, "last_port": 5100}}, "first_port <= last_port"),
        ({"listen": {"last_port": 65536}}, "65536"),
        ({"sources": ["10.0.0.0/33"]}, "neither an IP address nor a CIDR network"),
        ({"targets": ["example.org:80"]}, "invalid socket address"),
        ({"targets": ["127.0.0.1:0"]}, "no address to connect to"),
        ({"role": "CONS", "targets": ["127.0.0.1:80"]}, "only a PROD relay connects to targets"),
        ({"role": "CONS", "peers": [{"public_key": "A" * 43}]}, "needs relay_id and listeners"),
        ({"peers": [{"public_key": "short"}]}, "is not a public key"),
        ({"mode": "none", "peers": [{"public_key": "A" * 43}]}, "must not be empty"),
        ({"onward_source": "::1", "targets": ["127.0.0.1:80"]}, "different IP versions"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_connections": 65537}, "max_connections"),
        ({"rate_mbits_per_s": 100_000_001}, "rate_mbits_per_s"),
        ({"rate_mbits_per_s": -1}, "-1"),
        ({"workers": 65}, "workers"),
        ({"lease_s": 0}, "lease_s"),
        ({"lease_s": 1e300}, "lease_s"),
        ({"lifetime_s": -5}, "lifetime_s"),
        ({"idle_s": -1}, "idle_s"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused_and_the_mistake_named(
    gateway: Gateway, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RefusedError) as refusal:
        gateway.start(gateway.config("PROD", "tls") | nested(gateway, changes))
    assert (refusal.value.exit, refusal.value.code) == (USAGE, "bad-config")
    assert said in refusal.value.message
    assert refusal.value.message in refusal.value.stderr


def nested(gateway: Gateway, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes, those of `listen` inside a whole one."""
    if "listen" not in changes:
        return changes
    return {"listen": gateway.config("PROD", "tls")["listen"] | changes["listen"]}


@pytest.mark.parametrize("text", ["", "\n", "{", "[]", "null", "port = 5100", '{"protocol": 1}', "\0\0"])
@pytest.mark.parametrize("verb", ["start", "run"])
def test_what_is_no_configuration_is_refused(gateway: Gateway, verb: str, text: str) -> None:
    done = gateway.call(verb, text=text)
    assert done.returncode == USAGE
    failed = json.loads(done.stdout)
    assert (failed["protocol"], failed["event"], failed["code"]) == (1, "failed", "bad-config")
    assert failed["message"] in done.stderr
    assert "panic" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["status"],
        ["status", "no-id"],
        ["status", "0" * 32, "1" * 32],
        ["renew", "0" * 32],
        ["renew", "0" * 32, "--lease-s", "soon"],
        ["stop", "0" * 32, "--reason", "boredom"],
        ["version", "--format", "xml"],
        ["start", "--detached"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused_with_the_usage(gateway: Gateway, arguments: list[str]) -> None:
    done = gateway.call(*arguments)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "--runtime-dir" in done.stderr


def test_the_version_names_the_protocol(gateway: Gateway) -> None:
    assert gateway.verb("version", "--format", "json") == {"name": "s2ds", "version": "0.1.0", "protocol": 1}
    assert gateway.call("version").stdout == "s2ds 0.1.0 (protocol 1)\n"


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory that only its owner can enter."""
    with tempfile.TemporaryDirectory(prefix="s2ds-") as place:
        yield Path(place)


def refused_in(gateway: Gateway, directory: Path) -> str:
    """The message with which every verb refuses this runtime directory."""
    config = gateway.config("PROD", "tls")
    for verb in ("start", "run"):
        done = gateway.call(verb, text=json.dumps(config), directory=directory)
        failed = json.loads(done.stdout)
        assert (done.returncode, failed["event"], failed["code"]) == (1, "failed", "io")
    done = gateway.call("list", directory=directory)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (1, "io")
    assert str(directory) in error["message"]
    return str(error["message"])


@pytest.mark.parametrize("mode", [0o755, 0o701, 0o770, 0o720])
def test_a_runtime_directory_that_is_open_to_others_is_refused(
    gateway: Gateway, place: Path, mode: int
) -> None:
    place.chmod(mode)
    assert "is open to others" in refused_in(gateway, place)
    assert list(place.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_runtime_directory_of_somebody_else_is_refused(gateway: Gateway, place: Path) -> None:
    theirs = place / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    assert f"belongs to uid {NOBODY}" in refused_in(gateway, theirs)


def test_a_runtime_directory_that_is_a_file_is_refused(gateway: Gateway, place: Path) -> None:
    file = place / "file"
    file.touch(mode=0o600)
    assert "is not a directory" in refused_in(gateway, file)


def test_a_runtime_directory_that_is_a_link_is_refused(gateway: Gateway, place: Path) -> None:
    link = place / "link"
    link.symlink_to(gateway.directory)
    assert "is not a directory" in refused_in(gateway, link)


def test_a_runtime_directory_with_a_long_path_works(binary: Path, place: Path, apps: Applications) -> None:
    """The path of a Unix socket ends at 107 bytes; ours are relative."""
    gateway = Gateway(binary, place / ("deep" * 40) / ("down" * 40))
    try:
        server = apps.listen()
        pair = gateway.pair("tls", [server.getsockname()])
        consumer, producer = apps.through(server, pair.cons)
        apps.exchange(consumer, producer, Payload(1, 10_000), Payload(2, 10_000))
        assert {row["relay_id"] for row in gateway.verb("list")["relays"]} == {relay.id for relay in pair}
    finally:
        gateway.close()


def test_a_second_relay_of_one_id_is_refused_also_after_the_end_of_the_first(gateway: Gateway) -> None:
    relay = gateway.start(gateway.config("PROD", "tls"))
    relay.stop()
    with pytest.raises(RefusedError) as refusal:
        gateway.verb("start", document=relay.config)
    assert (refusal.value.exit, refusal.value.code) == (1, "io")
    assert relay.status()["event"] == "end"
    relay.forget()
    gateway.start(relay.config)


def test_no_verb_knows_a_relay_that_never_was(gateway: Gateway) -> None:
    for verb in (["status"], ["update"], ["renew", "--lease-s", "5"], ["drain"], ["stop"], ["forget"]):
        with pytest.raises(RefusedError) as refusal:
            gateway.verb(verb[0], secrets.token_hex(16), *verb[1:], document={})
        assert (refusal.value.exit, refusal.value.code) == (1, "no-such-relay")
        assert refusal.value.message in refusal.value.stderr


def test_start_returns_only_when_every_listener_accepts(gateway: Gateway, apps: Applications) -> None:
    indices = {"indices": list(range(256))}
    relay = gateway.start(gateway.config("CONS", "tls", listen=indices, max_connections=4))
    assert is_running(relay.pid)
    for index in range(256):
        apps.knock(relay.address(index))  # refused would be an error of connect
