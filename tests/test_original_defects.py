"""The defects that SciStream 1.2.1 is known to have, D1 to D36, one test for each: none of them may come back.

Each goes in by a door that users have, with real processes where the defect was one of processes. Where the thing
that had the defect does not exist here, the test is of the property that makes it impossible.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import selectors
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import pytest
from serving import Caller, Served, serving
from standins.globus import Globus
from test_provider import with_client
from users import Site, program, two_facilities, user_of

import scistream_flows
from scistream_flows import connect_facility, open_stream
from scistream_flows.errors import (
    BadRequest,
    ConfigError,
    FacilityUnreachable,
    NotFound,
    PolicyDenied,
    PortsExhausted,
)
from scistream_flows.models import Offer, Request, split_address
from scistream_flows.rest import RestService
from scistream_flows.s2cs import S2CS

Facility = Callable[..., S2CS]
Relays = Callable[..., list[int]]
Talk = Callable[[str, bytes], str]
Within = Callable[..., None]

ROOT: Final = Path(__file__).parents[1]
BIN: Final = Path(sys.executable).parent
LOCAL: Final = ("local:aps", "local:alcf")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def of(uid: str = "s", role: str = "PROD", **more: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": role} | more


def prod(uid: str = "s", **more: Any) -> dict[str, Any]:
    return of(uid, targets=["127.0.0.1:9"]) | more


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of this package, to its end."""
    return subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def is_open(address: str) -> bool:
    """Whether somebody listens there; a relay resets strangers, at once if it can."""
    try:
        socket.create_connection(split_address(address), 10).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:
        return True
    return True


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def served(base: Path) -> Iterator[Served]:
    with serving(base, "aps") as served:
        yield served


@pytest.fixture
def caller(served: Served, relays_below: Relays) -> Iterator[Caller]:
    """Whoever has the token; after the test every stream is released and no relay runs."""
    caller = Caller(served, served.token)
    yield caller
    for stream in caller.ask("GET", "/streams").json()["streams"]:
        caller.ask("DELETE", f"/streams/{stream['uid']}/{stream['role']}").raise_for_status()
    caller.close()
    assert relays_below(served.state_dir.parent, patience_s=5) == []


@pytest.fixture
def bare(served: Served) -> Iterator[httpx.Client]:
    """Somebody without a token."""
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


class Tap:
    """A cable between two relays on which somebody listens."""

    def __init__(self, onwards: str) -> None:
        self.seen = bytearray()
        self._onwards = onwards
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(20)
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                self._threads.append(threading.Thread(target=self._carry, args=(near,)))
                self._threads[-1].start()

    def _carry(self, near: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            near,
            socket.create_connection(split_address(self._onwards), 10) as far,
            selectors.DefaultSelector() as both,
        ):
            sinks = {near: far, far: near}
            for source in sinks:
                both.register(source, selectors.EVENT_READ)
            while both.get_map():
                for ready, _ in both.select(20):
                    source = next(one for one in sinks if one is ready.fileobj)
                    data = source.recv(1 << 16)
                    self.seen += data
                    if data:
                        sinks[source].sendall(data)
                    else:
                        both.unregister(source)
                        sinks[source].shutdown(socket.SHUT_WR)


def paired(aps: S2CS, alcf: S2CS, uid: str, offer: Offer, **more: Any) -> Offer:
    """CONS at alcf for an offer of PROD at aps, and PROD told of it."""
    document = of(uid, "CONS", offer=offer.model_dump(mode="json"), **more)
    other = alcf.request(document)
    (relay,) = other.relays
    aps.update(of(uid, peers=[{"public_key": relay.public_key, "source_addresses": relay.dial_addresses}]))
    return other


# --- D1 to D5: keys, ciphers, files, injection


