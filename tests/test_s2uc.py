"""`s2uc` as its users type it: the real command as a process, against real services, with real relays and bytes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from serving import Served, serving
from users import Site, assert_no_relay_below, program, released, sha, two_facilities, user_of

from scistream_flows.cli.answer import Answer
from scistream_flows.cli.console import run
from scistream_flows.cli.ledger import Entry, Ledger, Place
from scistream_flows.cli.listing import put_streams
from scistream_flows.cli.pin import Named, offer_at, peer_in_words, pinned, read_peer, read_places
from scistream_flows.cli.s2uc import Asked, s2uc
from scistream_flows.config import load_facility
from scistream_flows.errors import BadRequest, ConfigError
from scistream_flows.facility import RestFacility
from scistream_flows.models import Hello, Offer, Peer, Release, Status, read
from scistream_flows.s2cs import S2CS
from scistream_flows.stream import ROLES

MOCK_UID = "4f8583bc-a4d3-11ee-9fd6-034d1fcbd7c3"

# As the scripts of StreamHub and of the tutorial find what they need; the first is 1.2.1, the rest what came before.
LISTENERS_121 = re.compile(r"^Listeners: \['([^']+)'(?:, '[^']+')*\]$", re.MULTILINE)
LISTENERS_120 = re.compile(r'(?im)^listeners:\s*"([^"]+)"')
PROD_LISTENERS = re.compile(r'(?im)^prod_listeners:\s*"([^"]+)"')
UID_LINE = re.compile(r"^([a-f0-9-]{36})\s+(\S+) - (PROD|CONS)$", re.MULTILINE)
UID_OF_STREAMHUB = re.compile(r"^([a-f0-9-]{36})\s+.*INVALID_TOKEN PROD", re.MULTILINE)

Talk: TypeAlias = Callable[[str, bytes], str]

pytestmark = pytest.mark.timeout(100)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, tuple[Served, Served]]]:
    base = tmp_path_factory.mktemp("pair")
    with two_facilities(base) as served:
        yield base, served


@pytest.fixture
def site(pair: tuple[Path, tuple[Served, Served]], tmp_path: Path) -> Iterator[Site]:
    """A user with a directory of his own. After the test he has no stream, no relay runs, and no token is kept."""
    base, served = pair
    yield user_of(served, base, config=tmp_path / "config")
    assert_no_relay_below(base)
    assert served[0].token not in "".join(one.read_text() for one in tmp_path.rglob("*.json"))


# --- a session of the user guide


def test_both_sides_as_in_the_tutorial(site: Site, application: Any, talk: Talk) -> None:
    """Read as the scripts of StreamHub and the tutorial read it, in the spelling of the documentation of 1.x."""
    host, _, port = application.address.rpartition(":")
    inbound = site.s2uc(
        "inbound_request",
        f"--remote_ip={host}",
        f"--receiver_ports={port}",
        "--num_conn",
        "1",
        "--s2cs",
        site.prod,
    )
    assert inbound.returncode == 0, inbound.stderr
    header, line, *_ = inbound.stdout.splitlines()
    assert header == "uid; s2cs; access_token; role"
    found = UID_LINE.fullmatch(line)
    assert found is not None
    assert found.groups() == (str(uuid.UUID(found[1])), site.prod, "PROD")
    (listener,) = LISTENERS_120.findall(inbound.stdout)
    assert LISTENERS_121.findall(inbound.stdout) == [listener]
    assert PROD_LISTENERS.findall(inbound.stdout) == [application.address]
    with released(site, found[1]):
        outbound = site.s2uc(
            "outbound_request",
            found[1],
            f"{listener},",
            "--num_conn",
            "1",
            "--s2cs",
            site.cons,
            "--wait_s",
            "20",
        )
        assert outbound.returncode == 0, outbound.stderr
        assert UID_LINE.findall(outbound.stdout) == [(found[1], site.cons, "CONS")]
        assert PROD_LISTENERS.findall(outbound.stdout) == [listener]
        (entry,) = LISTENERS_120.findall(outbound.stdout)
        assert "READY" in outbound.stderr
        assert talk(entry, b"to the producer") == sha(application.payload)
    assert application.received == [sha(b"to the producer")]
    for served in site.served:
        assert served.token not in inbound.stdout + inbound.stderr + outbound.stdout + outbound.stderr


def test_the_words_of_1_2_for_scripts_that_look_for_them(site: Site, application: Any) -> None:
    """Chosen by an option or, for a script that nobody edits, by the environment."""
    host, _, port = application.address.rpartition(":")
    given = ("--remote_ip", host, "--receiver_ports", port, "--num_conn", 3, "--s2cs", site.prod)
    done = site.s2uc("inbound-request", *given, S2UC_FORMAT="legacy-1.2")
    assert done.returncode == 0, done.stderr
    uid = UID_LINE.findall(done.stdout)[0][0]
    with released(site, uid):
        assert UID_OF_STREAMHUB.findall(done.stdout) == [uid]
        assert done.stdout.splitlines()[1].split()[0] == uid
        for words in (
            "started client request",
            "waiting for hello message",
            "Hello message sent successfully",
        ):
            assert words in done.stdout.splitlines()
        assert len(LISTENERS_120.findall(done.stdout)) == 3


def test_a_request_as_one_document(site: Site, application: Any) -> None:
    said = site.inbound(application.address)
    with released(site, said["uid"]):
        assert said["protocol"] == 1
        assert said["role"] == "PROD"
        assert said["listeners"] == read(Offer, said["offer"]).addresses
        assert said["pins"] == pinned(read(Offer, said["offer"]))


def test_defaults_are_those_of_1_2(site: Site) -> None:
    done = site.s2uc("inbound-request", "--s2cs", site.prod)
    assert done.returncode == 0, done.stderr
    uid = UID_LINE.findall(done.stdout)[0][0]
    with released(site, uid):
        assert len(LISTENERS_120.findall(done.stdout)) == 5
        ports = [one.rpartition(":")[2] for one in PROD_LISTENERS.findall(done.stdout)]
        assert ports == ["5074", "5075", "5076", "37000", "47000"]
        (status,) = site.document("status", uid)["streams"]
        assert status["state"] == "LISTENING"
        assert 3500 < status["lease_remaining_s"] <= 3600


def test_a_rate_that_is_asked_for_is_reserved_and_the_default_is_a_cap(
    site: Site, application: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCISTREAM_STATE_DIR", site.environment["SCISTREAM_STATE_DIR"])
    asked, default = site.inbound(application.address, "--rate", 200), site.inbound(application.address)
    with released(site, asked["uid"]), released(site, default["uid"]), S2CS(load_facility("aps")) as service:
        (gateway,) = service.gateways()
    assert gateway.reserved_mbits_per_s == 200


# --- the two sides know of each other


def test_what_prod_has_offered_is_kept_for_its_user_alone(
    site: Site, application: Any, tmp_path: Path
) -> None:
    said = site.inbound(application.address)
    with released(site, said["uid"]):
        folder = tmp_path / "config" / "s2uc"
        (kept,) = (folder / "streams").glob("*.json")
        assert said["uid"] not in kept.name
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert json.loads(kept.read_text())["sides"]["PROD"]["offer"]["uid"] == said["uid"]
    assert list((folder / "streams").glob("*.json")) == []


def test_from_another_machine_without_a_key_it_names_both_ways(
    site: Site, application: Any, tmp_path: Path
) -> None:
    said = site.inbound(application.address)
    elsewhere = {"SCISTREAM_CONFIG_DIR": str(tmp_path / "elsewhere")}
    with released(site, said["uid"]):
        done = site.outbound(said["uid"], said["listeners"][0], "--mode", "none", **elsewhere)
        assert (done.returncode, done.stdout) == (2, "")
        assert "no key is known" in done.stderr
        assert "IP:PORT#PIN" in done.stderr
        assert f"s2uc update {said['uid']} --peer PIN" in done.stderr
        assert site.document("list", "--s2cs", site.cons)["streams"] == []


def test_from_another_machine_pins_go_both_ways(
    site: Site, application: Any, talk: Talk, tmp_path: Path
) -> None:
    host, _, port = application.address.rpartition(":")
    given = ("--remote-ip", host, "--receiver-ports", port, "--num-conn", 2, "--s2cs", site.prod)
    said = site.document("inbound-request", *given)
    elsewhere = {"SCISTREAM_CONFIG_DIR": str(tmp_path / "elsewhere")}
    with released(site, said["uid"]):
        done = site.s2uc(
            "cons-req", said["uid"], said["pins"], "--num-conn", 2, "--s2cs", site.cons, **elsewhere
        )
        assert done.returncode == 0, done.stderr
        (peers,) = re.findall(r"^Peers: (.+)$", done.stdout, re.MULTILINE)
        try:
            words = [word for one in peers.split() for word in ("--peer", one)]
            assert f"s2uc update {said['uid']} {' '.join(words)}" in done.stderr
            told = site.s2uc("update", said["uid"], *words)
            assert told.returncode == 0, told.stderr
            for entry in LISTENERS_120.findall(done.stdout):
                assert talk(entry, b"hello") == sha(application.payload)
        finally:
            assert site.s2uc("release", said["uid"], **elsewhere).returncode == 0


def test_a_peer_with_another_key_is_not_admitted(site: Site, application: Any) -> None:
    said = site.inbound(application.address)
    wrong = said["pins"].replace(said["pins"].partition("#")[2][:8], "AAAAAAAA")
    with released(site, said["uid"]):
        done = site.outbound(said["uid"], wrong, "--wait-s", 2)
        assert done.returncode == 1
        assert "is not ready" in done.stderr
        sides = {one["role"]: one for one in site.document("status", said["uid"])["streams"]}
        assert sides["CONS"]["state"] == "LISTENING"


def test_prod_that_has_ended_leaves_no_consumer_side(site: Site, application: Any) -> None:
    said = site.inbound(application.address)
    with RestFacility(site.prod, authorizer=lambda _: site.served[0].token) as facility:
        facility.release(Release(uid=said["uid"], role="PROD"))
    done = site.outbound(said["uid"], said["listeners"][0])
    assert done.returncode == 1
    assert "has ended" in done.stderr
    assert site.document("list", "--s2cs", site.cons)["streams"] == []
    assert site.s2uc("release", said["uid"]).returncode == 0


# --- hello


def test_prod_req_waits_for_a_hello_and_then_says_where_it_listens(
    site: Site, application: Any, talk: Talk
) -> None:
    waiting = site.begin("prod-req", "--num_conn", 1, "--s2cs", site.prod)
    try:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "uid; s2cs; access_token; role\n"
        found = UID_LINE.fullmatch(waiting.stdout.readline().rstrip())
        assert found is not None
        time.sleep(0.3)
        assert waiting.poll() is None
        with RestFacility(site.prod, authorizer=lambda _: site.served[0].token) as facility:
            facility.hello(Hello(uid=found[1], role="PROD", targets=[application.address]))
        stdout, stderr = waiting.communicate(timeout=30)
    finally:
        waiting.kill()
        waiting.wait()
    assert waiting.returncode == 0, stderr
    assert PROD_LISTENERS.findall(stdout) == [application.address]
    (listener,) = LISTENERS_120.findall(stdout)
    with released(site, found[1]):
        done = site.s2uc("cons-req", found[1], listener, "--num_conn", 1, "--s2cs", site.cons)
        assert talk(LISTENERS_120.findall(done.stdout)[0], b"x") == sha(application.payload)


def test_a_hello_that_never_comes_ends_the_side(site: Site) -> None:
    done = site.s2uc("prod-req", "--s2cs", site.prod, "--hello-timeout-s", "1")
    assert done.returncode == 1
    assert "no hello has come" in done.stderr
    assert site.document("list", "--s2cs", site.prod)["streams"] == []


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_request_that_is_interrupted_leaves_nothing(site: Site, by: signal.Signals) -> None:
    waiting = site.begin("prod-req", "--s2cs", site.prod)
    try:
        assert waiting.stdout is not None
        assert waiting.stdout.readline()
        waiting.send_signal(by)
        assert waiting.wait(30) == 130
    finally:
        waiting.kill()
        waiting.communicate()
    assert site.document("list", "--s2cs", site.prod)["streams"] == []


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_request_that_is_interrupted_before_its_answer_leaves_nothing(
    site: Site, application: Any, by: signal.Signals
) -> None:
    registry = site.served[0].state_dir / "registry.sqlite"
    host, _, port = application.address.rpartition(":")
    where = ("--remote-ip", host, "--receiver-ports", port, "--s2cs", site.prod, "--uid", f"cut-{by}")
    with contextlib.closing(sqlite3.connect(registry)) as database:
        asking = site.begin("inbound-request", *where, "--format", "json")
        try:
            deadline = time.monotonic() + 30
            while not database.execute("SELECT 1 FROM streams WHERE uid = ?", (f"cut-{by}",)).fetchall():
                assert time.monotonic() < deadline
            asking.send_signal(by)
            stdout, stderr = asking.communicate(timeout=30)
        finally:
            asking.kill()
            asking.communicate()
    assert (asking.returncode, stdout) == (130, ""), stderr
    assert site.document("list", "--s2cs", site.prod)["streams"] == []


@pytest.mark.parametrize("form", ["default", "json"])
def test_a_side_whose_answer_cannot_be_written_is_released(site: Site, application: Any, form: str) -> None:
    host, _, port = application.address.rpartition(":")
    where = ("--remote-ip", host, "--receiver-ports", port, "--s2cs", site.prod, "--format", form)
    with Path("/dev/full").open("w") as full:
        words = [*program("s2uc"), "inbound-request", *where]
        done = subprocess.run(
            words, env=site.environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert site.document("list", "--s2cs", site.prod)["streams"] == []


def test_a_side_that_was_open_before_outlives_a_request_for_it_that_fails(
    site: Site, application: Any
) -> None:
    said = site.inbound(application.address, "--uid", "again")
    with released(site, "again"), Path("/dev/full").open("w") as full:
        host, _, port = application.address.rpartition(":")
        where = ("--remote-ip", host, "--receiver-ports", port, "--num-conn", "1", "--s2cs", site.prod)
        words = [*program("s2uc"), "inbound-request", *where, "--uid", "again"]
        done = subprocess.run(words, env=site.environment, stdout=full, stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 1
        (left,) = site.document("list", "--s2cs", site.prod)["streams"]
        assert [one["address"] for one in left["relays"][0]["listeners"]] == said["listeners"]


# --- mock


@pytest.mark.parametrize(
    ("command", "spelled"), [("prod-req", ("--mock", "True")), ("inbound-request", ("--mock",))]
)
def test_mock_asks_nobody_and_says_that_it_is_one(site: Site, command: str, spelled: tuple[str, ...]) -> None:
    done = site.s2uc(command, *spelled, "--s2cs", "192.0.2.1:5000", "--num_conn", 2)
    assert done.returncode == 0, done.stderr
    assert UID_LINE.findall(done.stdout) == [(MOCK_UID, "192.0.2.1:5000", "PROD")]
    addresses = LISTENERS_120.findall(done.stdout)
    assert addresses == ["mock:5100", "mock:5101"]
    assert LISTENERS_121.findall(done.stdout) == ["mock:5100"]
    assert "never is READY" in done.stderr
    other = site.s2uc("outbound-request", MOCK_UID, ",".join(addresses), "--s2cs", "192.0.2.1:6000")
    assert (other.returncode, LISTENERS_120.findall(other.stdout)[0]) == (0, "mock:5100")
    assert "READY" not in site.s2uc("status", MOCK_UID).stdout
    assert site.s2uc("release", MOCK_UID).stdout == "Release completed\n"


def test_mock_false_is_no_mock(site: Site) -> None:
    done = site.s2uc("inbound-request", "--mock", "False", "--s2cs", "127.0.0.1:1")
    assert done.returncode == 1
    assert "nobody serves at" in done.stderr


# --- release, status, list


def test_release_ends_both_sides_wherever_they_are_and_repeats(site: Site, application: Any) -> None:
    said = site.inbound(application.address)
    assert site.outbound(said["uid"], said["listeners"][0]).returncode == 0
    done = site.s2uc("release", said["uid"])
    assert (done.returncode, done.stdout) == (0, "Release completed\n")
    assert "(PROD)" in done.stderr
    assert "(CONS)" in done.stderr
    again = site.s2uc("release", said["uid"], "--s2cs", site.prod)
    assert (again.returncode, again.stdout) == (0, "Release completed\n")
    assert "there was no stream" in again.stderr or "has ended" in again.stderr


def test_one_side_can_be_released_alone(site: Site, application: Any) -> None:
    said = site.inbound(application.address)
    assert site.outbound(said["uid"], said["listeners"][0]).returncode == 0
    with released(site, said["uid"]):
        assert site.s2uc("release", said["uid"], "--role", "CONS").returncode == 0
        (left,) = site.document("list")["streams"]
        assert (left["uid"], left["role"]) == (said["uid"], "PROD")


def test_an_error_of_release_begins_as_in_1_2_and_is_no_success(site: Site) -> None:
    done = site.s2uc("release", "some-uid", "--s2cs", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Error during release: nobody serves at http://127.0.0.1:1" in done.stderr


def test_status_and_list_show_the_streams_of_the_user(site: Site, application: Any) -> None:
    said = site.inbound(application.address, "--uid", "tomography-7")
    with released(site, "tomography-7"):
        assert said["uid"] == "tomography-7"
        assert site.outbound("tomography-7", said["listeners"][0], "--wait-s", 20).returncode == 0
        for command in (("status", "tomography-7"), ("check_status", "tomography-7"), ("list",)):
            done = site.s2uc(*command)
            assert done.returncode == 0, done.stderr
            heading, *rows = done.stdout.splitlines()
            assert heading.split()[:3] == ["UID", "ROLE", "STATE"]
            assert [row.split()[:3] for row in rows] == [
                ["tomography-7", "CONS", "READY"],
                ["tomography-7", "PROD", "READY"],
            ]
    unknown = site.s2uc("status", "never-was")
    assert unknown.returncode == 1
    assert "Name its facility with --s2cs" in unknown.stderr
    assert site.s2uc("status", "never-was", "--s2cs", site.prod).returncode == 1


def test_a_facility_that_is_away_does_not_hide_the_streams_of_the_others(
    site: Site, application: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = site.inbound(application.address, "--uid", "here")
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", site.environment["SCISTREAM_CONFIG_DIR"])
    with released(site, "here"):
        away = Entry(place=Place(address="127.0.0.1:1"), offer=read(Offer, said["offer"]))
        Ledger().keep("there", "PROD", away)
        done = site.s2uc("list")
        assert done.returncode == 1
        assert [row.split()[0] for row in done.stdout.splitlines()] == ["UID", "here"]
        assert "nobody serves at http://127.0.0.1:1" in done.stderr
        assert "1 of 2 facilities could not be asked: 127.0.0.1:1" in done.stderr
        document = site.s2uc("list", "--format", "json")
        assert document.returncode == 1
        assert [one["uid"] for one in json.loads(document.stdout)["streams"]] == ["here"]


def test_a_stream_that_has_long_been_over_is_forgotten(
    site: Site, application: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = site.inbound(application.address, "--uid", "lives")
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", site.environment["SCISTREAM_CONFIG_DIR"])
    ledger = Ledger()
    with released(site, "lives"):
        record = ledger.find("lives")
        assert record is not None
        entry = Entry(place=record.sides["PROD"].place, offer=read(Offer, said["offer"]))
        for uid in ("over", "just-over"):
            for role in ROLES:
                ledger.keep(uid, role, entry)
        for record in ledger.all():
            if record.uid != "just-over":
                file = next(
                    one for one in ledger.folder.glob("*.json") if f'"{record.uid}"' in one.read_text()
                )
                os.utime(file, (0, time.time() - 2 * 86_400))
        assert site.s2uc("list").returncode == 0
        assert {one.uid for one in ledger.all()} == {"lives", "just-over"}


def test_a_server_that_is_not_trusted_is_given_up_at_once(
    site: Site, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    chain, key = map(str, certificate)
    with serving(tmp_path, "own", development=True, certificate=chain, key=key) as served:
        done = site.s2uc("list", "--s2cs", served.url)
        assert done.returncode == 1
        assert f"{served.url} does not prove who it is" in done.stderr
        assert len(done.stderr.splitlines()) == 3
        junk = tmp_path / "junk.crt"
        junk.write_text("junk")
        done = site.s2uc("list", "--s2cs", served.url, "--server_cert", junk)
        assert done.returncode == 2
        assert f"{junk} has no certificates that could be trusted" in done.stderr


# --- usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prod-req", "--bogus"), "--bogus"),
        (("prod-req", "--lease-s", "9" * 400), "is longer than 3660 d"),
        (("no-such-command",), "no-such-command"),
        (("inbound-request", "--receiver_ports", "80,x"), "are not ports"),
        (("inbound-request", "--receiver_ports", "70000"), "are not ports"),
        (("outbound-request", "u", "nowhere"), "HOST:PORT"),
        (("outbound-request", "u", "127.0.0.1:1#short"), "is not a pin"),
        (("outbound-request", "u", ","), "names no listener"),
        (("update", "u", "--peer", "short"), "is not the pin"),
        (("plot", "u", "--output", "/nowhere/u.png"), "nothing can be written in /nowhere"),
        (("release", "../etc/passwd", "--s2cs", "local:aps"), "uid"),
        (("list", "--s2cs", "somewhere"), "is not the address of a facility"),
        (("list", "--s2cs", "http://aps.example.org"), "plain http"),
        (("list", "--s2cs", "127.0.0.1:1", "--server_cert", "none.crt"), "there is no certificate none.crt"),
    ],
    ids=lambda one: "-".join(one) if isinstance(one, tuple) else "",
)
def test_wrong_usage_is_exit_code_2_and_leaves_stdout_alone(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "argv", ["s2uc", *arguments])
    with pytest.raises(SystemExit) as left:
        run(s2uc, name="s2uc", asked=Asked())
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (2, "")
    assert words in said.err
    assert "Traceback" not in said.err


STEERING = "\x1b]0;title\x07\x1b[2J"


def test_a_facility_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    relay = {"relay_id": "0" * 32, "role": "PROD", "state": "READY", "gateway": f"dtn{STEERING}"}
    side = {"uid": "u", "role": "PROD", "owner": "urn:test:a", "mode": "tls", "state": "READY"}
    more = {"message": STEERING, "limiting": {"leg": f"wan{STEERING}"}, "relays": [relay]}
    put_streams([Status.model_validate({**side, **more})])
    answer = Answer("default", uid="u", address="127.0.0.1:1", role="PROD")
    answer.listeners([], onwards=[f"127.0.0.1:1{STEERING}"], lines={}, more={})
    said = capsys.readouterr()
    assert r"dtn\x1b]0;title\x07" in said.out
    assert not set(said.out + said.err) & set("\x1b\x07")


@pytest.mark.parametrize("wrong", ["NaN", "Infinity", "1e999", "1" + 400 * "0"])
def test_a_figure_that_is_none_is_said_in_words(wrong: str) -> None:
    side = (
        '{"protocol": 1, "uid": "u", "role": "PROD", "owner": "urn:test:a", "mode": "tls", "state": "READY"'
    )
    with pytest.raises(BadRequest, match="lease_remaining_s: Input should be a finite number"):
        read(Status, json.loads(f'{side}, "lease_remaining_s": {wrong}}}'))


@pytest.mark.parametrize("spelled", ["--version", "-v"])
def test_it_says_its_version(site: Site, spelled: str) -> None:
    assert re.fullmatch(r"s2uc, version \d+\.\d+\.\d+\n", site.s2uc(spelled).stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_its_words(site: Site, shell: str) -> None:
    script = site.s2uc("completion", shell)
    assert script.returncode == 0
    assert "_S2UC_COMPLETE" in script.stdout
    words = {"COMP_WORDS": "s2uc outb", "COMP_CWORD": "outb" if shell == "fish" else "1"}
    done = site.s2uc(_S2UC_COMPLETE=f"{shell}_complete", **words)
    assert "outbound-request" in done.stdout


def test_what_cannot_be_read_leaves_a_completion_without_words(site: Site) -> None:
    streams = Path(site.environment["SCISTREAM_CONFIG_DIR"]) / "s2uc" / "streams"
    site.s2uc("status", "any")  # makes the directory
    (streams / "torn.json").write_text("{")
    words = {"COMP_WORDS": "s2uc status ", "COMP_CWORD": "2"}
    done = site.s2uc(_S2UC_COMPLETE="bash_complete", **words)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# --- pins and the ledger, by themselves

KEY, OTHER = "k" * 43, "o" * 43


def offered() -> Offer:
    """Two relays; listeners 0 and 2 are of the first one."""
    relays = [
        {
            "relay_id": letter * 32,
            "gateway": letter,
            "public_key": key,
            "listeners": [{"index": index, "address": f"192.0.2.1:{5100 + index}"} for index in indices],
        }
        for letter, key, indices in (("a", KEY, (0, 2)), ("b", OTHER, (1, 3, 4)))
    ]
    fields = {"uid": "u", "role": "PROD", "mode": "tls", "lease_remaining_s": 1, "relays": relays}
    return read(Offer, {"protocol": 1, **fields})


def listeners_of(offer: Offer) -> dict[str, tuple[str, int]]:
    return {one.address: (relay.public_key, one.index) for relay in offer.relays for one in relay.listeners}


def test_pins_lead_back_to_the_offer() -> None:
    words = pinned(offered())
    assert words.count("#") == 4
    again = offer_at(read_places(words), uid="u", mode="tls", known=None)
    assert listeners_of(again) == listeners_of(offered())


def test_an_address_that_is_not_known_is_the_listener_at_its_position() -> None:
    named = [Named("198.51.100.1:30710", None), Named("198.51.100.1:30711", None)]
    found = offer_at(named, uid="u", mode="tls", known=offered())
    assert listeners_of(found) == {"198.51.100.1:30710": (KEY, 0), "198.51.100.1:30711": (OTHER, 1)}
    only = offer_at([Named("192.0.2.1:5103", None)], uid="u", mode="tls", known=offered())
    assert listeners_of(only) == {"192.0.2.1:5103": (OTHER, 3)}


def test_more_addresses_than_listeners_are_refused() -> None:
    named = [Named(f"198.51.100.1:{port}", None) for port in range(1, 7)]
    with pytest.raises(BadRequest, match="no key is known"):
        offer_at(named, uid="u", mode="tls", known=offered())


def test_a_peer_leads_back_to_itself() -> None:
    for peer in (
        Peer(public_key=KEY),
        read(Peer, {"protocol": 1, "public_key": KEY, "source_addresses": ["192.0.2.0/24", "2001:db8::1"]}),
    ):
        assert read_peer(peer_in_words(peer)) == peer


def test_a_ledger_that_others_could_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path))
    entry = Entry(place=Place(address="local:aps"), offer=offered())
    Ledger().keep("u", "PROD", entry)
    (tmp_path / "s2uc").chmod(0o770)
    with pytest.raises(ConfigError, match="not a directory of this user alone"):
        Ledger()
