"""For as long as it is told: streams come and go, one stays, and nothing grows."""

from __future__ import annotations

import random
import statistics
import time
from typing import Final

import psutil
import pytest
from relay.apps import Payload

from .conftest import option
from .report import Record
from .scene import ROLES, Scene

# Of each figure, so much more in the last third than in the second is no growth.
SLACK: Final = {"rss_bytes": 6 << 20, "descriptors": 4, "threads": 2}


def figures(pid: int) -> dict[str, int]:
    """What one process holds."""
    process = psutil.Process(pid)
    return {
        "rss_bytes": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


@pytest.mark.chaos
@pytest.mark.soak
@pytest.mark.timeout(0)
def test_nothing_grows_however_long_it_runs(
    request: pytest.FixtureRequest, scene: Scene, record: Record, chance: random.Random
) -> None:
    """Memory, descriptors, threads of services and of relays that stay are flat; all bytes of all streams are right."""
    soak_s: float = option(request.config, "--soak", 60.0)
    server = scene.apps.listen()
    staying = scene.open(server, uid="stays", lease_s=60, probe="path")
    watched = {
        **{f"service {role}": scene.services[role].process.pid for role in ROLES},
        **{f"relay {role}": scene.relay_pid(role, "stays") for role in ROLES},
        "test": psutil.Process().pid,
    }
    seen: dict[str, list[dict[str, int]]] = {name: [] for name in watched}
    began, streams, moved = time.monotonic(), 0, 0
    sample_at = began
    while time.monotonic() - began < soak_s:
        stream = scene.open(server, uid="comes", mode=chance.choice(["tls", "auth", "none"]), probe="path")
        for listener in (stream.listeners[0], staying.listeners[0]):
            consumer, producer = scene.converse(server, listener)
            sizes = [chance.randrange(1, 3_000_000) for _ in range(2)]
            there, back = (Payload(chance.randrange(1, 8), size) for size in sizes)
            scene.apps.exchange(consumer, producer, there, back)
            scene.apps.forget(consumer, producer)
            moved += sum(sizes)
        assert stream.release().in_order
        staying.renew()
        scene.renew_bystander()
        streams += 1
        if time.monotonic() >= sample_at:
            sample_at += max(1.0, soak_s / 300)
            for name, pid in watched.items():
                seen[name].append(figures(pid))
    record.notes |= {"soak_s": round(soak_s), "streams": streams, "megabytes": round(moved / 1e6)}
    assert staying.release().in_order
    for name, samples in seen.items():
        third = len(samples) // 3
        for figure, slack in SLACK.items():
            middle, last = (
                statistics.median(one[figure] for one in part)
                for part in (samples[third : 2 * third], samples[2 * third :])
            )
            grown = last - middle
            record.notes[f"{name} {figure} grown"] = int(grown)
            assert grown <= slack, f"{name}: {figure} {middle} became {last}"