def test_d01_a_uid_is_a_name_and_no_key_comes_from_it(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    first = service.request(prod("beam-7"))
    command = Path(f"/proc/{relays_below(state_base)[0]}/cmdline").read_bytes()
    assert b"beam-7" not in command
    assert first.relays[0].public_key.encode() not in command
    service.release(of("beam-7"))
    second = service.request(prod("beam-7"))
    assert first.relays[0].public_key != second.relays[0].public_key
    # whoever knows the name, and is somebody else, has nothing in hand
    with pytest.raises(NotFound):
        service.update(of("beam-7", peers=[]), owner="urn:test:eve")
    assert service.release(of("beam-7"), owner="urn:test:eve").end is None
    assert service.status(of("beam-7")).state == "LISTENING"
    service.release(of("beam-7"))


@pytest.mark.usefixtures("state_base")
def test_d01_a_name_that_nobody_gave_says_nothing_of_machine_and_time(application: Any) -> None:
    names = []
    for _ in range(2):
        with open_stream(*LOCAL, targets=[application.address]) as stream:
            names.append(stream.uid)
    assert all(re.fullmatch("stream-[0-9a-f]{16}", name) for name in names)
    assert names[0][:12] != names[1][:12]


def test_d02_the_path_shows_no_payload_and_no_other_key_gets_in(
    facility: Facility, application: Any, talk: Talk, within: Within
) -> None:
    aps, alcf, eve = (facility(name) for name in ("aps", "alcf", "eve"))
    offer = aps.request(of(targets=[application.address]))
    tap = Tap(offer.addresses[0])
    listener = offer.relays[0].listeners[0].model_copy(update={"address": tap.address})
    tapped = offer.relays[0].model_copy(update={"listeners": [listener]})
    offer = offer.model_copy(update={"relays": [tapped]})
    try:
        # a stranger with a relay and all that is public, but not with the key that PROD was told
        eve.request(of(role="CONS", offer=offer.model_dump(mode="json")))
        other = paired(aps, alcf, "s", offer)
        within(lambda: alcf.status(of(role="CONS")).state == "READY", timeout_s=20)
        marked = b"not for your eyes: " + random.Random(2).randbytes(100_000)  # noqa: S311 - no secret
        assert talk(other.addresses[0], marked) == sha(application.payload)
        within(lambda: application.received == [sha(marked)], timeout_s=20)
        within(lambda: eve.status(of(role="CONS")).last_probe is not None, timeout_s=20)
        assert eve.status(of(role="CONS")).state == "LISTENING"
        assert application.accepted == 1
        for plain in (marked[:64], application.payload[:64], application.payload[-64:]):
            assert plain not in tap.seen
        host, port = split_address(aps.request(of(targets=[application.address])).addresses[0])
        old = ssl.create_default_context()
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.set_ciphers("ALL:@SECLEVEL=0")
        with (
            socket.create_connection((host, port), 10) as raw,
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            old.wrap_socket(raw, server_hostname=host)
    finally:
        for service, role in ((eve, "CONS"), (alcf, "CONS"), (aps, "PROD")):
            service.release(of(role=role))
        tap.close()


def test_d03_files_are_for_their_user_alone_and_gone_after_release(
    facility: Facility, application: Any, state_base: Path
) -> None:
    service = facility()
    service.request(of(targets=[application.address]))
    folder = service.config.state_dir
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert not [name for name, mode in modes.items() if mode & 0o077 and not name.endswith(("-shm", "-wal"))]
    assert modes["aps"] == 0o700  # whatever SQLite gives the files beside it, nobody gets there
    assert [*(folder / "relays").iterdir()]
    service.release(of())
    assert [*(folder / "relays").iterdir()] == []
    assert b"PRIVATE" not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert state_base.exists()


INJECTIONS: Final = (
    "127.0.0.1:9\n[exec]\nexec = /bin/sh",
    "127.0.0.1:9\r\nbind :1",
    "127.0.0.1:9 }",
    "127.0.0.1:9; touch /tmp/x",
    "$(id):9",
    "{{ 7 * 7 }}:9",
    "exec = /bin/sh",
)


@pytest.mark.parametrize("text", INJECTIONS)
def test_d04_text_of_a_user_never_becomes_configuration(caller: Caller, text: str) -> None:
    for document in (
        prod(targets=[text]),
        prod(uid=text),
        prod(managers=[text]),
        of(role="CONS", consumers=[text], offer={}),
    ):
        said = caller.ask("POST", "/streams", json=document)
        assert (said.status_code, said.json()["code"]) == (422, "bad-request"), document
    assert caller.ask("GET", "/streams").json()["streams"] == []


@pytest.mark.parametrize("uid", ["../../etc/passwd", "..", "/etc/x", "a/b", "..%2f..%2fx", "a\0b", "~root"])
def test_d05_a_uid_is_no_path(caller: Caller, served: Served, uid: str) -> None:
    assert caller.ask("POST", "/streams", json=prod(uid)).status_code == 422
    caller.ask("POST", "/streams", json=prod("beam-7")).raise_for_status()
    names = {str(path) for path in served.state_dir.rglob("*")}
    assert not [name for name in names if "beam-7" in name]


# --- D6 to D9: who may, where to


def test_d06_nobody_comes_in_without_a_token_and_nobody_touches_what_is_not_his(
    bare: httpx.Client, caller: Caller, facility: Facility
) -> None:
    caller.ask("POST", "/streams", json=prod()).raise_for_status()
    for how, path in (
        ("POST", "/streams"),
        ("GET", "/streams"),
        ("GET", "/streams/s/PROD"),
        ("PATCH", "/streams/s/PROD"),
        ("DELETE", "/streams/s/PROD"),
        ("POST", "/streams/s/PROD/renew"),
        ("POST", "/streams/s/PROD/hello"),
        ("POST", "/streams/s/PROD/ticket"),
        ("POST", "/actions/release/run"),
    ):
        assert bare.request(how, path, json={} if how != "GET" else None).status_code == 401, path
    assert caller.ask("GET", "/streams/s/PROD").json()["state"] == "LISTENING"
    service = facility("other")
    service.request(prod(), owner="urn:test:alice")
    assert service.release(of(), owner="urn:test:eve").end is None
    assert service.status(of(), owner="urn:test:alice").state == "LISTENING"
    service.release(of(), owner="urn:test:alice")


def test_d07_who_has_no_token_learns_of_no_name(bare: httpx.Client, caller: Caller) -> None:
    caller.ask("POST", "/streams", json=prod("hers")).raise_for_status()
    for how, tail in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/renew"), ("POST", "/hello")):
        told = [bare.request(how, f"/streams/{uid}/PROD{tail}") for uid in ("hers", "none", "not a name")]
        assert {(one.status_code, one.text) for one in told} == {(401, told[0].text)}


def test_d08_a_facility_as_it_is_installed_connects_nowhere(tmp_path: Path, state_base: Path) -> None:
    assert run("s2cs", "init", "fresh", "--directory", str(tmp_path)).returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path))
        with contextlib.closing(connect_facility("local:fresh")) as facility:
            for target in ("127.0.0.1:22", "169.254.169.254:80", "10.0.0.1:80", "localhost:22", "[::1]:22"):
                with pytest.raises(PolicyDenied, match="in targets"):
                    facility.request(Request(uid="s", role="PROD", targets=[target]))
    assert state_base.exists()


