"""The audit log: who did or was refused what, whence, whither, how much; and that nobody fills the disk with it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Caller, Served, serving

from scistream_flows import registry as registry_module
from scistream_flows.errors import NotFound, PolicyDenied, RegistryError, ScistreamError
from scistream_flows.models import Offer
from scistream_flows.registry import AUDIT_FILES, Registry
from scistream_flows.s2cs import REFUSALS_AT_ONCE, S2CS, unix_owner

Make = Callable[..., S2CS]
ALICE, BOB, CAROL = "urn:test:alice", "urn:test:bob", "urn:test:carol"


def of(uid: str = "s", role: str = "PROD", **more: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": role} | more


def lines(service: S2CS, event: str) -> list[dict[str, Any]]:
    return [dict(line) for line in service.audit() if line["event"] == event]


# --- what stands in it


def test_the_end_of_a_stream_says_who_whence_whither_how_much_how_long_and_why(
    facility: Make, application: Any, talk: Callable[[str, bytes], str], within: Callable[..., None]
) -> None:
    aps, alcf = facility("aps"), facility("alcf")
    first = aps.request(of(targets=[application.address], managers=[BOB]), owner=ALICE)
    second = alcf.request(of(role="CONS", offer=first.model_dump(mode="json")), owner=ALICE)
    (relay,) = second.relays
    peers = [{"public_key": relay.public_key, "source_addresses": relay.dial_addresses}]
    aps.update(of(peers=peers), owner=ALICE)
    within(lambda: alcf.status(of(role="CONS"), owner=ALICE).state == "READY", timeout_s=20)
    talk(second.addresses[0], b"x" * 1000)
    aps.release(of(), owner=BOB)
    alcf.release(of(role="CONS"), owner=ALICE)
    (closed,) = lines(aps, "close")
    assert (closed["owner"], closed["caller"], closed["uid"], closed["role"]) == (ALICE, BOB, "s", "PROD")
    assert (closed["targets"], closed["listeners"]) == ([application.address], first.addresses)
    assert closed["bytes"] == {"to_consumer": len(application.payload), "to_producer": 1000}
    assert closed["reason"] == "released"
    assert 0 < closed["duration_s"] < 120
    (other,) = lines(alcf, "close")
    assert (other["peers"], other["listeners"]) == (first.addresses, second.addresses)
    (opened,) = lines(alcf, "open")
    assert opened["sources"] == ["127.0.0.0/8", "::1/128"]
    assert first.addresses[0] in json.dumps(opened["peers"])


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("request", of("new", num_conn=65), BOB, "denied"),
    ("request", of("new", targets=["192.0.2.1:1"]), BOB, "denied"),
    ("hello", of(targets=["192.0.2.1:1"]), ALICE, "denied"),
    ("update", of(targets=["192.0.2.1:1"]), ALICE, "denied"),
    ("renew", of(lease_s=3601), ALICE, "denied"),
    ("ticket", of(networks=["192.0.2.0/24"]), ALICE, "denied"),
    ("ticket", of(expires_s=86401), ALICE, "denied"),
    *((verb, of(), CAROL, "denied") for verb in ("renew", "release", "update", "ticket")),
    ("hello", of(targets=["127.0.0.1:9"]), CAROL, "denied"),
    *((verb, of(), BOB, "not-found") for verb in ("status", "renew", "release", "update", "ticket")),
    *((verb, of("never"), BOB, "not-found") for verb in ("status", "renew", "release", "update", "ticket")),
    ("list", {"protocol": 1, "all_owners": True}, BOB, "denied"),
]


def test_every_refusal_of_every_verb_has_its_line(facility: Make) -> None:
    service = facility()
    service.request(of(targets=["127.0.0.1:9"], monitors=[CAROL]), owner=ALICE)
    for verb, document, caller, code in REFUSED:
        before = lines(service, "deny")
        said = service.answer(verb, document, owner=caller)
        if not (verb == "release" and code == "not-found"):
            assert said["error"]["code"] == code, (verb, caller)
        (line,) = lines(service, "deny")[len(before) :]
        assert line["code"] == code, (verb, caller)
        assert caller in (line["owner"], line.get("caller")), (verb, caller)
        assert line.get("uid") == document.get("uid")
    service.release(of(), owner=ALICE)


def test_a_ticket_that_is_none_has_its_line_without_the_ticket(facility: Make) -> None:
    service = facility()
    secret = "sst_" + 43 * "x"
    with pytest.raises(ScistreamError):
        service.hello_by_ticket({"protocol": 1, "ticket": secret}, caller_address="127.0.0.1")
    (line,) = lines(service, "deny")
    assert line["code"] == "unauthenticated"
    assert secret not in json.dumps(line)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, "aps") as served:
        yield served


def test_over_http_each_line_says_from_where_it_was_asked(served: Served) -> None:
    caller = Caller(served, served.token)
    document = {"stream_id": "s", "role": "PROD", "targets": ["127.0.0.1:9"]}
    caller.details("start", document)
    caller.ask("DELETE", "/streams/s/PROD").raise_for_status()
    caller.token = "wrong"
    assert caller.ask("GET", "/streams").status_code == 401
    caller.close()
    said = [json.loads(line) for line in (served.state_dir / "audit.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("owner"), line["from"]) for line in said] == [
        ("open", unix_owner(), "127.0.0.1"),
        ("close", unix_owner(), "127.0.0.1"),
        ("deny", None, "127.0.0.1"),
    ]


# --- bounded


def test_refusals_of_one_caller_are_counted_rather_than_written_and_hide_nobody_else(facility: Make) -> None:
    service = facility()
    for number in range(3 * REFUSALS_AT_ONCE):
        with pytest.raises(NotFound):
            service.status(of(f"guess-{number}"), owner=BOB)
    written = len(lines(service, "deny"))
    assert REFUSALS_AT_ONCE <= written < 2 * REFUSALS_AT_ONCE
    with pytest.raises(PolicyDenied):
        service.request(of(num_conn=65), owner=CAROL)
    (*_, last) = lines(service, "deny")
    assert last["owner"] == CAROL
    assert last["unwritten"] == 3 * REFUSALS_AT_ONCE - written


def test_where_nothing_can_be_written_a_refusal_stays_one_and_nothing_is_opened(
    facility: Make, caplog: pytest.LogCaptureFixture
) -> None:
    service = facility()
    (service.config.state_dir / "audit.jsonl").mkdir()
    for uid in ("none", "neither"):
        said = service.answer("status", of(uid), owner=BOB)
        assert said["error"]["code"] == "not-found"
    assert "is not in the audit log" in caplog.text
    with pytest.raises(RegistryError):
        service.request(of(targets=["127.0.0.1:9"]), owner=ALICE)
    assert service.list({"protocol": 1}, owner=ALICE).streams == []


def test_what_was_not_written_is_said_at_the_end(facility: Make) -> None:
    service = facility()
    for number in range(REFUSALS_AT_ONCE + 7):
        with pytest.raises(NotFound):
            service.status(of(f"guess-{number}"), owner=BOB)
    service.close()
    (*_, last) = lines(service, "deny")
    assert 0 < last["unwritten"] <= 7


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry whose audit log has small files."""
    monkeypatch.setattr(registry_module, "AUDIT_FILE_BYTES", 2000)
    registry = Registry(tmp_path / "state")
    yield registry
    registry.close()


