"""`s2cs` as an administrator uses it: the real command as a process, real streams, real relays."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from scistream_flows import open_stream
from scistream_flows.cli.console import in_time, in_units
from scistream_flows.config import load_facility
from scistream_flows.errors import CapacityExhausted, NotFound
from scistream_flows.models import Offer
from scistream_flows.s2cs import S2CS

Done: TypeAlias = "subprocess.CompletedProcess[str]"
Run: TypeAlias = Callable[..., Done]
Begin: TypeAlias = Callable[..., "subprocess.Popen[str]"]
Facility: TypeAlias = Callable[..., S2CS]

ALICE, BOB = "urn:test:alice", "urn:test:bob"
COMMAND = [
    *(sys.executable, "-W", "error", "-c"),
    "from scistream_flows.actions.administration import main; main()",
]
# Runs a command and says how much memory it took at most, KiB. What its parent has would count: this one has little.
MEASURED = [
    *(sys.executable, "-S", "-c"),
    """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)""",
]
TWO_GATEWAYS = """
[facility]
name = "aps"
[[gateway]]
name = "gw1"
wan_bind = "127.0.0.1"
lan_bind = "127.0.0.1"
port_range = "{first}-{last}"
capacity_mbits_per_s = 100000
[[gateway]]
name = "gw2"
wan_bind = "127.0.0.1"
lan_bind = "127.0.0.1"
[policy]
users = ["all_authenticated_users"]
targets = ["127.0.0.0/8"]
"""


@pytest.fixture
def s2cs(state_base: Path) -> Run:  # noqa: ARG001 - where the state goes
    """A function that runs the command to its end, without a terminal."""

    def run(*arguments: object, **variables: str) -> Done:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def begin(state_base: Path) -> Iterator[Begin]:  # noqa: ARG001 - where the state goes
    """A function that starts the command; what still runs after the test is ended."""
    with contextlib.ExitStack() as ended:

        def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            ended.enter_context(process)
            ended.callback(process.kill)
            return process

        yield start


@pytest.fixture
def two_gateways(facility: Facility, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S2CS:
    """The service of a configured facility `aps` with the gateways gw1 and gw2."""
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "aps.toml").write_text(TWO_GATEWAYS.format(first=47_000, last=47_999))
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(folder))
    return facility()


def prod(uid: str = "s", **changes: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": "PROD", "targets": ["127.0.0.1:9"]} | changes


def cons(offer: Offer, **changes: Any) -> dict[str, Any]:
    return {
        "protocol": 1,
        "uid": offer.uid,
        "role": "CONS",
        "offer": offer.model_dump(mode="json"),
    } | changes


def document(done: Done) -> dict[str, Any]:
    """The one JSON document of stdout."""
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    assert read["protocol"] == 1
    return read


def sides(service: S2CS) -> list[tuple[str, str, str]]:
    return sorted((one.uid, one.role, one.owner) for one in service.survey().streams)


def on_a_terminal(*arguments: object, answer: str = "", **variables: str) -> tuple[int, str]:
    """The exit code of the command on a terminal, and all that it shows there."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=os.environ | {"TERM": "xterm"} | variables,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    shown, deadline = b"", time.monotonic() + 60
    try:
        with contextlib.suppress(OSError):  # that is how a terminal ends
            while select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
                shown += os.read(terminal, 4096)
                if answer and shown.rstrip().endswith(b"[y/N]:"):
                    os.write(terminal, answer.encode())
                    answer = ""
        return process.wait(20), shown.decode()
    finally:
        os.close(terminal)
        process.kill()
        process.wait()


# --- list


