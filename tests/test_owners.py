"""Every verb at every door: a stream of somebody else is answered exactly as one that is not there."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import pytest
from serving import Caller
from standins.globus import Globus, Person
from test_provider import with_client

from scistream_flows import functions
from scistream_flows.config import FacilityConfig, load_facility
from scistream_flows.doorway import ask
from scistream_flows.gateway import LocalGateway
from scistream_flows.models import Role
from scistream_flows.relay import Outcome
from scistream_flows.rest import RestService
from scistream_flows.s2cs import S2CS, VERBS, unix_owner

ROLES: Final[tuple[Role, ...]] = ("PROD", "CONS")
HERS, NEVER = "hers-0001", "none-0001"
# Names that others ask for too: what they get is theirs.
TAKEN, FREE = "take-0001", "free-0001"


class Ask(Protocol):
    """Asks a verb as somebody who is not Alice."""

    def __call__(self, verb: str, document: dict[str, Any]) -> dict[str, Any]: ...


class World(NamedTuple):
    """A facility, served by HTTP and at a socket, at which Alice has both sides of a stream."""

    config: FacilityConfig
    url: str
    socket: Path
    alice: Person
    alices: Caller
    bob: Person
    bobs: Caller
    offer: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("owners")
    with tempfile.TemporaryDirectory(dir="/tmp") as place, Globus() as globus:
        socket = Path(place) / "s2cs.sock"
        with with_client(globus, base, "aps", quota=f'\n[service]\nsocket = "{socket}"\n') as served:
            alice, bob = (globus.add_person(f"{name}@example.org") for name in ("alice", "bob"))
            alices, bobs = (Caller(served, globus.mint(one, served.scope)) for one in (alice, bob))
            offer: dict[str, Any] = {}
            for uid in (TAKEN, HERS):
                for role in ROLES:
                    said = alices.ask("POST", "/streams", json=_request(uid, role, offer))
                    offer = said.raise_for_status().json() if role == "PROD" else offer
            config = load_facility("aps", file=base / "aps.toml", state_dir=base / "aps")
            yield World(config, served.url, socket, alice, alices, bob, bobs, offer)
            for uid in (TAKEN, HERS):
                for role in ROLES:
                    alices.ask("DELETE", f"/streams/{uid}/{role}").raise_for_status()
            alices.close()
            bobs.close()


def _request(uid: str, role: Role, offer: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {
        "protocol": 1,
        "uid": uid,
        "role": role,
        "lease_s": 600,
        "hello_timeout_s": 600,
    }
    if role == "PROD":
        return document | {"targets": ["127.0.0.1:9"]}
    return document | {"offer": {**offer, "uid": uid}}


def documents(verb: str, role: Role, offer: dict[str, Any], owner: str | None) -> tuple[dict[str, Any], ...]:
    """The documents of a verb for her stream and for one that never was."""
    changes: dict[str, dict[str, Any]] = {
        "hello": {"targets": ["127.0.0.1:9"]} if role == "PROD" else {"consumers": ["127.0.0.1/32"]},
        "update": {"peers": []} if role == "PROD" else {"consumers": ["127.0.0.1/32"]},
        "renew": {"lease_s": 60},
    }
    more = changes.get(verb, {})
    if verb == "list":
        return ({"protocol": 1, "include_ended": True}, {"protocol": 1, "include_ended": True})
    if verb == "request":
        return tuple(_request(uid, role, offer) for uid in (TAKEN, FREE))
    named = {"owner": owner} if owner else {}
    return tuple({"protocol": 1, "uid": uid, "role": role, **named, **more} for uid in (HERS, NEVER))


def at_s2cs(world: World) -> Ask:
    def asked(verb: str, document: dict[str, Any]) -> dict[str, Any]:
        with S2CS(world.config) as service:
            return service.answer(verb, document, owner=world.bob.urn)

    return asked


def at_rest(world: World) -> Ask:
    return RestService(world.url, authorizer=lambda _: world.bobs.token).answer


def at_the_socket(world: World) -> Ask:
    return lambda verb, document: ask(world.socket, verb, document)


def at_a_function_that_asks_the_service(world: World) -> Ask:  # noqa: ARG001 - the environment says where
    return lambda verb, document: functions.answer(verb, document, facility="aps")


def at_a_function_of_one_account(world: World) -> Ask:
    def asked(verb: str, document: dict[str, Any]) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            alone = world.config.model_copy(update={"service": type(world.config.service)()})
            patch.setattr(functions, "load_facility", lambda _: alone)
            return functions.answer(verb, document, facility="aps")

    return asked


DOORS: Final = (
    at_s2cs,
    at_rest,
    at_the_socket,
    at_a_function_that_asks_the_service,
    at_a_function_of_one_account,
)


def masked(said: dict[str, Any], uid: str) -> str:
    """An answer without what differs by chance: the name, identities of a relay, ports and what has passed."""
    text = json.dumps(said, sort_keys=True).replace(uid, "UID")
    text = re.sub(
        r'"(relay_id|public_key|address|lease_remaining_s|ticket)": ("[^"]*"|[0-9.]+)', r'"\1": ""', text
    )
    return re.sub(r'"streams": \[.*\]', '"streams": []', text)


def untouched(world: World) -> None:
    for uid in (HERS, TAKEN):
        for role in ROLES:
            assert world.alices.ask("GET", f"/streams/{uid}/{role}").json()["state"] == "LISTENING"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_foreign_stream_is_answered_as_one_that_is_not_there(
    world: World, door: Callable[[World], Ask], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(world.config.state_dir.parent))
    monkeypatch.setenv("SCISTREAM_STATE_DIR", str(world.config.state_dir.parent))
    asked = door(world)
    for role in ROLES:
        for owner in (None, world.alice.urn):
            taken, free = (TAKEN, FREE) if verb == "request" else (HERS, NEVER)
            foreign, unknown = (asked(verb, one) for one in documents(verb, role, world.offer, owner))
            assert masked(foreign, taken) == masked(unknown, free), (role, owner)
            if verb in ("request", "list", "release"):
                assert foreign["ok"], foreign
            else:
                assert foreign["error"]["code"] == "not-found"
            if verb == "release":
                assert foreign["value"].get("end") is None
            if verb == "list":
                assert world.alice.urn not in json.dumps(foreign)
            if verb == "request":
                # it is a stream of his own, under the same name
                for uid in (TAKEN, FREE):
                    own = asked("release", {"protocol": 1, "uid": uid, "role": role})
                    assert own["value"]["end"]["owner"] in (world.bob.urn, unix_owner())
    untouched(world)


def test_a_foreign_stream_is_answered_alike_by_every_action(world: World) -> None:
    consumer = {**world.offer, "role": "CONS"}
    for action, more in (
        ("connect", {"consumer": consumer}),
        ("monitor", {}),
        ("status", {}),
        ("release", {}),
    ):
        for role in ("PROD",) if action == "connect" else ROLES:
            foreign, unknown = (
                world.bobs.done(action, {"stream_id": uid, "role": role, **more}) for uid in (HERS, NEVER)
            )
            differing = ("action_id", "start_time", "completion_time")
            for one in (foreign, unknown):
                for name in differing:
                    one.pop(name, None)
            assert masked(foreign, HERS) == masked(unknown, NEVER), (action, role)
    opened = world.bobs.details("start", {"stream_id": TAKEN, "role": "PROD", "targets": ["127.0.0.1:9"]})
    assert opened["offer"]["relays"][0]["relay_id"] != world.offer["relays"][0]["relay_id"]
    world.bobs.details("release", {"stream_id": TAKEN, "role": "PROD"})
    untouched(world)


class Counted(LocalGateway):
    """This machine; counts the commands that are run on it."""

    commands = 0

    def run(self, argv: Any, *, stdin: str = "", timeout_s: float) -> Outcome:
        type(self).commands += 1
        return super().run(argv, stdin=stdin, timeout_s=timeout_s)


def test_a_foreign_stream_costs_no_more_than_one_that_is_not_there(state_base: Path) -> None:
    config = load_facility("aps")
    gateway = Counted(config.gateways[0], runtime_dir=state_base / "aps" / "relays")
    alice, bob = "urn:test:alice", "urn:test:bob"
    with S2CS(config, gateways={"local": gateway}) as service:
        offer = service.request(_request(HERS, "PROD", {}), owner=alice).model_dump(mode="json")
        for verb in ("hello", "update", "status", "renew", "release", "ticket"):
            ran = []
            for document in documents(verb, "PROD", offer, None):
                service._swept_at = float("-inf")  # the comparison with what runs is the same for both
                before = Counted.commands
                service.answer(verb, document, owner=bob)
                ran.append(Counted.commands - before)
            assert ran[0] == ran[1], verb
        service.release({"protocol": 1, "uid": HERS, "role": "PROD"}, owner=alice)
