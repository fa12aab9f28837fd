"""Each part of a stream killed, and frozen, at each step of its life."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Final

import pytest
from relay.apps import Payload
from relay.gateway import eventually

from scistream_flows.models import Hello, Role

from .cast import Actor
from .report import DEAD, PAST, Record
from .scene import DETECT_S, LEASE_S, LEASE_SLACK_S, SHORT_LEASE_S, Scene, frozen

# Where the workflow stops on its way: before the step that is named so.
HOLDS: Final = {"requested": "request-cons", "listening": "connect"}
STEPS: Final = ("requested", "listening", "waiting", "ready", "streaming", "draining")
RELAYS: Final[dict[str, Role]] = {"relay-prod": "PROD", "relay-cons": "CONS"}
SERVICES: Final[dict[str, Role]] = {"service-prod": "PROD", "service-cons": "CONS"}
BROKEN: Final = ("ConnectionResetError", "BrokenPipeError")
# From the moment on at which a part is there.
BEGINS: Final = {
    "producer": "requested",
    "consumer": "streaming",
    "relay-prod": "requested",
    "relay-cons": "listening",
    "service-prod": "requested",
    "service-cons": "requested",
    "workflow": "requested",
}
CELLS: Final = [(part, step) for part, first in BEGINS.items() for step in STEPS[STEPS.index(first) :]]


class Play:
    """A stream brought to one step of its life, with applications that have something to send."""

    def __init__(self, scene: Scene, chance: random.Random) -> None:
        self.scene = scene
        self.there = Payload(chance.randrange(1, 1 << 30), chance.randrange(1, 200_000))
        self.back = Payload(chance.randrange(1, 1 << 30), chance.randrange(40_000_000, 60_000_000))
        self.step = ""
        self.lease_s = LEASE_S
        self.producer = scene.produce(self.back, bytes_per_s=4e6)
        self.address = str(self.producer.heard("listening")[0]["address"])
        self.workflow: Actor | None = None
        self.consumer: Actor | None = None

    def bring_to(self, step: str) -> None:
        self.step = step
        if step == "waiting":  # for the producer, whose address nobody knows yet
            self.workflow = self.scene.work(self.address, targets=[], lease_s=self.lease_s)
            self.workflow.wait_for("opened")
            assert self.scene.status("PROD").state == "WAITING_HELLO"
            return
        self.workflow = self.scene.work(self.address, holds=tuple(HOLDS.values()), lease_s=self.lease_s)
        for name, progress in HOLDS.items():
            self.workflow.wait_for(progress)
            if step == name:
                return
            self.workflow.tell("go on")
        self.workflow.wait_for("opened")
        if step == "ready":
            return
        self.consume()
        eventually(lambda: self.scene.status("CONS").bytes.to_consumer > 2_000_000)
        if step == "draining":
            for role in RELAYS.values():
                os.kill(self.scene.relay_pid(role), signal.SIGTERM)
            eventually(lambda: all(self.scene.status(role).state == "DRAINING" for role in RELAYS.values()))

    def consume(self) -> None:
        assert self.workflow
        listener = self.workflow.wait_for("opened")["listeners"][0]
        self.consumer = self.scene.consume(listener, self.there)

    def go_on(self) -> None:
        """The workflow goes on from where it was held, or the producer says hello for which it waits."""
        assert self.workflow
        if self.step == "waiting":
            self.scene.client("PROD").hello(Hello(uid="s", role="PROD", targets=[self.address]))
            eventually(lambda: all(self.scene.status(role).ready for role in RELAYS.values()))
            return
        held = [progress for name, progress in HOLDS.items() if name == self.step or self.step == "requested"]
        if self.step not in HOLDS:
            return
        for progress in held if self.step == "requested" else [HOLDS["listening"]]:
            self.workflow.wait_for(progress, "failed")
            if self.workflow.heard("failed"):
                return
            self.workflow.tell("go on")

    def pids(self, part: str) -> list[int]:
        actors = {"producer": self.producer, "consumer": self.consumer, "workflow": self.workflow}
        if part in RELAYS:
            return [self.scene.relay_pid(RELAYS[part])]
        if part in SERVICES:
            return self.scene.services[SERVICES[part]].pids
        actor = actors[part]
        assert actor
        return [actor.pid]

    def check_whole(self) -> None:
        """A whole transfer over the stream as it stands now: the one under way, else a new one."""
        if self.consumer is None:
            self.consume()
        assert self.consumer
        self.producer.tell("hurry")
        got = self.consumer.wait_for("received")
        assert (got["digest"], got["end"]) == (self.back.digest(), "eof")
        digests = [one["digest"] for one in self.producer_heard()]
        assert self.there.digest() in digests
        self.scene.retire(self.consumer)
        self.consumer = None

    def producer_heard(self) -> list[dict[str, object]]:
        return eventually(lambda: self.producer.heard("received"))

    def check_beginning(self) -> str:
        """What the consumer got is the beginning of what was sent; answers how it ended for it."""
        assert self.consumer
        got = self.consumer.wait_for("received")
        assert got["digest"] == Payload(self.back.seed, got["count"]).digest()
        assert got["count"] < self.back.size
        self.scene.retire(self.consumer)
        self.consumer = None
        return str(got["end"])

    def release(self) -> dict[str, dict[str, object]]:
        assert self.workflow
        self.workflow.tell("release")
        ends: dict[str, dict[str, object]] = self.workflow.wait_for("released")["ends"]
        self.scene.retire(self.workflow)
        self.workflow = None
        return ends

    def open_anew(self) -> None:
        """The same stream from the beginning, and a whole transfer over it."""
        if self.workflow is not None:
            self.scene.retire(self.workflow)
        self.workflow = self.scene.work(self.address)
        self.check_whole()


@pytest.fixture
def play(scene: Scene, chance: random.Random) -> Play:
    return Play(scene, chance)


@pytest.mark.parametrize(("part", "step"), [("relay-cons", "streaming"), ("workflow", "ready")], ids=str)
def test_a_part_that_is_killed_is_seen_by_everybody_it_concerns(
    play: Play, record: Record, part: str, step: str
) -> None:
    """Two cells of the matrix below, for every run of the tests: a relay, and the workflow whose lease then ends."""
    kill_and_check(play, record, part, step)


@pytest.mark.chaos
@pytest.mark.parametrize(("part", "step"), CELLS, ids=str)
def test_a_part_that_is_killed_truncates_nothing_unsaid_and_leaves_nothing(
    play: Play, record: Record, part: str, step: str
) -> None:
    """Delivered bytes are a beginning of what was sent; no end looks in order that was none; all can begin anew."""
    kill_and_check(play, record, part, step)


def kill_and_check(play: Play, record: Record, part: str, step: str) -> None:
    if part == "workflow":
        play.lease_s = SHORT_LEASE_S
    play.bring_to(step)
    moving = step in ("streaming", "draining")
    pids = play.pids(part)
    record.struck()
    if part in SERVICES:
        play.scene.kill_service(SERVICES[part])
    else:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    {
        "producer": after_an_application,
        "consumer": after_an_application,
        "workflow": after_the_workflow,
    }.get(part, after_a_relay if part in RELAYS else after_a_service)(play, record, part, moving=moving)


def after_a_relay(play: Play, record: Record, part: str, *, moving: bool) -> None:
    """Both applications see a reset, the record says relay_lost, and `status` says so within a second."""
    eventually(lambda: play.scene.status(RELAYS[part]).reason == "relay_lost")
    record.notes[DEAD] = record.detected()
    assert record.notes[DEAD] <= DETECT_S
    if moving:
        assert play.check_beginning() in BROKEN
        assert eventually(lambda: play.producer.heard("sent"))[0]["end"] in BROKEN
    assert play.workflow
    if play.step in HOLDS:
        play.go_on()
        assert play.workflow.wait_for("failed")["code"] in ("relay-lost", "not-ready", "not-found", "relay")
    else:
        ends = play.release()
        assert ends[RELAYS[part]]["reason"] == "relay_lost"
        assert all(one["reason"] for one in ends.values())
    play.open_anew()
    record.recovered()
    play.release()


def after_an_application(play: Play, record: Record, part: str, *, moving: bool) -> None:
    """The other one sees what a direct connection shows; the stream is there for the next."""
    if part == "producer":
        play.scene.retire(play.producer)
        if moving:
            assert play.check_beginning() in ("eof", *BROKEN)
            record.detected()
        port = int(play.address.rpartition(":")[2])
        play.producer = play.scene.produce(play.back, port=port)
    else:
        assert play.consumer
        play.scene.retire(play.consumer)
        play.consumer = None
        assert eventually(lambda: play.producer.heard("sent"))[0]["end"] in BROKEN
        record.detected()
        play.producer.said.clear()
    play.go_on()
    if play.step == "draining":
        play.release()
        play.open_anew()
    else:
        play.check_whole()
    record.recovered()
    assert all(one["reason"] == "released" for one in play.release().values())


def after_a_service(play: Play, record: Record, part: str, *, moving: bool) -> None:  # noqa: ARG001
    """Data goes on, and the service that comes back finds the stream."""
    with record.recovering():
        play.scene.start_service(SERVICES[part])
        assert play.scene.status(SERVICES[part]).uid == "s"
    play.go_on()
    play.check_whole()
    ends = play.release()
    assert {one["state"] for one in ends.values()} == {"ENDED"}


def after_the_workflow(play: Play, record: Record, part: str, *, moving: bool) -> None:  # noqa: ARG001
    """Data goes on to its end; then the lease ends the stream, and not much later."""
    assert play.workflow
    play.scene.retire(play.workflow)
    play.workflow = None
    if moving:
        play.check_whole()
    last = time.monotonic()  # no byte moves after this, and nobody renews
    for role in RELAYS.values():
        if play.step == "requested" and role == "CONS":
            continue
        eventually(lambda role=role: play.scene.status(role).ended)  # type: ignore[misc]
    over_s = time.monotonic() - last - SHORT_LEASE_S
    record.notes[PAST] = round(max(over_s, 0.0), 3)
    assert over_s <= LEASE_SLACK_S
    play.open_anew()
    record.recovered()
    play.release()


@pytest.mark.chaos
@pytest.mark.parametrize(("part", "step"), CELLS, ids=str)
def test_a_part_that_freezes_and_goes_on_costs_time_and_nothing_else(
    play: Play, record: Record, chance: random.Random, part: str, step: str
) -> None:
    """A pause of any part is a pause: every byte arrives, and the stream ends as it was told to."""
    play.bring_to(step)
    pids = play.pids(part)
    record.struck()
    with frozen(*pids):
        time.sleep(chance.uniform(0.2, 1.2))
    play.go_on()
    play.check_whole()
    record.recovered()
    assert all(one["state"] == "ENDED" for one in play.release().values())