def test_list_shows_the_streams_of_everybody(facility: Facility, s2cs: Run) -> None:
    service = facility()
    service.request(prod("a", lease_s=600), owner=ALICE)
    service.request(cons(service.request(prod("b"), owner=BOB)), owner=BOB)
    done = s2cs("list", "--facility", "aps")
    heading, *rows = done.stdout.splitlines()
    assert heading.split()[:4] == ["UID", "ROLE", "STATE", "MODE"]
    cells = [re.split(r"  +", row) for row in rows]
    assert [(row[0], row[1], row[-1]) for row in cells] == [
        ("a", "PROD", ALICE),
        ("b", "CONS", BOB),
        ("b", "PROD", BOB),
    ]
    assert cells[0][2:7] == ["LISTENING", "tls", "0 bit/s", "0 bit/s", "0"]
    assert re.fullmatch(r"9 min 5\d s|10 min", cells[0][7])
    assert cells[0][-2] == "local"
    told = document(s2cs("--facility", "aps", "--format", "json", "list"))
    assert told["facility"] == "aps"
    assert sorted((one["uid"], one["role"], one["owner"]) for one in told["streams"]) == sides(service)
    service.evict()


def test_list_of_one_owner_and_of_what_has_ended(facility: Facility, s2cs: Run) -> None:
    service = facility()
    for uid, owner in (("a", ALICE), ("b", BOB), ("c", BOB)):
        service.request(prod(uid), owner=owner)
    service.evict(uid="c")
    of_bob = document(s2cs("list", "--facility", "aps", "--owner", BOB, "--format", "json"))
    assert [one["uid"] for one in of_bob["streams"]] == ["b"]
    with_ended = s2cs("list", "--facility", "aps", "--owner", BOB, "--ended")
    assert re.search(r"^c +PROD +ENDED admin +tls +-", with_ended.stdout, re.MULTILINE)
    service.evict()


def test_a_stream_with_data_shows_rates_in_units_and_what_limits(
    s2cs: Run, facility: Facility, application: Any, talk: Callable[[str, bytes], str]
) -> None:
    facility()
    with open_stream("local:aps", "local:alcf", targets=[application.address], uid="data") as stream:
        talk(stream.listeners[0], b"x")
        row = s2cs("list", "--facility", "aps").stdout.splitlines()[1]
        assert re.search(r"^data +PROD +(STREAMING|READY|DRAINING)", row)
        assert len(re.findall(r"[0-9.]+ [kMGT]?bit/s", row)) == 2


def test_an_empty_list_says_so_beside_the_data(facility: Facility, s2cs: Run) -> None:
    facility()
    done = s2cs("list", "--facility", "aps")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "facility aps has no streams\n")
    assert document(s2cs("list", "--facility", "aps", "--format", "json"))["streams"] == []


# --- release


def test_release_ends_both_sides_of_a_stream_or_one(facility: Facility, s2cs: Run) -> None:
    service = facility()
    service.request(cons(service.request(prod("a"), owner=ALICE)), owner=ALICE)
    service.request(cons(service.request(prod("b"), owner=ALICE)), owner=ALICE)
    done = s2cs("release", "a", "--facility", "aps")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(line.split(" has ended: ")[0] for line in done.stdout.splitlines()) == [
        f"a (CONS) of {ALICE}",
        f"a (PROD) of {ALICE}",
    ]
    one = document(s2cs("release", "b", "--role", "cons", "--facility", "aps", "--format", "json"))
    assert [(side["uid"], side["role"], side["end"]["reason"]) for side in one["released"]] == [
        ("b", "CONS", "admin")
    ]
    assert sides(service) == [("b", "PROD", ALICE)]
    service.evict()


def test_a_name_that_several_owners_use_needs_the_owner(facility: Facility, s2cs: Run) -> None:
    service = facility()
    service.request(prod(), owner=ALICE)
    service.request(prod(), owner=BOB)
    refused = s2cs("release", "s", "--facility", "aps")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert ALICE in refused.stderr
    assert "--owner URN" in refused.stderr
    assert s2cs("release", "s", "--owner", BOB, "--facility", "aps").returncode == 0
    assert sides(service) == [("s", "PROD", ALICE)]
    service.evict()


