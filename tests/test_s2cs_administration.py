"""Who may open streams, what administrators may, and what who holds the state directory sees and ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scistream_flows.errors import GatewayUnreachable, NotFound, PolicyDenied, ScistreamError
from scistream_flows.s2cs import S2CS, unix_owner

Facility = Callable[..., S2CS]
Site = Callable[..., None]
Relays = Callable[..., list[int]]
ALICE, BOB, CAROL = "urn:test:alice", "urn:test:bob", "urn:test:carol"
GROUP = "urn:globus:groups:id:dabd2bdc-1af3-4aa8-bd21-8ffae4d4a0b4"


def prod(uid: str = "s", **changes: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": "PROD", "targets": ["127.0.0.1:9"]} | changes


def of(uid: str = "s", **more: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": "PROD"} | more


EVERYTHING = {"protocol": 1, "all_owners": True}


# --- who may open streams


def test_without_a_list_of_users_only_the_user_of_the_service_opens_streams(
    tmp_path: Path, facility: Facility, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aps.toml").write_text(
        '[facility]\nname = "aps"\n[[gateway]]\nname = "gw"\nwan_bind = "127.0.0.1"\nlan_bind = "127.0.0.1"\n'
        '[policy]\ntargets = ["127.0.0.0/8"]\n'
    )
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path))
    service = facility()
    with pytest.raises(PolicyDenied, match=r"^urn:test:alice may not open streams at facility aps") as caught:
        service.request(prod(), owner=(ALICE, GROUP))
    assert f"policy.users in {tmp_path / 'aps.toml'}" in str(caught.value)
    (line,) = service.audit()
    assert (line["event"], line["owner"], line["uid"]) == ("deny", ALICE, "s")
    service.request(prod())
    service.release(of())


def test_any_of_a_callers_identities_and_groups_admits_it_and_the_first_owns_the_stream(
    facility: Facility, site: Site
) -> None:
    site("aps", {}, users=[GROUP, BOB])
    service = facility()
    service.request(prod(), owner=(ALICE, "urn:test:linked", GROUP))
    assert service.status(of(), owner=ALICE).owner == ALICE
    service.request(prod(), owner=BOB)
    for stranger in (ALICE, unix_owner()):
        with pytest.raises(PolicyDenied, match="may not open streams"):
            service.request(prod("other"), owner=stranger)
    assert len(service.evict()) == 2


def test_a_user_who_may_open_nothing_may_be_named_to_manage(facility: Facility, site: Site) -> None:
    site("aps", {}, users=[ALICE])
    service = facility()
    service.request(prod(managers=[BOB], monitors=[CAROL]), owner=ALICE)
    assert service.status(of(), owner=CAROL).state == "LISTENING"
    service.renew(of(), owner=BOB)
    service.update(of(targets=["127.0.0.1:10"]), owner=BOB)
    assert service.release(of(), owner=BOB).end is not None


def test_what_is_there_already_may_be_asked_for_again_by_who_opens_nothing_new(
    facility: Facility, site: Site
) -> None:
    site("aps", {}, users=[ALICE])
    first = facility().request(prod(), owner=ALICE)
    site("aps", {}, users=[])
    service = facility()
    assert service.request(prod(), owner=ALICE).addresses == first.addresses
    service.release(of(), owner=ALICE)
    with pytest.raises(PolicyDenied, match="may not open"):
        service.request(prod(), owner=ALICE)


def test_a_quota_is_for_whom_it_names(facility: Facility, site: Site) -> None:
    site(
        "aps",
        {"capacity_mbits_per_s": 10_000},
        max_streams_per_owner=1,
        max_reserved_mbits_per_s_per_owner=100,
        modes=["tls"],
        longest_lease_s=60,
        quota=[
            {
                "users": [GROUP],
                "max_streams_per_owner": 2,
                "max_reserved_mbits_per_s_per_owner": 500,
                "modes": ["tls", "none"],
                "longest_lease_s": 600,
            }
        ],
    )
    service = facility()
    hers = (ALICE, GROUP)
    service.request(prod("one", rate_mbits_per_s=300, mode="none", lease_s=600), owner=hers)
    with pytest.raises(PolicyDenied, match="limit of 500 is passed"):
        service.request(prod("two", rate_mbits_per_s=201), owner=hers)
    service.request(prod("two", rate_mbits_per_s=200), owner=hers)
    with pytest.raises(PolicyDenied, match="the limit is 2"):
        service.request(prod("three"), owner=hers)
    for asked in ({"mode": "none"}, {"lease_s": 61}, {"rate_mbits_per_s": 101}):
        with pytest.raises(PolicyDenied):
            service.request(prod("one", **asked), owner=BOB)
    # renewed by somebody without that group: what was admitted stays so
    assert service.renew(of("one"), owner=ALICE).lease_remaining_s > 500  # type: ignore[operator]
    with pytest.raises(PolicyDenied, match="Ask for 600 at most"):
        service.renew(of("one", lease_s=601), owner=ALICE)
    service.evict()


# --- administrators, through the verbs


def test_what_a_person_has_open_under_a_linked_identity_counts(facility: Facility, site: Site) -> None:
    linked = "urn:test:linked"
    site(
        "aps", {"capacity_mbits_per_s": 1000}, max_streams_per_owner=2, max_reserved_mbits_per_s_per_owner=100
    )
    service = facility()
    service.request(prod("one", rate_mbits_per_s=60), owner=(ALICE, linked))
    with pytest.raises(PolicyDenied, match="limit of 100 is passed"):
        service.request(prod("two", rate_mbits_per_s=60), owner=(linked, ALICE))
    service.request(prod("two"), owner=(linked, ALICE))
    with pytest.raises(PolicyDenied, match="the limit is 2"):
        service.request(prod("three"), owner=(linked, ALICE))
    service.request(prod("three"), owner=BOB)
    service.evict()


def test_a_uuid_in_capitals_is_the_same_identity(facility: Facility, site: Site) -> None:
    capitals = GROUP.replace("dabd2bdc", "DABD2BDC")
    site("aps", {}, users=[capitals], administrators=[capitals])
    service = facility()
    service.request(prod(monitors=[capitals]), owner=(ALICE, GROUP))
    service.request(prod("other"), owner=(BOB, GROUP))
    assert service.status(of(), owner=(CAROL, GROUP)).owner == ALICE
    assert len(service.list(EVERYTHING, owner=(CAROL, GROUP)).streams) == 2
    service.evict()


def test_a_stream_whose_lease_has_ended_is_booked_no_more(
    facility: Facility, site: Site, state_base: Path, relays_below: Relays
) -> None:
    site("aps", {"capacity_mbits_per_s": 100})
    service = facility()
    service.request(prod(rate_mbits_per_s=100, lease_s=1))
    assert relays_below(state_base, patience_s=10) == []
    (report,) = service.gateways()
    assert (report.streams, report.reserved_mbits_per_s) == (0, 0)


def test_an_administrator_who_names_the_owner_sees_renews_and_ends_every_stream(
    facility: Facility, site: Site
) -> None:
    site("aps", {}, administrators=[CAROL])
    service = facility()
    service.request(prod(), owner=ALICE)
    service.request(prod(), owner=BOB)
    with pytest.raises(NotFound):
        service.status(of(), owner=CAROL)  # unnamed, it is as for everybody
    assert service.status(of(owner=ALICE), owner=(CAROL, GROUP)).owner == ALICE
    assert service.renew(of(owner=ALICE, lease_s=600), owner=CAROL).lease_remaining_s > 500  # type: ignore[operator]
    listed = service.list(EVERYTHING, owner=CAROL).streams
    assert [one.owner for one in listed] == [ALICE, BOB]
    assert service.list({"protocol": 1}, owner=CAROL).streams == []
    end = service.release(of(owner=ALICE), owner=CAROL).end
    assert end is not None
    assert (end.reason, service.status(of(), owner=ALICE).reason) == ("admin", "admin")
    *_, closed = service.audit(owner=ALICE)
    assert (closed["event"], closed["caller"], closed["reason"]) == ("close", CAROL, "admin")
    assert service.status(of(), owner=BOB).state == "LISTENING"
    service.evict()


def test_an_administrator_does_not_say_where_the_data_of_others_goes(facility: Facility, site: Site) -> None:
    site("aps", {}, administrators=[CAROL])
    service = facility()
    service.request(prod(), owner=ALICE)
    for verb in ("update", "hello"):
        answer = service.answer(verb, of(owner=ALICE, targets=["127.0.0.1:10"]), owner=CAROL)
        assert answer["error"]["code"] == "not-found", verb
    service.evict()


def test_nobody_else_lists_or_ends_the_streams_of_others(facility: Facility, site: Site) -> None:
    site("aps", {}, administrators=[CAROL])
    service = facility()
    service.request(prod(), owner=ALICE)
    with pytest.raises(PolicyDenied, match=r"policy\.administrators in"):
        service.list(EVERYTHING, owner=BOB)
    assert service.release(of(owner=ALICE), owner=BOB).end is None
    for verb in ("status", "renew"):
        assert service.answer(verb, of(owner=ALICE), owner=BOB)["error"]["code"] == "not-found"
    assert service.status(of(), owner=ALICE).state == "LISTENING"
    service.release(of(), owner=ALICE)


def test_of_the_gateways_an_administrator_sees_all_and_others_their_own_share(
    facility: Facility, site: Site
) -> None:
    limits = {"port_range": "41000-41999", "capacity_mbits_per_s": 1000, "connection_budget": 1000}
    site("aps", limits, limits, administrators=[CAROL])
    service = facility()
    service.drain("gw2")
    service.request(prod(num_conn=2, rate_mbits_per_s=300, monitors=[GROUP]), owner=ALICE)
    service.request(prod(num_conn=3, rate_mbits_per_s=400), owner=BOB)
    everything = service.load(owner=(CAROL, GROUP))
    assert (everything.caller, everything.administrator) == (CAROL, True)
    assert everything.gateways == service.gateways()
    first, second = everything.gateways
    assert (first.streams, first.listeners, first.connections, first.reserved_mbits_per_s) == (2, 5, 320, 700)
    assert (first.ports, first.capacity_mbits_per_s, second.draining) == (1000, 1000, True)
    for caller, share in ((BOB, (1, 3, 192, 400)), ((ALICE, "urn:x:linked"), (1, 2, 128, 300))):
        seen = service.load(owner=caller)
        (report,) = seen.gateways  # where the caller has nothing, there is nothing to see
        assert not seen.administrator
        assert (report.streams, report.listeners, report.connections, report.reserved_mbits_per_s) == share
        assert (report.ports, report.connection_budget, report.capacity_mbits_per_s) == (0, 0, 0)
    assert service.load(owner=("urn:x:monitor", GROUP)).gateways[0].streams == 1
    assert service.load(owner="urn:x:stranger").gateways == []
    service.evict()


def test_why_a_gateway_does_not_answer_is_for_administrators(facility: Facility, site: Site) -> None:
    site("aps", {}, administrators=[CAROL])
    service = facility()
    service.request(prod(), owner=ALICE)
    why = GatewayUnreachable("the account scistream@10.1.2.3 is locked", which="gw1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(service._silent, "gw1", (time.monotonic(), why))
        (hers,) = service.load(owner=ALICE).gateways
        (whole,) = service.load(owner=CAROL).gateways
    assert (hers.answers, hers.message) == (False, None)
    assert (whole.answers, whole.message) == (False, why.message)
    service.evict()


def test_a_development_facility_is_its_own_accounts(facility: Facility) -> None:
    service = facility()
    service.request(prod(), owner=ALICE)
    assert service.load().administrator
    assert len(service.list(EVERYTHING).streams) == 1
    assert not service.load(owner=ALICE).administrator
    service.evict()


# --- administration of who holds the state directory


def test_administration_is_no_verb(facility: Facility) -> None:
    service = facility()
    for name in ("survey", "evict", "drain", "undrain", "gateways", "load", "audit"):
        assert service.answer(name, {"protocol": 1})["error"]["code"] == "bad-request", name


def test_a_survey_shows_the_streams_of_everybody_or_of_one(facility: Facility) -> None:
    service = facility()
    for owner in (ALICE, BOB):
        service.request(prod(), owner=owner)
    service.request(prod("other"), owner=BOB)
    assert [(one.owner, one.uid) for one in service.survey().streams] == [
        (ALICE, "s"),
        (BOB, "s"),
        (BOB, "other"),
    ]
    assert [one.uid for one in service.survey(owner=BOB).streams] == ["s", "other"]
    service.release(of(), owner=ALICE)
    assert service.survey(owner=ALICE).streams == []
    (ended,) = service.survey(owner=ALICE, include_ended=True).streams
    assert ended.reason == "released"
    service.evict()


def test_evicting_ends_what_is_named_for_the_reason_admin(
    facility: Facility, state_base: Path, relays_below: Relays
) -> None:
    service = facility()
    for owner in (ALICE, BOB):
        for uid in ("one", "two"):
            service.request(prod(uid), owner=owner)
    (released,) = service.evict(owner=ALICE, uid="one")
    assert released.end is not None
    assert (released.uid, released.end.owner, released.end.reason) == ("one", ALICE, "admin")
    assert released.end.state == "ENDED"
    assert service.evict(role="CONS") == []
    assert [(one.end.owner, one.uid) for one in service.evict(uid="two") if one.end] == [
        (ALICE, "two"),
        (BOB, "two"),
    ]
    assert [one.uid for one in service.evict()] == ["one"]
    assert service.evict() == []
    assert relays_below(state_base) == []
    assert {line["caller"] for line in service.audit() if line["event"] == "close"} == {unix_owner()}


# --- the audit log


def test_the_audit_log_is_read_by_owner_name_and_time(
    facility: Facility, within: Callable[..., None]
) -> None:
    service = facility()
    assert [*service.audit()] == []
    service.request(prod("one"), owner=ALICE)
    before = time.time()
    within(lambda: time.time() > before + 0.01)
    service.request(prod("two"), owner=BOB)
    service.release(of("one"), owner=ALICE)
    assert [(line["event"], line["uid"]) for line in service.audit()] == [
        ("open", "one"),
        ("open", "two"),
        ("close", "one"),
    ]
    assert [line["event"] for line in service.audit(owner=ALICE)] == ["open", "close"]
    assert [line["event"] for line in service.audit(uid="two")] == ["open"]
    assert [line["uid"] for line in service.audit(since_s=time.time() - before - 0.005)] == ["two", "one"]
    assert len([*service.audit(since_s=1e12)]) == 3
    service.evict()


def test_a_line_that_was_torn_is_left_out(facility: Facility) -> None:
    service = facility()
    service.request(prod())
    with (service.config.state_dir / "audit.jsonl").open("ab") as log:
        log.write(b'{"at": "2026-01-01T00:00:00.000Z", "event": "clo')
    assert [line["event"] for line in service.audit()] == ["open"]
    service.release(of())
    assert [line["event"] for line in service.audit()] == ["open", "close"]


def test_each_line_says_when_and_whose(facility: Facility) -> None:
    service = facility()
    service.request(prod(), owner=ALICE)
    with pytest.raises(ScistreamError):
        service.request(prod("other", num_conn=65), owner=BOB)
    service.drain("local")
    service.undrain("local")
    service.evict()
    lines = [*service.audit()]
    assert [(line["event"], line["owner"]) for line in lines] == [
        ("open", ALICE),
        ("deny", BOB),
        ("drain", unix_owner()),
        ("undrain", unix_owner()),
        ("close", ALICE),
    ]
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    json.dumps(lines)
