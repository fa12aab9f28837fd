"""What a run of the benchmark leaves behind: build/bench/results.json, described by these models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

FORMAT: Final = 1
Group: TypeAlias = Literal[
    "bulk", "latency", "connects", "idle", "slow", "unprivileged", "rate", "opening", "many"
]
GROUPS: Final[tuple[Group, ...]] = (
    "bulk",
    "latency",
    "connects",
    "idle",
    "slow",
    "unprivileged",
    "rate",
    "opening",
    "many",
)
Way: TypeAlias = Literal["local", "actions", "compute", "ssh"]
NetworkName: TypeAlias = Literal["loopback", "namespaces"]


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Carried(Document):
    """One cell in one round: a chain of relays that carried something.

    Attributes:
        relay: What stood between the applications: `direct`, one of our modes, or a peer.
        hops: Relays between the applications.
        connections: Concurrent connections.
        round: Cells of one round ran one after the other; ratios are taken within a round.
        load_average: Of this machine over one minute, when the cell began.
    """

    relay: str
    hops: int
    network: NetworkName = "loopback"
    connections: int
    round: int
    load_average: float

    @property
    def place(self) -> tuple[int, str, int]:
        """What has to be the same in two cells that are compared."""
        return self.hops, self.network, self.connections


class Bulk(Carried):
    """As much as goes through, from the producer to the consumer.

    Attributes:
        bytes: What arrived; the same number was sent.
        relay_cpu_s_per_gb: User and system time of all relay processes, threads and children counted.
        load_cpu_s_per_gb: The same of the producer and the consumer.
        samples: Blocks of 64 KiB that were compared, byte for byte.
        rss_bytes: Of all relay processes, at the end.
    """

    group: Literal["bulk", "unprivileged"] = "bulk"
    bytes: int
    seconds: float
    bits_per_s: float
    relay_cpu_s_per_gb: float
    load_cpu_s_per_gb: float
    samples: int
    rss_bytes: int


class Latency(Carried):
    """Round trips of 64 bytes, one after the other.

    Attributes:
        cores: Whether applications and relays had one core for all of them, or all cores of the machine.
        relay_cpu_us: Of all relays together, for one of them.
    """

    group: Literal["latency"] = "latency"
    cores: Literal["one", "all"]
    count: int
    p50_us: float
    p99_us: float
    relay_cpu_us: float


class Connects(Carried):
    """Connect, one byte back, close; `connections` of them at the same time.

    Attributes:
        relay_cpu_us: Of all relays together, for one of them.
    """

    group: Literal["connects"] = "connects"
    count: int
    per_s: float
    relay_cpu_us: float


class Idle(Carried):
    """Connections that have carried a byte and are silent.

    Attributes:
        descriptors: Of all relays together, per relay and connection.
        rss_bytes: Of all relays together.
        seconds: What it took to make the connections.
    """

    group: Literal["idle"] = "idle"
    descriptors: float
    rss_bytes: int
    rss_before_bytes: int
    seconds: float


class Slow(Carried):
    """A producer that sends all it can to a consumer that hardly reads.

    Attributes:
        rss_before_bytes: Of all relays, before it.
        rss_early_bytes: When a third of it was over and every buffer is as full as it gets.
        rss_bytes: The most from then on.
    """

    group: Literal["slow"] = "slow"
    bytes: int
    rss_before_bytes: int
    rss_early_bytes: int
    rss_bytes: int


class Rate(Carried):
    """A stream with a rate.

    Attributes:
        asked_bits_per_s: Payload per direction.
        by: Whether the relay keeps the rate, or the producer's own socket in front of a relay without one.
        bits_per_s: The mean.
        off: Of all windows of one second after the first half second, the one that is furthest from what was asked,
            as a part of it.
        idle: How many of the connections carry nothing.
    """

    group: Literal["rate"] = "rate"
    asked_bits_per_s: int
    by: Literal["relay", "producer"]
    bits_per_s: float
    off: float
    idle: int
    relay_cpu_s_per_gb: float


class Opening(Document):
    """One stream, from the call to READY.

    Attributes:
        way: How the producer's facility is reached.
        steps_s: Seconds until each step had begun, in their order; `ready` is the whole.
    """

    group: Literal["opening"] = "opening"
    way: Way
    number: int
    steps_s: dict[str, float]
    release_s: float


class Many(Document):
    """Many streams.

    Attributes:
        what: `at-once`: all opened at the same time. `cycles`: opened and released one after the other. `waiting`: new
            streams while `count` wait for their application.
        seconds: For the whole.
        first_s, last_s: The median time until READY of the first and of the last fifth; with `waiting`, of the
            streams opened before and after there were any waiting, and beside them.
        left: Relays, files of relays, threads and descriptors that were there after it and not before.
    """

    group: Literal["many"] = "many"
    what: Literal["at-once", "cycles", "waiting"]
    count: int
    seconds: float
    first_s: float
    last_s: float
    left: dict[str, int]


Run: TypeAlias = Annotated[
    Bulk | Latency | Connects | Idle | Slow | Rate | Opening | Many, Field(discriminator="group")
]


class Limits(Document):
    """What this machine can do at best, per CPU second; see limits.py."""

    cipher: str
    cipher_bytes_per_s: float
    copy_bytes_per_s: float


class Failure(Document):
    """A cell that has no figures, and why."""

    cell: str
    error: str


class Machine(Document):
    """Where it ran."""

    kernel: str
    cpu: str
    cores: int
    memory_bytes: int
    congestion_control: str
    sysctls: dict[str, str]
    versions: dict[str, str]
    load_average: tuple[float, float, float]
    was_busy: bool


class Results(Document):
    """One run."""

    format: Literal[1] = FORMAT
    began: str
    seconds: float
    full: bool
    groups: tuple[Group, ...]
    machine: Machine
    limits: Limits | None = None
    missing: tuple[str, ...] = ()
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()


def load(path: Path) -> Results:
    """A run as it was written."""
    return Results.model_validate_json(path.read_bytes())