def test_a_name_that_nobody_uses_is_an_error(facility: Facility, s2cs: Run) -> None:
    facility()
    done = s2cs("release", "nothing", "--facility", "aps")
    assert (done.returncode, done.stdout) == (NotFound.exit_code, "")
    assert done.stderr.startswith("s2cs: facility aps has no such stream: nothing\n")
    steering = s2cs("release", "\x1b[31mred\n", "--facility", "aps")
    assert steering.stderr.startswith(r"s2cs: facility aps has no such stream: \x1b[31mred\n")


def test_everything_is_ended_only_by_who_says_yes(facility: Facility, s2cs: Run) -> None:
    service = facility()
    for uid, owner in (("a", ALICE), ("b", BOB), ("c", BOB)):
        service.request(prod(uid), owner=owner)
    refused = s2cs("release", "--all", "--facility", "aps")
    assert (refused.returncode, len(sides(service))) == (2, 3)
    assert "--yes" in refused.stderr
    code, shown = on_a_terminal("release", "--all", "--facility", "aps", answer="n\n")
    assert (code, len(sides(service))) == (1, 3)
    assert "End all 3 streams of facility aps?" in shown
    assert s2cs("release", "--all", "--owner", BOB, "--facility", "aps").returncode == 0
    assert sides(service) == [("a", "PROD", ALICE)]
    code, shown = on_a_terminal("release", "--all", "--facility", "aps", answer="y\n")
    assert (code, sides(service)) == (0, [])
    service.request(prod(), owner=BOB)
    assert s2cs("release", "--all", "--yes", "--facility", "aps").returncode == 0
    assert sides(service) == []
    assert s2cs("release", "--all", "--yes", "--facility", "aps").returncode == 0


@pytest.mark.parametrize("arguments", [("release",), ("release", "s", "--all")])
def test_release_wants_a_name_or_all(facility: Facility, s2cs: Run, arguments: tuple[str, ...]) -> None:
    facility()
    assert s2cs(*arguments, "--facility", "aps").returncode == 2


def test_one_that_cannot_be_ended_is_named_and_the_others_are_ended(two_gateways: S2CS, s2cs: Run) -> None:
    service = two_gateways
    for other, uids in (("gw2", "ab"), ("gw1", "cd")):
        service.drain(other)
        for uid in uids:
            service.request(prod(uid), owner=ALICE)
        service.undrain(other)
    stuck = ["c", "d"]
    file = service.config.file
    assert file
    text = file.read_text()
    file.write_text(text.replace('"gw2"', '"gw3"'))
    done = s2cs("release", "--all", "--yes")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["a", "b"]
    for uid in stuck:
        assert f"{uid} (PROD) of {ALICE} is left: " in done.stderr
    again = s2cs("release", stuck[0], "--format", "json")
    assert again.returncode == 1
    (left,) = json.loads(again.stdout)["left"]
    assert (left["uid"], left["error"]["code"]) == (stuck[0], "gateway-unreachable")
    file.write_text(text)
    assert s2cs("release", "--all", "--yes").returncode == 0
    assert sides(service) == []


# --- audit


def test_audit_shows_who_did_what(facility: Facility, s2cs: Run) -> None:
    service = facility()
    service.request(prod("a"), owner=ALICE)
    service.request(prod("b"), owner=BOB)
    service.evict()
    lines = s2cs("audit", "--facility", "aps").stdout.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(rf"\S+Z  open     a \(PROD\)  {ALICE}  .*mode=tls.*", lines[0])
    told = document(s2cs("audit", "--facility", "aps", "--owner", BOB, "--format", "json"))
    assert [(one["event"], one["uid"]) for one in told["lines"]] == [("open", "b"), ("close", "b")]
    assert len(s2cs("audit", "--facility", "aps", "--uid", "a", "--since", "1h").stdout.splitlines()) == 2
    assert s2cs("audit", "--facility", "aps", "--since", "yesterday").returncode == 2