def test_d09_listeners_and_the_service_bind_the_address_that_was_said(
    facility: Facility, site: Callable[..., None], base: Path
) -> None:
    site("aps", {"wan_bind": "127.0.0.5", "lan_bind": "127.0.0.6"})
    service = facility()
    first = service.request(prod())
    second = service.request(of("t", "CONS", offer=first.model_dump(mode="json") | {"uid": "t"}))
    for offer, address in ((first, "127.0.0.5"), (second, "127.0.0.6")):
        host, port = split_address(offer.addresses[0])
        assert host == address
        assert is_open(f"{address}:{port}")
        assert not is_open(f"127.0.0.1:{port}")
    for uid, role in (("t", "CONS"), ("s", "PROD")):
        service.release(of(uid, role))
    with serving(base, "bound", development=True, listener_ip="127.0.0.3") as bound:
        number = bound.url.rpartition(":")[2]
        assert bound.url == f"http://127.0.0.3:{number}"
        assert not is_open(f"127.0.0.1:{number}")


# --- D10 to D14: ports and sessions


def free_range(count: int) -> tuple[int, list[socket.socket]]:
    """The first of `count` ports in a row that are free at this moment, held open."""
    for first in random.Random().sample(range(20_000, 30_000), 200):  # noqa: S311 - no secret
        held: list[socket.socket] = []
        try:
            held.extend(socket.create_server(("127.0.0.1", port)) for port in range(first, first + count))
        except OSError:
            for one in held:
                one.close()
            continue
        return first, held
    pytest.fail("no ports in a row")


def test_d10_ports_are_tested_against_the_system_never_short_and_returned(
    facility: Facility, site: Callable[..., None]
) -> None:
    first, held = free_range(4)
    for one in held[1:]:  # the first stays with a stranger
        one.close()
    site("aps", {"wan_bind": "127.0.0.1", "lan_bind": "127.0.0.1", "port_range": f"{first}-{first + 3}"})
    service = facility()
    offer = service.request(prod(num_conn=3))
    assert {split_address(one)[1] for one in offer.addresses} == {first + 1, first + 2, first + 3}
    with pytest.raises(PortsExhausted):
        service.request(prod("more", num_conn=2))
    service.release(of())
    for port in range(first + 1, first + 4):
        socket.create_server(("127.0.0.1", port)).close()  # the system says that it is free
    with pytest.raises(PortsExhausted):  # the whole list or nothing: not three of four
        service.request(prod("four", num_conn=4))
    assert len(service.request(prod("again", num_conn=3)).addresses) == 3
    service.release(of("again"))
    held[0].close()


