"""A stream from one facility to the other, over the only way there is."""

import errno
import json
import shutil
import subprocess

import pytest
from relay.apps import Payload
from relay.gateway import eventually, join

from .sites import Facilities, last_probe
from .topology import Family, reaches

pytestmark = pytest.mark.net


def test_a_whole_stream_arrives_in_every_mode_over_both_families(
    facilities: Facilities, mode: str, family: Family
) -> None:
    server = facilities.listen(family)
    pair = facilities.pair(mode, server.getsockname(), family, until="closed", linger_s=0.2)
    assert [relay.status()["proof"] for relay in pair] == ["target", "target"]
    network = facilities.network
    assert reaches(network.consumer, *server.getsockname()[:2]) == errno.ENETUNREACH
    consumer, producer = facilities.established(server, pair)
    there, back = Payload(1, 3_000_001), Payload(2, 20_000_003)
    facilities.apps.exchange(consumer, producer, there, back)
    for relay in pair:
        end = relay.wait_end()
        assert (end["state"], end["reason"]) == ("ENDED", "finished")
        assert end["bytes"] == {"to_producer": there.size + 1, "to_consumer": back.size + 1}


def test_a_stream_over_a_long_and_narrow_wan_becomes_ready_and_arrives_whole(
    facilities: Facilities, mode: str
) -> None:
    facilities.network.wan.delay(0.05)
    facilities.network.wan.throttle(100)
    server = facilities.listen()
    pair = facilities.pair(mode, server.getsockname())
    assert last_probe(pair)["result"] == "ok"
    consumer, producer = facilities.established(server, pair)
    (stream,) = pair.cons.status()["streams"]
    assert stream["legs"]["wan"]["min_rtt_s"] >= 0.1
    facilities.apps.exchange(consumer, producer, Payload(1, 200_000), Payload(2, 5_000_000))


@pytest.mark.parametrize(
    ("obstacle", "result", "name"),
    [
        ("swallows", "timeout", "ETIMEDOUT"),
        ("refuses", "refused", "ECONNREFUSED"),
        ("no route", "no-route", "EHOSTUNREACH"),
    ],
)
def test_a_stream_whose_wan_port_cannot_be_reached_is_never_ready_and_says_where_and_why(
    facilities: Facilities, obstacle: str, result: str, name: str
) -> None:
    network = facilities.network
    prod = facilities.prod("tls", facilities.listen().getsockname())
    listeners = prod.ready["listeners"]
    wan = network.gateway_a.address("IPv4", "wan")
    if obstacle == "swallows":
        network.wan.cut()
    elif obstacle == "refuses":
        closed = network.gateway_a.inside(lambda: facilities.apps.listen(wan))
        listeners = [{"index": 0, "address": join(closed.getsockname())}]
        closed.close()
    else:
        network.gateway_b.call("ip", "route", "add", "unreachable", wan)
    pair = facilities.cons(prod, listeners=listeners, connect_timeout_s=0.5, hello_timeout_s=1)
    eventually(lambda: last_probe(pair).get("result") == result)
    assert last_probe(pair)["errno"] == name
    assert last_probe(pair)["address"] == listeners[0]["address"]
    assert [relay.status()["state"] for relay in pair] == ["LISTENING", "LISTENING"]
    end = pair.cons.wait_end()
    assert (end["state"], end["reason"]) == ("FAILED", "hello_timeout")
    assert end["message"] == f"the last probe: {result} {listeners[0]['address']} ({name})"


def test_a_stream_becomes_ready_when_the_wan_is_there_again(facilities: Facilities, mode: str) -> None:
    facilities.network.wan.cut()
    prod = facilities.prod(mode, facilities.listen().getsockname())
    pair = facilities.cons(prod, connect_timeout_s=0.5)
    eventually(lambda: last_probe(pair).get("result") == "timeout")
    facilities.network.wan.restore()
    pair.wait_ready()


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is not installed")
@pytest.mark.parametrize("direction", ["to_producer", "to_consumer"])
def test_iperf3_runs_through_the_stream(facilities: Facilities, mode: str, direction: str) -> None:
    """Its server takes one test only, and a control connection before the one with data."""
    network = facilities.network
    server = facilities.listen()
    host, port = server.getsockname()
    server.close()
    there = subprocess.Popen(
        network.producer.command("iperf3", "--server", "--one-off", "--bind", host, "--port", str(port)),
        stdout=subprocess.DEVNULL,
    )
    try:
        pair = facilities.pair(mode, (host, port))
        relay_host, relay_port = pair.cons.address()
        answer = network.consumer.call(
            *("iperf3", "--json", "--bytes", "20M", "--client", relay_host, "--port", str(relay_port)),
            *(["--reverse"] if direction == "to_consumer" else []),
        )
        # A server of iperf3 that is told of the end reads no further, whatever is under way.
        end = json.loads(answer)["end"]
        assert end["sum_sent"]["bytes"] >= 20_000_000
        assert end["sum_received"]["bytes"] > 1_000_000
        assert there.wait(20) == 0
    finally:
        there.kill()
        there.wait(20)