def test_a_long_audit_log_is_one_document_and_is_never_in_memory_as_a_whole(facility: Facility) -> None:
    service = facility()

    def told() -> tuple[str, int]:
        command = [*COMMAND, "audit", "--facility", "aps", "--format", "json"]
        done = subprocess.run([*MEASURED, *command], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout, int(done.stderr) << 10

    empty, least_bytes = told()
    head = {"protocol": 1, "facility": "aps"}
    assert empty == json.dumps(head | {"lines": []}, indent=2) + "\n"
    line = {"at": "2026-01-01T00:00:00Z", "event": "open", "owner": ALICE, "uid": "a", "message": 350 * "x"}
    lines = [line | {"number": number} for number in range(20_000)]
    (service.config.state_dir / "audit.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    full, most_bytes = told()
    assert full == json.dumps(head | {"lines": lines}, indent=2) + "\n"
    assert most_bytes - least_bytes < len(full) / 2


def test_what_the_audit_log_has_cannot_steer_the_terminal(facility: Facility) -> None:
    service = facility()
    evil = ["\x1b]0;title\x07", "\x9b31m", "two\nlines", "\u202etxt.exe", "\x7f"]
    line = dict(zip(["owner", "uid", "message", "which", "event"], evil, strict=True)) | {"at": "\x1b[2J"}
    with (service.config.state_dir / "audit.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    (shown,) = on_a_terminal("audit", "--facility", "aps")[1].splitlines()
    assert shown.isprintable()


def test_audit_follows_each_line_once_until_ctrl_c(facility: Facility, begin: Begin) -> None:
    service = facility()
    service.request(prod("a"), owner=ALICE)
    following = begin("audit", "--facility", "aps", "--follow", "--format", "json")
    assert following.stdout
    assert json.loads(following.stdout.readline())["uid"] == "a"
    service.request(prod("b"), owner=BOB)
    service.evict()
    events = [json.loads(following.stdout.readline()) for _ in range(3)]
    assert sorted((one["event"], one["uid"]) for one in events) == [
        ("close", "a"),
        ("close", "b"),
        ("open", "b"),
    ]
    following.send_signal(signal.SIGINT)
    rest, words = following.communicate(timeout=20)
    assert (following.returncode, rest, words.strip()) == (130, "", "")


# --- gateways


def test_the_gateways_are_shown_with_what_is_booked(two_gateways: S2CS, s2cs: Run) -> None:
    two_gateways.drain("gw2")
    two_gateways.request(prod(num_conn=2, rate_mbits_per_s=10_000), owner=ALICE)
    done = s2cs("gateway", "list")
    first, second = (re.split(r"  +", line) for line in done.stdout.splitlines()[1:])
    assert first == ["gw1", "local", "in service", "1", "2 of 1000", "128", "10.0 Gbit/s of 100 Gbit/s"]
    assert second == ["gw2", "local", "draining", "0", "0", "0", "0 bit/s"]
    told = document(s2cs("gateway", "list", "--format", "json"))
    assert [one["name"] for one in told["gateways"]] == ["gw1", "gw2"]
    assert sum(one["reserved_mbits_per_s"] for one in told["gateways"]) == 10_000
    two_gateways.evict()


def test_a_gateway_that_does_not_answer_is_shown_with_the_reason_once(
    s2cs: Run, tmp_path: Path, free_address: str
) -> None:
    file = tmp_path / "aps.toml"
    ssh = (
        f'kind = "ssh"\nhost = "127.0.0.1"\nport = {free_address.rpartition(":")[2]}\nconnect_timeout_s = 2\n'
    )
    file.write_text(TWO_GATEWAYS.format(first=1, last=9).replace('name = "gw2"\n', f'name = "gw2"\n{ssh}'))
    done = s2cs("gateway", "list", "--config", file)
    assert done.returncode == 0
    assert re.search(r"^gw1 +local +in service ", done.stdout, re.MULTILINE)
    assert re.search(r"^gw2 +ssh +no answer ", done.stdout, re.MULTILINE)
    (reason,) = done.stderr.splitlines()
    assert reason.startswith("gw2: ")


def test_a_drained_gateway_takes_no_stream_until_it_is_undrained(two_gateways: S2CS, s2cs: Run) -> None:
    service = two_gateways
    done = s2cs("gateway", "drain", "gw1")
    assert (done.returncode, done.stdout) == (0, "gateway gw1 takes no new stream, no streams left\n")
    assert document(s2cs("gateway", "drain", "gw2", "--format", "json"))["draining"] is True
    assert s2cs("gateway", "list").stdout.count("draining") == 2
    with pytest.raises(CapacityExhausted):
        service.request(prod(), owner=ALICE)
    assert s2cs("gateway", "--facility", "aps", "undrain", "gw1").returncode == 0
    assert service.request(prod(), owner=ALICE).relays[0].gateway == "gw1"
    unknown = s2cs("gateway", "drain", "gw9")
    assert unknown.returncode == NotFound.exit_code
    assert "gw1, gw2" in unknown.stderr
    service.evict()


def test_draining_waits_for_the_last_stream_and_says_how_many_are_left(
    facility: Facility, begin: Begin
) -> None:
    service = facility()
    service.request(prod("a"), owner=ALICE)
    service.request(prod("b"), owner=ALICE)
    waiting = begin("gateway", "drain", "local", "--wait", "--facility", "aps")
    assert waiting.stderr
    assert waiting.stderr.readline() == "gateway local: 2 streams left\n"
    service.evict(uid="a")
    assert waiting.stderr.readline() == "gateway local: 1 stream left\n"
    service.evict(uid="b")
    said, _ = waiting.communicate(timeout=30)
    assert (waiting.returncode, said) == (0, "gateway local takes no new stream, no streams left\n")


def test_waiting_for_a_stream_that_stays_ends_in_time_or_by_ctrl_c(
    facility: Facility, s2cs: Run, begin: Begin
) -> None:
    service = facility()
    service.request(prod("a", lease_s=600), owner=ALICE)
    late = s2cs("gateway", "drain", "local", "--wait", "--timeout_s", "0.1", "--facility", "aps")
    assert (late.returncode, late.stdout) == (1, "")
    assert "s2cs: gateway local still has 1 stream after " in late.stderr
    waiting = begin("gateway", "drain", "local", "--wait", "--facility", "aps")
    assert waiting.stderr
    waiting.stderr.readline()
    waiting.send_signal(signal.SIGINT)
    _, words = waiting.communicate(timeout=20)
    assert (waiting.returncode, words.strip()) == (130, "")
    assert service.gateways()[0].draining
    assert sides(service) == [("a", "PROD", ALICE)]
    service.evict()


def test_what_ended_by_its_lease_is_not_waited_for(facility: Facility, s2cs: Run) -> None:
    facility().request(prod("a", lease_s=1), owner=ALICE)
    done = s2cs("gateway", "drain", "local", "--wait", "--timeout-s", "30", "--facility", "aps")
    assert done.returncode == 0, done.stderr


# --- doctor


def test_doctor_groups_its_findings_and_gives_each_fix_on_a_line_of_its_own(
    s2cs: Run, facility: Facility
) -> None:
    facility()
    wanted = ("--rate_mbits_per_s", 100_000, "--rtt_ms", 100)
    done = s2cs("doctor", "--facility", "aps", *wanted, "--format", "json")
    told = json.loads(done.stdout)
    problems = [one for one in told["findings"] if one["level"] == "problem"]
    assert done.returncode == (1 if problems else 0)
    assert {one["gateway"] for one in told["findings"]} == {None, "local"}
    shown = s2cs("doctor", "--facility", "aps", "--rate-mbits-per-s", 100_000, "--rtt-s", 0.1)
    lines = shown.stdout.splitlines()
    assert lines[0] == "facility aps"
    assert "gateway local" in lines
    fixes = [line for one in told["findings"] for line in (one["fix"] or "").splitlines()]
    assert fixes
    assert {f"    {fix}" for fix in fixes} <= set(lines)
    assert re.fullmatch(r"(\d+ (problem|warning|note)s?, )*\d+ ok", lines[-1])


def test_doctor_exits_with_1_when_there_is_a_problem(s2cs: Run, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(
        TWO_GATEWAYS.format(first=47_000, last=47_100).replace(
            'wan_bind = "127.0.0.1"', 'wan_bind = "192.0.2.77"'
        )
    )
    done = s2cs("doctor", "--config", file, "--gateway", "gw1")
    assert done.returncode == 1
    assert re.search(r"^  problem  .*192\.0\.2\.77", done.stdout, re.MULTILINE)
    assert "gateway gw2" not in done.stdout
    assert s2cs("doctor", "--config", file, "--gateway", "gw9").returncode == NotFound.exit_code


# --- which facility


def test_the_only_facility_that_is_configured_needs_no_name(two_gateways: S2CS, s2cs: Run) -> None:
    folder = two_gateways.config.file.parent  # type: ignore[union-attr]
    assert document(s2cs("list", "--format", "json"))["facility"] == "aps"
    (folder / "facility.toml").write_text(TWO_GATEWAYS.format(first=1, last=9).replace('"aps"', '"alcf"'))
    several = s2cs("list")
    assert several.returncode == 2
    assert several.stderr.startswith("s2cs: 2 facilities are configured here: aps, alcf\n")
    assert document(s2cs("list", "--format", "json", SCISTREAM_FACILITY="alcf"))["facility"] == "alcf"
    named = s2cs("list", "--facility", "aps", "--format", "json", SCISTREAM_FACILITY="alcf")
    assert document(named)["facility"] == "aps"
    assert (
        document(s2cs("list", "--config", folder / "facility.toml", "--format", "json"))["facility"] == "alcf"
    )
    assert s2cs("list", "--config", folder / "facility.toml", "--facility", "aps").returncode == 2


def test_without_any_facility_the_way_to_one_is_said(s2cs: Run) -> None:
    none = s2cs("list")
    assert (none.returncode, none.stdout) == (2, "")
    assert re.fullmatch(r"s2cs: no facility is configured here\n  .*s2cs init NAME.*\n", none.stderr)


def test_a_name_that_was_never_used_is_no_facility_and_leaves_no_state(s2cs: Run, state_base: Path) -> None:
    mistyped = s2cs("list", "--facility", "asp")
    assert mistyped.returncode == 2
    assert "there is no facility 'asp' here" in mistyped.stderr
    assert list(state_base.iterdir()) == []


# --- manners


def test_an_error_is_a_line_and_a_hint_and_a_traceback_only_for_who_asks(s2cs: Run, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('[facility]\nname = "aps"\n')
    for arguments in (("list",), ("doctor",), ("gateway", "drain", "x"), ()):
        done = s2cs(*arguments, *([] if arguments else ["--port", 0]), "--config", file)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert done.stderr == f"s2cs: {file}: gateway: Field required\n"
    debugged = s2cs("list", "--config", file, "--debug")
    assert debugged.returncode == 2
    assert "Traceback (most recent call last)" in debugged.stderr
    assert debugged.stderr.endswith(f"s2cs: {file}: gateway: Field required\n")
    for wrong in ("not TOML", None):
        file.unlink() if wrong is None else file.write_text(wrong)
        assert s2cs("list", "--config", file).stderr.startswith(f"s2cs: {file}")


@pytest.mark.parametrize(
    "arguments", [("lst",), ("list", "--what"), ("--format", "xml", "list"), ("--port", "1", "list")]
)
def test_wrong_usage_exits_with_2_and_names_the_help(s2cs: Run, arguments: tuple[str, ...]) -> None:
    done = s2cs(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"s2cs: .+\n  See s2cs( list)? --help\n", done.stderr)


@pytest.mark.parametrize("time", ["nan", "inf", "-1"])
def test_a_time_to_wait_is_a_time(s2cs: Run, time: str) -> None:
    done = s2cs("gateway", "drain", "gw1", "--wait", "--timeout-s", time)
    assert done.returncode == 2
    assert "is not a duration" in done.stderr


def test_every_subcommand_explains_itself(s2cs: Run) -> None:
    shown = s2cs("--help").stdout
    for name in ("init", "doctor", "list", "audit", "release", "gateway"):
        assert re.search(rf"^  {name} ", shown, re.MULTILINE)
    assert s2cs("--version").stdout.startswith("s2cs, version: ")
    assert "--timeout-s" in s2cs("gateway", "drain", "--help").stdout


def test_colour_is_for_terminals_that_want_it(facility: Facility, s2cs: Run) -> None:
    service = facility()
    service.request(prod(), owner=ALICE)
    assert "\x1b" not in s2cs("list", "--facility", "aps").stdout
    assert "\x1b[1m" in on_a_terminal("list", "--facility", "aps")[1]
    assert "\x1b[3" in on_a_terminal("release", "nothing", "--facility", "aps")[1]
    for arguments in (("list",), ("release", "nothing")):
        assert "\x1b[1m" not in on_a_terminal(*arguments, "--facility", "aps", NO_COLOR="1")[1]
        assert "\x1b[3" not in on_a_terminal(*arguments, "--facility", "aps", NO_COLOR="1")[1]
    service.evict()


def test_a_row_stays_one_line_on_a_narrow_terminal(facility: Facility) -> None:
    service = facility()
    uid = "u" * 64
    service.request(prod(uid), owner="urn:test:" + "o" * 200)
    _, shown = on_a_terminal("list", "--facility", "aps", COLUMNS="40")
    assert len(shown.splitlines()) == 2
    assert uid in shown
    service.evict()


def test_a_reader_that_goes_away_is_no_defect(facility: Facility, begin: Begin) -> None:
    service = facility()
    service.request(prod(), owner=ALICE)
    process = begin("audit", "--facility", "aps", "--follow")
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    service.evict()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(20) == 1


def test_a_stdout_that_takes_nothing_is_said_and_is_no_defect(facility: Facility) -> None:
    facility().request(prod(), owner=ALICE)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "list", "--facility", "aps"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "defect" not in done.stderr
    closed = ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "list", "--facility", "aps"]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    facility().evict()


def test_sizes_and_times_are_written_for_people() -> None:
    assert [in_units(value, "bit/s") for value in (0, 999, 999.6, 1234, 99_960, 4.93e9, 2e13)] == [
        *("0 bit/s", "999 bit/s", "1.00 kbit/s", "1.23 kbit/s", "100 kbit/s", "4.93 Gbit/s", "20.0 Tbit/s"),
    ]
    assert [in_time(value) for value in (0, 59.9, 60, 200, 7500, 7200, 90_000, 604_799)] == [
        *("0 s", "59 s", "1 min", "3 min 20 s", "2 h 5 min", "2 h", "1 d 1 h", "6 d 23 h"),
    ]


# --- serving


def test_without_a_subcommand_it_serves(begin: Begin, state_base: Path) -> None:
    process = begin("--port", 0, "--facility", "dev")
    assert process.stderr
    said = process.stderr.readline()
    url = re.search(r"http://127\.0\.0\.1:\d+", said)
    assert url, said + process.stderr.read()
    with urllib.request.urlopen(f"{url[0]}/health", timeout=20) as answer:  # noqa: S310 - it is http
        assert json.load(answer) == {"status": "ok"}
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (0, 130)
    assert (state_base / "dev").is_dir()


def test_serving_without_its_extra_names_the_extra(state_base: Path) -> None:  # noqa: ARG001
    for missing in ("fastapi", "uvicorn"):
        program = f"import sys; sys.modules[{missing!r}] = None; {COMMAND[-1]}"
        done = subprocess.run(
            [*COMMAND[:-1], program, "--port", "0"], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (1, ""), (missing, done.stderr)
        assert missing in done.stderr
        assert "pip install 'scistream-flows[server]'" in done.stderr


def test_a_facility_is_not_served_to_others_without_a_certificate(s2cs: Run) -> None:
    done = s2cs("--listener_ip", "0.0.0.0", "--port", 0)
    assert done.returncode == 2
    assert done.stderr.startswith("s2cs: ")
    assert load_facility("dev-0").file is None