def test_d11_a_second_session_overwrites_nothing_of_the_first(
    facility: Facility, application: Any, talk: Talk, within: Within, free_address: str
) -> None:
    aps, alcf = facility("aps"), facility("alcf")
    one = aps.request(of("one", targets=[application.address]))
    first = paired(aps, alcf, "one", one)
    two = aps.request(of("two", targets=[free_address]))
    second = paired(aps, alcf, "two", two)
    assert not {*one.addresses, *first.addresses} & {*two.addresses, *second.addresses}
    aps.update(of("one", targets=[application.address]))
    assert aps.status(of("two")).relays[0].targets == [free_address]
    within(lambda: alcf.status(of("one", "CONS")).state == "READY", timeout_s=20)
    assert talk(first.addresses[0], b"first") == sha(application.payload)
    aps.release(of("two"))
    alcf.release(of("two", "CONS"))
    assert talk(first.addresses[0], b"again") == sha(application.payload)
    alcf.release(of("one", "CONS"))
    aps.release(of("one"))


def test_d12_requests_at_the_same_time_get_each_their_own_answer(caller: Caller) -> None:
    def opened(number: int) -> dict[str, Any]:
        document = prod(f"s-{number}", targets=[f"127.0.0.1:{1000 + number}"])
        answer: dict[str, Any] = caller.ask("POST", "/streams", json=document).raise_for_status().json()
        return answer

    with ThreadPoolExecutor(12) as pool:
        offers = [*pool.map(opened, range(12))]
    assert [offer["uid"] for offer in offers] == [f"s-{number}" for number in range(12)]
    assert len({offer["relays"][0]["listeners"][0]["address"] for offer in offers}) == 12
    for number in (0, 5, 11):
        (relay,) = caller.ask("GET", f"/streams/s-{number}/PROD").json()["relays"]
        assert (relay["relay_id"], relay["targets"]) == (
            offers[number]["relays"][0]["relay_id"],
            [f"127.0.0.1:{1000 + number}"],
        )


def test_d13_sessions_that_wait_keep_nobody_waiting(caller: Caller, served: Served) -> None:
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    head = f"POST /streams HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 100\r\n\r\n{{"
    with contextlib.ExitStack() as stack:
        for number in range(12):  # as many wait for hello as the original had workers, and two more
            caller.ask("POST", "/streams", json=of(f"waits-{number}")).raise_for_status()
            stranger = stack.enter_context(socket.create_connection((host, int(port)), 10))
            stranger.sendall(head.encode())
        said = caller.ask("POST", "/streams", json=prod("next"), timeout=8)
        assert said.status_code == 200
        states = {one["uid"]: one["state"] for one in caller.ask("GET", "/streams").json()["streams"]}
    assert states.pop("next") == "LISTENING"
    assert {*states.values()} == {"WAITING_HELLO"}


# --- D15 to D19: data


@pytest.mark.usefixtures("state_base")
def test_d15_a_rate_is_megabits_a_second_of_payload_and_is_kept(application: Any, talk: Talk) -> None:
    with open_stream(*LOCAL, targets=[application.address], rate_mbits_per_s=24, linger_s=0) as stream:
        began = time.monotonic()
        assert talk(stream.listeners[0], b"") == sha(application.payload)
        took_s = time.monotonic() - began
    # 3 MB at 24 Mbit/s are a second; nobody can be much faster, however slow the machine is
    assert took_s > 0.7


@pytest.mark.usefixtures("state_base")
def test_d16_num_conn_is_listeners_and_each_takes_so_many_connections(
    facility: Facility, application: Any, within: Within
) -> None:
    aps, alcf = facility("aps"), facility("alcf")
    more: dict[str, Any] = {"num_conn": 2, "max_connections": 2}
    offer = aps.request(of(targets=[application.address], **more))
    other = paired(aps, alcf, "s", offer, **more)
    assert (len(offer.addresses), len(other.addresses)) == (2, 2)
    within(lambda: alcf.status(of(role="CONS")).state == "READY", timeout_s=20)
    with contextlib.ExitStack() as stack:

        def connected(address: str) -> bytes:
            # who is turned away may be so before connect returns
            with contextlib.suppress(ConnectionResetError):
                connection = stack.enter_context(socket.create_connection(split_address(address), 10))
                return connection.recv(1)
            return b""

        assert [len(connected(other.addresses[0])) for _ in range(3)] == [1, 1, 0]
        assert [len(connected(other.addresses[1])) for _ in range(3)] == [1, 1, 0]
    alcf.release(of(role="CONS"))
    aps.release(of())