def test_the_log_is_a_number_of_files_of_bounded_size(small: Registry) -> None:
    for number in range(1000):
        small.audit("open", None, number=number)
    files = sorted(small.state_dir.glob("audit.jsonl*"))
    assert len(files) == AUDIT_FILES
    assert all(file.stat().st_size < 2200 for file in files)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    numbers = [line["number"] for line in small.audit_lines()]
    assert numbers == [*range(numbers[0], 1000)]
    assert len(numbers) > 200


def test_several_writers_begin_a_new_file_together_and_lose_no_line(small: Registry) -> None:
    others = [Registry(small.state_dir) for _ in range(4)]

    def write(registry: Registry, name: int) -> None:
        for number in range(40):
            registry.audit("open", None, number=number, writer=name)

    threads = [threading.Thread(target=write, args=(one, name)) for name, one in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    found = [(line["writer"], line["number"]) for line in small.audit_lines()]
    assert sorted(found) == [(writer, number) for writer in range(4) for number in range(40)]
    for one in others:
        one.close()


def test_whoever_follows_sees_each_line_once_through_all_files(small: Registry) -> None:
    small.audit("open", None, number=0)
    following = small.audit_followed()
    seen: list[int] = []

    def catch_up() -> None:
        for line in following:
            if line is None:
                return
            seen.append(line["number"])

    for number in range(1, 150):
        small.audit("open", None, number=number)
        if number % 7 == 0:
            catch_up()
    catch_up()
    assert seen == [*range(150)]


def test_whoever_remembers_his_place_reads_each_line_once_through_all_files(small: Registry) -> None:
    seen: list[int] = []
    position = 0
    for number in range(150):
        small.audit("open", None, number=number)
        if number % 7 == 0:
            while True:
                lines, position = small.audit_from(position, most_bytes=300)
                if not lines:
                    break
                seen += [line["number"] for line in lines]
    assert seen == [*range(148)]


def test_an_offer_is_what_the_log_of_its_opening_says(facility: Make) -> None:
    service = facility()
    offer: Offer = service.request(of(targets=["127.0.0.1:9"]))
    (opened,) = lines(service, "open")
    assert opened["listeners"] == offer.addresses
    service.release(of())
