"""What one flow, one gateway and one facility carry at 100G and 400G: computed, from measurements and sources.

>>> f"{window_limit_bits_per_s(0.1) / 1e9:.1f} Gbit/s"
'85.9 Gbit/s'
>>> f"{bandwidth_delay_bytes(100e9, 0.1) / 1e9:.2f} GB"
'1.25 GB'
>>> f"{window_bits_per_s(64 * 2**20, 0.1) / 1e9:.1f} Gbit/s"
'5.4 Gbit/s'
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .compare import Spread, bulk
from .results import Results
from .tables import Table, number

RTT_S: Final = 0.1
LINES_BITS_PER_S: Final = (100e9, 400e9)
LARGEST_WINDOW_BYTES: Final = 2**30  # 16 bits, shifted by 14 at most: RFC 7323
RELAY_CORES: Final = 16
NIC_BITS_PER_S: Final = 100e9
# One TCP flow into one receiver, by others, see the page: MTU 1500, MTU 4096 and more
RECEIVER_BITS_PER_S: Final = {1500: 66e9, 9000: 95e9}


def window_bits_per_s(window_bytes: float, rtt_s: float) -> float:
    """What a flow carries at most that may have so much under way.

    >>> window_bits_per_s(1e6, 0.008)
    1000000000.0
    """
    return window_bytes * 8 / rtt_s


def window_limit_bits_per_s(rtt_s: float) -> float:
    """What the window field of TCP lets one flow carry.

    >>> round(window_limit_bits_per_s(0.15) / 1e9, 1)
    57.3
    """
    return window_bits_per_s(LARGEST_WINDOW_BYTES, rtt_s)


def bandwidth_delay_bytes(bits_per_s: float, rtt_s: float) -> float:
    """What is under way when the line is full.

    >>> bandwidth_delay_bytes(25e9, 0.1)
    312500000.0
    """
    return bits_per_s * rtt_s / 8


def core_bits_per_s(relay_cpu_s_per_gb: float) -> float:
    """What one core carries through one relay.

    >>> core_bits_per_s(0.1)
    80000000000.0
    """
    return 8e9 / relay_cpu_s_per_gb


@dataclass(frozen=True)
class Flow:
    """One connection through two gateways.

    Attributes:
        relay_cpu_s_per_gb: Of one relay.
    """

    rtt_s: float
    mtu: int
    relay_cpu_s_per_gb: float

    def limits(self, line_bits_per_s: float) -> dict[str, float]:
        """What each thing on its way lets through; a connection is on one core of a relay."""
        return {
            "the line": line_bits_per_s,
            "TCP's window": window_limit_bits_per_s(self.rtt_s),
            "the receiving kernel": RECEIVER_BITS_PER_S[self.mtu],
            "one core of a relay": core_bits_per_s(self.relay_cpu_s_per_gb),
        }

    def carries(self, line_bits_per_s: float) -> tuple[float, str]:
        """Bits per second, and what it is that limits.

        >>> Flow(0.1, 9000, 0.01).carries(100e9)
        (85899345920.0, "TCP's window")
        >>> Flow(0.001, 9000, 0.8).carries(400e9)
        (10000000000.0, 'one core of a relay')
        """
        return _smallest(self.limits(line_bits_per_s))


def gateway_carries(
    relay_cpu_s_per_gb: float, cores: int = RELAY_CORES, nic_bits_per_s: float = NIC_BITS_PER_S
) -> tuple[float, str]:
    """What a gateway carries with enough connections; in and out have the two directions of its interface.

    >>> gateway_carries(0.1, cores=1)
    (80000000000.0, 'its cores')
    >>> gateway_carries(0.1, cores=2)
    (100000000000.0, 'its interface')
    """
    return _smallest(
        {"its interface": nic_bits_per_s, "its cores": cores * core_bits_per_s(relay_cpu_s_per_gb)}
    )


def facility_carries(gateways: int, relay_cpu_s_per_gb: float, line_bits_per_s: float) -> tuple[float, str]:
    """What a facility carries whose streams are spread over its gateways.

    >>> facility_carries(2, 0.1, 400e9)
    (200000000000.0, 'its interface')
    >>> facility_carries(8, 0.1, 400e9)
    (400000000000.0, 'the line')
    """
    each, why = gateway_carries(relay_cpu_s_per_gb)
    return _smallest({"the line": line_bits_per_s, why: gateways * each})


def _smallest(limits: dict[str, float]) -> tuple[float, str]:
    name = min(limits, key=lambda one: limits[one])
    return limits[name], name


def costs(results: Results) -> dict[str, float]:
    """CPU seconds per GB of one relay, by mode: half of what two took at 16 connections, or the most there were."""
    runs = [run for run in bulk(results) if run.hops == 2 and run.network == "loopback"]
    found = {}
    for mode in ("none", "auth", "tls"):
        counts = {run.connections for run in runs if run.relay == mode}
        if counts:
            count = 16 if 16 in counts else max(counts)
            values = [
                run.relay_cpu_s_per_gb for run in runs if run.relay == mode and run.connections == count
            ]
            middle = Spread.of(values)
            assert middle
            found[mode] = middle.median / 2
    return found


def tables(results: Results) -> Iterable[Table]:
    """The page's tables."""
    cost = costs(results)
    lines = [f"{line / 1e9:g}G" for line in LINES_BITS_PER_S]
    windows = [
        [
            f"{rtt_s * 1000:g} ms",
            *[number(bandwidth_delay_bytes(line, rtt_s) / 1e9) for line in LINES_BITS_PER_S],
            number(window_limit_bits_per_s(rtt_s) / 1e9),
            number(window_bits_per_s(64 * 2**20, rtt_s) / 1e9),
        ]
        for rtt_s in (0.01, 0.05, 0.1, 0.15)
    ]
    columns = [
        "round trip",
        *[f"{line}: GB under way" for line in lines],
        "one flow at most, Gbit/s",
        "with 64 MiB",
    ]
    yield Table("windows", "What is under way", columns, windows)

    flows, gateways = [], []
    for mode, relay in cost.items():
        for mtu in RECEIVER_BITS_PER_S:
            row = [f"`{mode}`, MTU {mtu}", number(relay)]
            for line in LINES_BITS_PER_S:
                bits_per_s, why = Flow(RTT_S, mtu, relay).carries(line)
                row += [f"{number(bits_per_s / 1e9)}: {why}", str(math.ceil(line / bits_per_s))]
            flows.append(row)
        each = [f"`{mode}`", number(core_bits_per_s(relay) / 1e9)]
        each += [number(line / core_bits_per_s(relay)) for line in LINES_BITS_PER_S]
        for count in (1, 2, 4, 8):
            bits_per_s, why = facility_carries(count, relay, LINES_BITS_PER_S[-1])
            each.append(f"{number(bits_per_s / 1e9)}: {why}")
        gateways.append(each)
    columns = ["one flow, 100 ms", "relay CPU s/GB"]
    for title in lines:
        columns += [f"{title}: Gbit/s", f"flows to fill {title}"]
    yield Table("flows", "One flow", columns, flows)
    columns = ["mode", "Gbit/s per core", *[f"cores for {line}" for line in lines]]
    columns += [f"{count} gateway{'s' if count > 1 else ''}" for count in (1, 2, 4, 8)]
    yield Table("gateways", "Gateways", columns, gateways)