def test_d17_many_connections_and_all_that_is_said_of_them_block_nothing(
    facility: Facility, application: Any, talk: Talk, within: Within
) -> None:
    aps, alcf = facility("aps"), facility("alcf")
    offer = aps.request(of(targets=[application.address], until="released"))
    other = paired(aps, alcf, "s", offer, until="released")
    within(lambda: alcf.status(of(role="CONS")).state == "READY", timeout_s=20)
    for number in range(60):
        # each stranger at the WAN listener is a line in the log, too
        with (
            contextlib.suppress(ConnectionResetError),
            socket.create_connection(split_address(offer.addresses[0]), 10) as stranger,
        ):
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.recv(100)
        assert talk(other.addresses[0], str(number).encode()) == sha(application.payload)
    sent = {sha(str(number).encode()) for number in range(60)}
    within(lambda: {*application.received} == sent, timeout_s=20)
    assert aps.status(of()).connections.total >= 60
    logs = [
        *(aps.config.state_dir / "relays").glob("*.jsonl"),
        *(aps.config.state_dir / "relays").glob("*.log"),
    ]
    assert sum(log.stat().st_size for log in logs) < 1 << 20
    alcf.release(of(role="CONS"))
    aps.release(of())


def test_d18_a_release_ends_the_process_and_the_listeners(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    offer = service.request(prod(num_conn=2))
    (pid,) = relays_below(state_base)
    assert all(map(is_open, offer.addresses))
    end = service.release(of()).end
    assert end is not None
    assert end.reason == "released"
    assert not any(map(is_open, offer.addresses))
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.usefixtures("state_base")
def test_d19_nothing_cuts_an_idle_connection_and_the_kernel_watches_it(
    facility: Facility, within: Within
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
        server.settimeout(30)
        target = "{}:{}".format(*server.getsockname())
        stream = stack.enter_context(open_stream(*LOCAL, targets=[target], linger_s=0))
        near = stack.enter_context(socket.create_connection(split_address(stream.listeners[0]), 30))
        far = stack.enter_context(server.accept()[0])
        near.sendall(b"before")
        assert far.recv(6) == b"before"
        # now both are silent: each of the four ends that the relays hold is watched by keepalive, and by nothing else
        (wan,) = facility("aps").status(of(stream.uid)).listeners

        def timers() -> list[str]:
            said = subprocess.run(
                ["ss", "-tno", "state", "established"], capture_output=True, text=True
            ).stdout
            held = [line.split() for line in said.splitlines()]
            ours = [
                one for one in held if stream.listeners[0] == one[2] or wan in one[2:4] or target == one[3]
            ]
            return [" ".join(one[4:]) for one in ours]

        within(lambda: len(timers()) == 4 and all("timer:(keepalive" in one for one in timers()))
        with pytest.raises(BadRequest, match="idle_timeout_s"):
            facility("aps").request(prod("x", idle_timeout_s=50))
        far.sendall(b"after all")
        near.settimeout(30)
        assert near.recv(9) == b"after all"


# --- D20 to D23: kinds of relays


def test_d20_streams_share_no_ports_no_process_and_no_end(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    offers = [service.request(prod(f"s-{number}", num_conn=number + 1)) for number in range(3)]
    ports = [split_address(address)[1] for offer in offers for address in offer.addresses]
    assert len({*ports}) == 6
    before = {*relays_below(state_base)}
    assert len(before) == 3
    service.release(of("s-1"))
    assert len({*relays_below(state_base)} & before) == 2
    assert [service.status(of(f"s-{number}")).state for number in (0, 2)] == ["LISTENING", "LISTENING"]
    for number in (0, 2):
        service.release(of(f"s-{number}"))


def test_d20_there_is_no_docker_to_choose(facility: Facility, site: Callable[..., None]) -> None:
    site("aps", {"kind": "docker"})
    with pytest.raises(ConfigError, match="'local' or 'ssh'"):
        facility()
    done = run("s2cs", "list", "--facility", "aps")
    assert (done.returncode, done.stdout) == (2, "")
    assert "kind" in done.stderr


def test_d21_the_package_has_no_templates_and_writes_nothing_into_itself(
    facility: Facility, application: Any, talk: Talk
) -> None:
    folders = [Path(scistream_flows.__file__).parent, ROOT / "actions"]

    def content() -> dict[str, str]:
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return {str(path): sha(path.read_bytes()) for path in files if path.suffix != ".pyc"}

    before = content()
    assert not [name for name in before if name.endswith((".j2", ".cfg", ".conf"))]
    with open_stream(*LOCAL, targets=[application.address], linger_s=0) as stream:
        talk(stream.listeners[0], b"x")
    assert content() == before
    assert facility().list({"protocol": 1}).streams == []


@pytest.mark.parametrize("name", ["Typo", "MockS2DS", "stunnelsubproces"])
def test_d22_an_unknown_type_is_wrong_usage_and_serves_nothing(
    name: str, tmp_path: Path, state_base: Path
) -> None:
    done = run("s2cs", f"--type={name}", "--port", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--type" in done.stderr
    assert [*state_base.iterdir()] == []


def test_d28_what_runs_is_shown_and_survives_the_service(base: Path, relays_below: Relays) -> None:
    with serving(base, "kept") as first:
        caller = Caller(first, first.token)
        caller.ask("POST", "/streams", json=prod(lease_s=600)).raise_for_status()
        status = caller.ask("GET", "/streams/s/PROD").json()
        assert status["lease_remaining_s"] > 500
        assert {"bytes", "bits_per_s", "connections", "state", "relays"} <= status.keys()
        first.kill()
        caller.close()
    (relay,) = relays_below(base)
    with serving(base, "kept") as second:
        caller = Caller(second, second.token)
        (stream,) = caller.ask("GET", "/streams").json()["streams"]
        assert (stream["uid"], stream["relays"][0]["pid"]) == ("s", relay)
        assert caller.ask("DELETE", "/streams/s/PROD").json()["end"]["reason"] == "released"
        caller.close()
    assert relays_below(base, patience_s=5) == []
    events = [
        json.loads(line)["event"] for line in (second.state_dir / "audit.jsonl").read_text().splitlines()
    ]
    assert events == ["open", "close"]


# --- D24 to D31: clients


def test_d24_one_client_talks_to_a_service_with_tls_and_without_and_never_to_one_it_cannot_prove(
    base: Path, served: Served, certificate: tuple[Path, Path]
) -> None:
    chain, key = (str(path) for path in certificate)

    def asks(one: Served, ca_file: str | None, *, deadline_s: float = 30) -> dict[str, Any]:
        service = RestService(one.url, authorizer=lambda _: one.token, ca_file=ca_file, deadline_s=deadline_s)
        with contextlib.closing(service):
            return service.answer("list", {})

    with serving(base, "tls", development=True, certificate=chain, key=key) as encrypted:
        assert (encrypted.url[:8], served.url[:7]) == ("https://", "http://")
        assert asks(encrypted, chain)["ok"]
        assert asks(served, None)["ok"]
        # no switch turns the proof off: whom it cannot prove gets no answer and no token
        with pytest.raises(FacilityUnreachable, match="certificate"):
            asks(encrypted, None, deadline_s=1)


@pytest.mark.usefixtures("state_base")
def test_d31_addresses_of_ipv6_are_read_as_such(talk: Talk) -> None:
    payload = random.Random(3).randbytes(200_000)  # noqa: S311 - no secret
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        server.settimeout(30)
        received = []

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(30)
                while block := connection.recv(1 << 16):
                    received.append(block)

        thread = threading.Thread(target=serve)
        thread.start()
        target = f"[::1]:{server.getsockname()[1]}"
        with open_stream(*LOCAL, targets=[target], linger_s=0) as stream:
            assert stream.status().prod.relays[0].targets == [target]
            talk(stream.listeners[0], payload)
            stream.wait(30).check()
        thread.join(30)
    assert sha(b"".join(received)) == sha(payload)


@pytest.mark.parametrize(
    "target", ["::1:9", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "[::1]", ":9", "a:b:c"]
)
def test_d31_what_is_no_address_is_said_and_never_cut_at_a_colon(caller: Caller, target: str) -> None:
    said = caller.ask("POST", "/streams", json=prod(targets=[target]))
    assert (said.status_code, said.json()["code"]) == (422, "bad-request")
    assert "targets" in said.json()["message"]


# --- D32 to D36: the package


def test_d32_the_package_takes_no_common_name_and_needs_no_tools(tmp_path: Path) -> None:
    looked = "import importlib.util as u; print([n for n in ('src', 'actions', 'relay') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-I", "-c", looked], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    needed = [one for one in requires("scistream-flows") or [] if "extra ==" not in one]
    names = {re.split(r"[ <>=~!;\[]", one)[0] for one in needed}
    assert not names & {
        "pytest",
        "ruff",
        "mypy",
        "flake8",
        "black",
        "grpcio",
        "docker",
        "globus-action-provider-tools",
    }
    assert not [one for one in needed if "==" in one.partition(";")[0]]  # nothing is nailed to one version


def test_d34_no_key_and_no_client_secret_is_in_the_repository() -> None:
    kept = [
        ROOT / name for name in ("scistream_flows", "actions", "tests", "examples", "docs", "relay", "tools")
    ]
    files = [path for folder in kept for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if not {"target", "__pycache__"} & {*path.relative_to(ROOT).parts}]
    secret = re.compile(
        rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{20}"
        rb"|client_secret[\"']?\s*[:=]\s*[\"'][A-Za-z0-9+/=_-]{30,}[\"']|\bsst_[A-Za-z0-9_-]{43}\b"
    )
    assert len(files) > 100
    assert not [str(path) for path in files if secret.search(path.read_bytes())]


def test_d35_bytes_go_through_real_relays_and_no_test_of_ours_asserts_nothing(
    application: Any, talk: Talk, state_base: Path, relays_below: Relays
) -> None:
    payload = random.Random(4).randbytes(1_000_000)  # noqa: S311 - no secret
    with open_stream(*LOCAL, targets=[application.address], linger_s=0) as stream:
        assert len(relays_below(state_base)) == 2
        assert talk(stream.listeners[0], payload) == sha(application.payload)
        end = stream.wait(30).check()
    assert application.received == [sha(payload)]
    assert end.cons.bytes.to_producer == len(payload)
    empty = re.compile(r"^\s*assert True\b|pytest\.mark\.xfail|pytest\.xfail\(", re.MULTILINE)
    files = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    assert not [path.name for path in files if empty.search(path.read_text())]


def test_d36_udp_is_neither_carried_nor_promised(caller: Caller) -> None:
    for document in (
        prod(targets=["udp://127.0.0.1:9"]),
        prod(transport="udp"),
        prod(targets=["127.0.0.1:9/udp"]),
    ):
        assert caller.ask("POST", "/streams", json=document).status_code == 422
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    promised = [
        line for page in pages for line in page.read_text().splitlines() if re.search(r"\bUDP\b", line)
    ]
    assert not [
        line for line in promised if not re.search(r"\b(no|not|nor|without|TCP only|only TCP)\b", line)
    ]


# --- the command line


@pytest.fixture(scope="module")
def pair(base: Path) -> Iterator[tuple[Served, Served]]:
    folder = base / "pair"
    folder.mkdir()
    with two_facilities(folder) as served:
        yield served


@pytest.fixture
def user(pair: tuple[Served, Served], tmp_path: Path, relays_below: Relays) -> Iterator[Site]:
    """Somebody at a terminal; after the test no relay of his runs."""
    folder = pair[0].state_dir.parent
    yield user_of(pair, folder, config=tmp_path / "config")
    assert relays_below(folder, patience_s=5) == []


def typed(user: Site, folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, in a folder of its own."""
    return subprocess.run(
        [*program(command), *arguments],
        cwd=folder,
        env=user.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_d14_hello_comes_when_it_comes_and_who_hangs_up_keeps_nothing(user: Site, application: Any) -> None:
    host, _, port = application.address.rpartition(":")
    say = ("create-appctrl", "late", user.prod, "-", "PROD", host, "--ports", port)
    early = user.appctrl(*say)
    assert (early.returncode, early.stdout) == (1, "")
    assert "there is no stream 'late'" in early.stderr
    waiting = user.begin("prod-req", "--uid", "late", "--s2cs", user.prod, "--num-conn", "1")
    try:
        assert waiting.stderr
        while "waiting for hello message: appctrl" not in waiting.stderr.readline():
            assert waiting.poll() is None
        assert user.appctrl(*say).returncode == 0
        said, _ = waiting.communicate(timeout=60)
    finally:
        if waiting.poll() is None:
            waiting.kill()
            waiting.communicate()
    assert waiting.returncode == 0
    assert re.search(r'(?im)^listeners: *"127\.0\.0\.1:\d+"', said)
    assert user.s2uc("release", "late").returncode == 0


@pytest.mark.parametrize("name", ["HaproxySubprocess", "S2DS"])
def test_d23_capitals_of_a_type_make_no_difference(tmp_path: Path, name: str) -> None:
    told = [
        run("s2cs", "--type", one, "--listener-ip", "nonsense", cwd=tmp_path) for one in (name, name.lower())
    ]
    assert told[0].returncode == told[1].returncode == 2
    assert told[0].stderr.lower() == told[1].stderr.lower()
    assert "Traceback" not in told[0].stderr


def test_d25_a_release_brings_the_token_that_is_pinned_to_the_service(
    base: Path, user: Site, tmp_path: Path, relays_below: Relays
) -> None:
    folder = base / "globus"
    folder.mkdir()
    with Globus() as globus, with_client(globus, folder, "known") as known:
        alice = globus.add_person("alice@example.org")
        caller = Caller(known, globus.mint(alice, known.scope))
        caller.ask("POST", "/streams", json=prod()).raise_for_status()
        config, token = tmp_path / "config", tmp_path / "alice.token"
        config.mkdir(exist_ok=True)
        token.touch(0o600)
        token.write_text(caller.token)
        (config / "tokens.toml").write_text(f'[tokens]\n"{known.url}" = "{token}"\n')
        done = user.s2uc("release", "s", "--s2cs", known.url)
        assert (done.returncode, done.stdout) == (0, "Release completed\n"), done.stderr
        assert "PROD" in done.stderr
        assert caller.ask("GET", "/streams").json()["streams"] == []
        caller.close()
    assert relays_below(folder, patience_s=5) == []


def test_d26_an_unknown_service_gets_no_token_and_the_user_is_told(user: Site, tmp_path: Path) -> None:
    seen = []

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    config, token = tmp_path / "config", tmp_path / "token"
    config.mkdir()
    token.touch(0o600)
    token.write_text("for-somebody-else")
    (config / "tokens.toml").write_text(f'[tokens]\n"https://scistream.example.org" = "{token}"\n')
    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        done = user.s2uc("list", "--s2cs", f"127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join(10)
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not answer as a facility" in done.stderr
    assert seen
    assert not [one for one in seen if "authorization" in {name.lower() for name in one}]


def test_d27_and_d29_no_token_is_shown_or_taken_as_an_argument_and_no_file_is_left_behind(
    user: Site, application: Any, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    host, _, port = application.address.rpartition(":")
    application_at = ("--remote-ip", host, "--receiver-ports", port, "--num-conn", "1")
    told = [
        typed(user, here, *words)
        for words in (
            ("s2uc", "--debug", "inbound-request", "--uid", "seen", *application_at, "--s2cs", user.prod),
            ("s2uc", "--debug", "status", "seen"),
            ("s2uc", "--debug", "list", "--s2cs", user.prod),
            ("s2uc", "check-auth"),
            ("s2uc", "--debug", "release", "seen"),
            ("appctrl", "create-appctrl", "seen", user.prod, "a-token-on-the-command-line", "PROD"),
        )
    ]
    assert [one.returncode for one in told[:3]] == [0, 0, 0], [one.stderr for one in told]
    assert (told[4].returncode, told[5].returncode) == (0, 2), told[4].stderr
    assert "can be read by everybody" in told[5].stderr
    shown = "".join(one.stdout + one.stderr for one in told)
    for served in user.served:
        assert served.token not in shown
    assert [*here.iterdir()] == []
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path.name for path in kept if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_d30_whatever_is_not_done_has_an_exit_code_and_no_data(user: Site, tmp_path: Path) -> None:
    wrong: list[tuple[int, tuple[str, ...]]] = [
        (1, ("s2uc", "inbound-request", "--remote-ip", "192.0.2.1", "--s2cs", user.prod)),
        (2, ("s2uc", "outbound-request", "never", "127.0.0.1:5100", "--s2cs", user.cons)),
        (2, ("s2uc", "outbound-request", "../x", "127.0.0.1:5100", "--s2cs", user.cons)),
        (1, ("s2uc", "status", "never")),
        (2, ("s2uc", "no-such-command")),
        (1, ("appctrl", "create-appctrl", "never", user.prod, "-", "PROD")),
        (2, ("appctrl", "create-appctrl", "never", user.prod, "-", "MIDDLE")),
    ]
    with ThreadPoolExecutor(4) as pool:
        ended = [*pool.map(lambda one: typed(user, tmp_path, *one[1]), wrong)]
    for (code, words), done in zip(wrong, ended, strict=True):
        assert done.returncode == code, (words, done.stderr)
        assert (done.stdout.count("istener"), done.stderr.count("Traceback")) == (0, 0), words
        assert done.stderr.strip(), words


def test_d33_a_port_that_is_taken_is_said_and_whoever_has_it_lives_on(user: Site, tmp_path: Path) -> None:
    listens = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{listens}; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout
        port = other.stdout.readline().strip()
        done = typed(user, tmp_path, "appctrl", "run-producer", port, "--count", "1")
        assert (done.returncode, done.stdout) == (1, "")
        assert f"port {port} cannot be bound" in done.stderr
        served = typed(user, tmp_path, "appctrl", "iperf-server", port)
        assert served.returncode != 0
        assert other.poll() is None
        assert is_open(f"127.0.0.1:{port}")
        other.communicate("", timeout=20)
        assert other.returncode == 0
