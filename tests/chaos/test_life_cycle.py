"""The verbs of a service in any order, by two owners with names in common, held against a model."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import hypothesis
import pytest
from conftest import relay_pids
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from relay.gateway import Gateway, eventually, find_binary

from scistream_flows.config import load_facility
from scistream_flows.errors import Conflict, NotFound
from scistream_flows.s2cs import S2CS

from .conftest import option, seed_of
from .report import DEAD, Record
from .scene import DETECT_S

OWNERS: Final = ("urn:example:ada", "urn:example:bob")
NAMES: Final = ("s", "t")
LONG_S: Final = 300
SHORT_S: Final = 4
# A stream with a short lease is not touched any more after this: before, it surely lives.
SURELY_S: Final = 2.5
# After this it is surely over.
OVER_S: Final = SHORT_S + 1.0

Key = tuple[str, str]
KEYS: Final = st.tuples(st.sampled_from(OWNERS), st.sampled_from(NAMES))


@dataclass
class Known:
    """What the model knows of a stream; `reason` is empty as long as it lives."""

    request: dict[str, Any]
    offer: Any
    lease_s: int
    renewed_at: float = field(default_factory=time.monotonic)
    targets: bool = True
    reason: str = ""


class LifeCycle(RuleBasedStateMachine):
    """One facility, real relays, and what has to be true of them."""

    seen_dead_after_s: ClassVar[
        list[float]
    ] = []  # of all lives: how long it took until a killed relay was told

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="life-cycle-"))
        self.environment = {
            **os.environ,
            "SCISTREAM_STATE_DIR": str(self.base),
            "SCISTREAM_CONFIG_DIR": str(self.base / "none"),
            "SCISTREAM_POLICY_USERS": '["all_authenticated_users"]',
        }
        self.service = self.new_service()
        self.streams: dict[Key, Known] = {}
        self.offered: set[str] = set()

    def new_service(self) -> S2CS:
        return S2CS(load_facility("aps", environment=self.environment))

    def living(self) -> dict[Key, Known]:
        return {key: one for key, one in self.streams.items() if not one.reason}

    def short(self) -> list[Known]:
        return [one for one in self.living().values() if one.lease_s == SHORT_S]

    def let_the_old_end(self) -> None:
        """Before a verb: no lease is about to end in the midst of it."""
        if any(time.monotonic() - one.renewed_at > SURELY_S for one in self.short()):
            self.wait()

    @precondition(lambda self: self.short())
    @rule()
    def wait(self) -> None:
        """Time passes: what nobody renews has ended, and nothing else."""
        ending = self.short()
        time.sleep(max(0.0, max(one.renewed_at for one in ending) + OVER_S - time.monotonic()))
        for one in ending:
            one.reason = "lease_expired"

    def about(self, key: Key) -> dict[str, Any]:
        return {"protocol": 1, "uid": key[1], "role": "PROD"}

    @rule(
        key=KEYS,
        listeners=st.sampled_from((1, 1, 2)),
        lease_s=st.sampled_from((LONG_S, LONG_S, LONG_S, SHORT_S)),
        led_to=st.sampled_from((["127.0.0.1:9"], ["127.0.0.1:9"], [])),
    )
    def request(self, key: Key, listeners: int, lease_s: int, led_to: list[str]) -> None:
        self.ask_for(key, listeners, lease_s, led_to)

    def ask_for(self, key: Key, listeners: int, lease_s: int, led_to: list[str]) -> None:
        self.let_the_old_end()
        document = {**self.about(key), "num_conn": listeners, "lease_s": lease_s, "targets": led_to}
        known = self.streams.get(key)
        if known is not None and not known.reason and known.request != document:
            with pytest.raises(Conflict):
                self.service.request(document, owner=key[0])
            return
        asked_at = time.monotonic()
        offer = self.service.request(document, owner=key[0])
        relays = {relay.relay_id for relay in offer.relays}
        assert len(offer.addresses) == listeners
        if known is not None and not known.reason:
            assert offer.addresses == known.offer.addresses
            assert offer.relays == known.offer.relays
            known.lease_s, known.renewed_at = lease_s, time.monotonic()
            took_s = time.monotonic() - asked_at
            assert lease_s - took_s - 0.1 <= offer.lease_remaining_s <= lease_s
            return
        assert not relays & self.offered, "a relay was offered twice"
        self.offered |= relays
        self.streams[key] = Known(document, offer, lease_s, targets=bool(led_to))

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def request_again(self, data: st.DataObject) -> None:
        """The very same as the last time: the stream that lives, with a new lease, or another one."""
        key = data.draw(st.sampled_from(sorted(self.streams)))
        asked = self.streams[key].request
        self.ask_for(key, asked["num_conn"], asked["lease_s"], asked["targets"])

    def of_a_living_one(self, key: Key, verb: Callable[[], Any]) -> Any:
        """What a verb answers that only a stream takes that lives; else it must be NotFound."""
        self.let_the_old_end()
        if key in self.living():
            return verb()
        with pytest.raises(NotFound):
            verb()
        return None

    @rule(key=KEYS)
    def hello(self, key: Key) -> None:
        document = {**self.about(key), "targets": ["127.0.0.1:9"]}
        offer = self.of_a_living_one(key, lambda: self.service.hello(document, owner=key[0]))
        if offer is not None:
            assert offer.addresses == self.streams[key].offer.addresses
            self.streams[key].targets = True

    @rule(key=KEYS, rate=st.sampled_from((0, 100)))
    def update(self, key: Key, rate: int) -> None:
        document = {**self.about(key), "rate_mbits_per_s": rate}
        status = self.of_a_living_one(key, lambda: self.service.update(document, owner=key[0]))
        if status is not None:
            assert not status.ended

    @rule(key=KEYS, lease_s=st.sampled_from((LONG_S, SHORT_S)))
    def renew(self, key: Key, lease_s: int) -> None:
        self.let_the_old_end()
        document = {**self.about(key), "lease_s": lease_s}
        known = self.streams.get(key)
        if known is None:
            with pytest.raises(NotFound):
                self.service.renew(document, owner=key[0])
            return
        status = self.service.renew(document, owner=key[0])
        assert (status.reason or "") == known.reason
        if not known.reason:
            known.lease_s, known.renewed_at = lease_s, time.monotonic()
            assert lease_s - 1 < (status.lease_remaining_s or 0) <= lease_s

    @rule(key=KEYS)
    def status(self, key: Key) -> None:
        self.let_the_old_end()
        known = self.streams.get(key)
        if known is None:
            with pytest.raises(NotFound):
                self.service.status(self.about(key), owner=key[0])
            return
        status = self.service.status(self.about(key), owner=key[0])
        assert (status.owner, status.reason or "") == (key[0], known.reason)
        if not known.reason:
            assert (status.lease_remaining_s or 0) <= known.lease_s
            assert status.state == ("LISTENING" if known.targets else "WAITING_HELLO")

    @rule(key=KEYS)
    def release(self, key: Key) -> None:
        self.let_the_old_end()
        released = self.service.release(self.about(key), owner=key[0])
        known = self.streams.get(key)
        if known is None:
            assert released.end is None
            return
        known.reason = known.reason or "released"
        assert released.end is not None
        assert released.end.reason == known.reason

    @rule(owner=st.sampled_from(OWNERS))
    def see_all(self, owner: str) -> None:
        self.let_the_old_end()
        listed = self.service.list({"protocol": 1}, owner=owner).streams
        assert {(one.owner, one.uid) for one in listed} == {key for key in self.living() if key[0] == owner}

    @precondition(lambda self: self.living())
    @rule(data=st.data())
    def kill_a_relay(self, data: st.DataObject) -> None:
        """By its process; the next who looks has to see it, within a second."""
        self.let_the_old_end()
        living = sorted(self.living())
        if not living:
            return
        key = data.draw(st.sampled_from(living))
        (relay,) = self.streams[key].offer.relays
        rows = Gateway(find_binary(), self.service.config.state_dir / "relays").verb("list")["relays"]
        (pid,) = [row["pid"] for row in rows if row["relay_id"] == relay.relay_id]
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        self.streams[key].reason = "relay_lost"
        eventually(lambda: self.service.status(self.about(key), owner=key[0]).reason == "relay_lost")
        self.seen_dead_after_s.append(time.monotonic() - killed_at)

    @rule()
    def start_the_service_anew(self) -> None:
        self.service.close()
        self.service = self.new_service()

    @invariant()
    def every_living_stream_has_its_relay_and_no_other_relay_runs(self) -> None:
        surely = [one for one in self.living().values() if one not in self.short()]
        assert len(surely) <= len(relay_pids(self.base)) <= len(self.living())

    def teardown(self) -> None:
        try:
            for owner, uid in self.streams:
                self.service.release({"protocol": 1, "uid": uid, "role": "PROD"}, owner=owner)
            assert relay_pids(self.base, patience_s=5) == []
            assert list((self.service.config.state_dir / "relays").glob("*")) == []
        finally:
            for pid in relay_pids(self.base):
                os.kill(pid, signal.SIGKILL)
            self.service.close()
            shutil.rmtree(self.base)


def lives(config: pytest.Config, record: Record, *, examples: int, steps: int) -> None:
    """Plays so many lives."""
    LifeCycle.seen_dead_after_s.clear()
    machine = hypothesis.seed(seed_of(config))(LifeCycle)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # each life takes seconds: none is lived again to find a shorter one
            suppress_health_check=list(HealthCheck),
        ),
    )
    if LifeCycle.seen_dead_after_s:
        record.notes[DEAD] = round(max(LifeCycle.seen_dead_after_s), 3)


def test_whatever_verbs_come_a_service_answers_as_the_model_does(
    request: pytest.FixtureRequest, record: Record
) -> None:
    """Any verb of any of two owners, at any time, and relays killed: a few lives."""
    lives(request.config, record, examples=6, steps=25)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_whatever_verbs_come_for_long_a_service_answers_as_the_model_does(
    request: pytest.FixtureRequest, record: Record
) -> None:
    """The same for many lives."""
    examples = 10 if option(request.config, "--quick", otherwise=False) else 60
    lives(request.config, record, examples=examples, steps=40)
    record.notes["lives"] = examples
    assert record.notes.get(DEAD, 0) <= DETECT_S
