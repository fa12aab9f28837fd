"""Nothing lives without a lease; and the verbs by which a gateway rules its relays."""

import json
import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from .apps import Applications, Payload, receive_exactly, receive_until_broken, send
from .gateway import Gateway, RefusedError, Relay, eventually, is_running, join


def test_a_relay_that_is_not_renewed_ends(gateway: Gateway) -> None:
    relay = gateway.start(gateway.config("PROD", "tls", lease_s=0.3))
    end = relay.wait_end()
    assert (end["state"], end["reason"]) == ("ENDED", "lease_expired")
    assert not relay.socket_path.exists()


def test_renew_extends_the_lease_and_never_beyond_the_lifetime(gateway: Gateway) -> None:
    relay = gateway.start(gateway.config("PROD", "tls", lease_s=100, lifetime_s=1000))
    assert relay.status()["lease_remaining_s"] <= 100
    assert 400 < relay.renew(500)["lease_remaining_s"] <= 500
    assert 900 < relay.renew(5000)["lease_remaining_s"] <= 1000


def turns(relay: Relay) -> int:
    """How often the relay's threads have gone to sleep."""
    statuses = [task.joinpath("status").read_text() for task in Path(f"/proc/{relay.pid}/task").iterdir()]
    return sum(int(one.split("\nvoluntary_ctxt_switches:")[1].split()[0]) for one in statuses)


def test_a_relay_at_rest_sleeps_until_somebody_wants_something(gateway: Gateway, apps: Applications) -> None:
    relay = gateway.start(gateway.config("PROD", "none", lease_s=1000, sources=["127.0.0.1"]))
    peer = gateway.start(gateway.config("PROD", "none")).public_key
    relay.update(peers=[{"public_key": peer, "source_addresses": ["127.0.0.1"]}])

    def sleeps() -> bool:
        before = turns(relay)
        time.sleep(2.2)
        return turns(relay) == before

    eventually(sleeps)
    apps.dial(relay.address()).sendall(b"a stranger".ljust(64))
    assert eventually(lambda: relay.events("refused"))[0]["cause"] == "preamble"
    eventually(sleeps)
    relay.renew(0.5)
    assert relay.wait_end()["reason"] == "lease_expired"


def test_the_lifetime_is_hard(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    short = {"lifetime_s": 1.5}
    pair = gateway.pair(mode, [server.getsockname()], prod=short)
    consumer, producer = apps.established(server, pair.cons)
    pair.prod.renew(600)
    end = pair.prod.wait_end()
    assert (end["state"], end["reason"]) == ("ENDED", "lifetime_reached")
    assert receive_until_broken(consumer) == (b"", "ConnectionResetError")
    assert receive_until_broken(producer) == (b"", "ConnectionResetError")


def test_bytes_that_move_renew_the_lease(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    for relay in pair:
        relay.renew(1.2)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        consumer.sendall(b"x")
        receive_exactly(producer, 1)
        time.sleep(0.05)
    assert [relay.status()["state"] for relay in pair] == ["STREAMING", "STREAMING"]


def test_many_short_connections_renew_the_lease_as_one_long_one_does(
    gateway: Gateway, apps: Applications
) -> None:
    server = apps.listen()
    pair = gateway.pair("none", [server.getsockname()])
    for relay in pair:
        relay.renew(1.2)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        consumer, producer = apps.through(server, pair.cons)
        time.sleep(0.03)  # the relays have looked at it before a byte has moved
        consumer.sendall(b"?")
        assert receive_exactly(producer, 1) == b"?"
        consumer.close()
        producer.close()
        time.sleep(0.02)
    assert [relay.status()["state"] for relay in pair] == ["STREAMING", "STREAMING"]


def test_a_lease_begins_soon_after_the_last_byte_also_when_its_connection_is_gone(
    gateway: Gateway, apps: Applications
) -> None:
    """Nobody looks often at a relay without connections; what it has carried since counts all the same."""
    lease_s, often_s = 100, 0.25
    server = apps.listen()
    pair = gateway.pair("none", [server.getsockname()], prod={"lease_s": lease_s}, cons={"lease_s": lease_s})
    for turn in range(5):
        time.sleep(0.15 + turn * often_s / 5)
        consumer, producer = apps.established(server, pair.cons)
        moved_at = time.monotonic()
        consumer.close()
        producer.close()
        time.sleep(1.1)
        for relay in pair:
            asked_at = time.monotonic()
            began_at = asked_at + relay.status()["lease_remaining_s"] - lease_s
            assert -0.1 < began_at - moved_at < 2 * often_s


def test_a_renewal_at_cons_is_passed_on_to_prod(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(proven_mode, [server.getsockname()], prod={"lease_s": 50, "lifetime_s": 1000})
    pair.cons.renew(500)
    eventually(lambda: 400 < pair.prod.status()["lease_remaining_s"] <= 500)
    pair.cons.renew(3000)
    eventually(lambda: 900 < pair.prod.status()["lease_remaining_s"] <= 1000)


def test_a_renewal_before_ready_is_passed_on_to_prod_too(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(proven_mode, [], prod={"lease_s": 50}, ready=False)
    pair.cons.renew(500)
    pair.prod.update(targets=[join(server.getsockname())])
    pair.wait_ready()
    eventually(lambda: pair.prod.status()["lease_remaining_s"] > 400, within_s=5)


def test_bytes_do_not_shorten_a_lease_that_was_passed_on(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(proven_mode, [server.getsockname()], prod={"lease_s": 50})
    consumer, producer = apps.established(server, pair.cons)
    pair.cons.renew(500)
    eventually(lambda: pair.prod.status()["lease_remaining_s"] > 400)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        consumer.sendall(b"x")
        receive_exactly(producer, 1)
    assert pair.prod.status()["lease_remaining_s"] > 400


def test_in_mode_none_no_renewal_is_passed_on(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    pair = gateway.pair("none", [server.getsockname()], prod={"lease_s": 50})
    pair.cons.renew(500)
    apps.established(server, pair.cons)
    assert pair.prod.status()["lease_remaining_s"] <= 50


def test_a_draining_relay_lives_no_longer_than_its_lease(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    pair = gateway.pair("none", [server.getsockname()])
    apps.established(server, pair.cons)
    pair.prod.renew(1)
    pair.prod.drain(3000)
    assert pair.prod.wait_end(within_s=10)["reason"] == "lease_expired"


def test_run_with_the_id_of_a_living_relay_leaves_that_relay_alone(gateway: Gateway) -> None:
    relay = gateway.start(gateway.config("PROD", "none"))
    for verb in ("run", "start"):
        done = gateway.call(verb, text=json.dumps(relay.config))
        assert done.returncode == 1
        assert json.loads(done.stdout)["event"] == "failed"
        assert relay.socket_path.exists()
        assert relay.status()["state"] == "WAITING_HELLO"


def test_a_launcher_that_dies_at_once_leaves_no_relay_after_the_lease(gateway: Gateway) -> None:
    """Nobody reads the ready line; the relay must neither die of that nor outlive its lease."""
    config = gateway.config("PROD", "none", lease_s=1)
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [str(gateway.binary), "run", "--detached", "--runtime-dir", str(gateway.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=writer,
    )
    os.close(writer)
    os.close(reader)
    assert process.stdin
    process.stdin.write(json.dumps(config).encode())
    process.stdin.close()
    assert process.wait(20) == 0
    assert not (gateway.directory / f"{config['relay_id']}.sock").exists()


def test_events_that_nobody_reads_do_not_stop_the_stream(gateway: Gateway, apps: Applications) -> None:
    """`run` writes to a pipe; a reader who is slow is no reason to hold up science."""
    server = apps.listen()
    prod = gateway.start(gateway.config("PROD", "none", targets=[join(server.getsockname())]))
    cons = gateway.run(gateway.config("CONS", "none", peers=[gateway.peer_of(prod)]))
    gateway.introduce(prod, cons)
    eventually(lambda: cons.status()["state"] == "READY")
    for _ in range(400):
        consumer, producer = apps.established(server, cons)
        consumer.close()
        producer.close()
    assert cons.process
    assert cons.process.stdout
    reading = apps.task(cons.process.stdout.read)
    cons.stop()
    assert '"event":"end"' in reading.result()


def test_the_relay_outlives_the_process_group_that_started_it(gateway: Gateway) -> None:
    config = gateway.config("PROD", "tls")
    launcher = subprocess.Popen(
        ["sh", "-c", f"'{gateway.binary}' start --runtime-dir '{gateway.directory}'; echo; exec sleep 600"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert launcher.stdin
    assert launcher.stdout
    launcher.stdin.write(json.dumps(config))
    launcher.stdin.close()
    ready = json.loads(launcher.stdout.readline())
    os.killpg(launcher.pid, signal.SIGHUP)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait(20)
    launcher.stdout.close()
    pid = ready["pid"]
    assert is_running(pid)
    assert os.getsid(pid) == pid
    assert gateway.verb("status", config["relay_id"])["pid"] == pid
    gateway.verb("stop", config["relay_id"])
    gateway.verb("forget", config["relay_id"])


def test_files_of_a_relay_are_for_its_owner_only(gateway: Gateway) -> None:
    relay = gateway.start(gateway.config("PROD", "tls"))
    assert stat.S_IMODE(gateway.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(relay.socket_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(relay.log_path.stat().st_mode) == 0o600


def test_the_log_holds_no_private_key_and_starts_with_ready(gateway: Gateway) -> None:
    relay = gateway.start(gateway.config("PROD", "tls"))
    assert relay.events()[0]["event"] == "ready"
    assert relay.events()[0]["public_key"] == relay.public_key


def test_drain_closes_the_listener_at_once_and_lets_a_running_transfer_complete(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    address = pair.cons.address()
    assert pair.cons.drain(60)["state"] == "DRAINING"

    def refused() -> bool:
        try:
            socket.create_connection(address, timeout=5).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # it waited to be accepted when the listener was closed
            return False
        return False

    eventually(refused)
    apps.exchange(consumer, producer, Payload(1, 5_000_000), Payload(2, 5_000_000))
    end = pair.cons.wait_end()
    assert (end["state"], end["reason"], end["cut"]) == ("ENDED", "released", False)
    assert end["bytes"] == {"to_producer": 5_000_001, "to_consumer": 5_000_001}


def test_sigterm_drains(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    pair.prod.kill(signal.SIGTERM)
    eventually(lambda: pair.prod.status()["state"] == "DRAINING")
    apps.exchange(consumer, producer, Payload(1, 1_000_000), Payload(2, 1_000_000))
    end = pair.prod.wait_end()
    assert (end["state"], end["reason"], end["cut"]) == ("ENDED", "admin", False)


def test_the_drain_deadline_cuts(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    prod = gateway.run(gateway.config("PROD", "none", targets=[join(server.getsockname())], drain_s=0.2))
    cons = gateway.start(gateway.config("CONS", "none", peers=[gateway.peer_of(prod)]))
    gateway.introduce(prod, cons)
    eventually(lambda: cons.status()["state"] == "READY")
    consumer, _ = apps.established(server, cons)
    prod.kill(signal.SIGTERM)
    assert prod.process
    assert prod.process.wait(20) == 3
    assert receive_until_broken(consumer) == (b"", "ConnectionResetError")
    assert prod.process.stdout
    end = json.loads(prod.process.stdout.read().splitlines()[-1])
    assert (end["event"], end["cut"], end["reason"]) == ("end", True, "admin")


def test_a_connection_that_is_being_begun_ends_with_its_relay_and_in_its_books(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """PROD waits for an application that does not answer when its relay is stopped."""
    server = apps.listen(backlog=0)
    pair = gateway.pair(mode, [server.getsockname()])
    apps.established(server, pair.cons)
    waiting = [apps.keep(socket.socket()) for _ in range(4)]
    for one in waiting:
        one.settimeout(0)
        one.connect_ex(server.getsockname())  # the backlog is full: who comes later is not answered
    apps.connect(pair.cons)
    eventually(lambda: pair.prod.status()["listeners"][0]["active"] == 2)
    pair.prod.stop()
    closes = pair.prod.events("close")
    assert sorted((close["connection"], close["reason"]) for close in closes) == [(1, "ended"), (2, "ended")]


def test_a_second_sigterm_ends_at_once(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()], prod={"drain_s": 3000})
    consumer, _ = apps.established(server, pair.cons)
    pair.prod.kill(signal.SIGTERM)
    eventually(lambda: pair.prod.status()["state"] == "DRAINING")
    pair.prod.kill(signal.SIGTERM)
    assert pair.prod.wait_end()["reason"] == "admin"
    assert receive_until_broken(consumer) == (b"", "ConnectionResetError")


def test_stop_answers_the_end_record_and_answers_it_again(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    sending = apps.task(lambda: send(producer, Payload(1, 1000)))
    receive_exactly(consumer, 1000)
    sending.result()
    first = pair.prod.stop()
    assert not is_running(pair.prod.pid)
    assert (first["event"], first["state"], first["reason"]) == ("end", "ENDED", "released")
    assert first["bytes"] == {"to_consumer": 1001, "to_producer": 1}
    assert pair.prod.stop() == first
    assert pair.prod.status() == first
    assert pair.prod.drain() == first
    with pytest.raises(RefusedError) as refusal:
        pair.prod.renew(5)
    assert refusal.value.code == "no-such-relay"


def test_a_killed_relay_is_reported_lost_until_it_is_forgotten(gateway: Gateway) -> None:
    relay = gateway.start(gateway.config("PROD", "tls"))
    relay.kill()
    relay.wait_gone()
    for verb in (relay.status, relay.stop, relay.drain):
        with pytest.raises(RefusedError) as refusal:
            verb()
        assert (refusal.value.exit, refusal.value.code) == (1, "relay-lost")
    assert gateway.verb("list")["relays"] == [{"relay_id": relay.id, "alive": False, "pid": None}]
    relay.forget()
    assert gateway.verb("list")["relays"] == []
    with pytest.raises(RefusedError) as refusal:
        relay.status()
    assert refusal.value.code == "no-such-relay"


def test_a_living_relay_is_not_forgotten(gateway: Gateway) -> None:
    relay = gateway.start(gateway.config("PROD", "tls"))
    with pytest.raises(RefusedError) as refusal:
        relay.forget()
    assert refusal.value.code == "bad-request"
    assert relay.status()["state"] == "WAITING_HELLO"


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"\n", "bad-request"),
        (b"hello?\n", "bad-request"),
        (b"[]\n", "protocol"),
        (b'{"verb": "status"}\n', "protocol"),
        (b'{"protocol": 2, "verb": "status"}\n', "protocol"),
        (b'{"protocol": 1, "verb": "dance"}\n', "bad-request"),
        (b'{"protocol": 1, "verb": "renew"}\n', "bad-request"),
        (b'{"protocol": 1, "verb": "renew", "lease_s": -1}\n', "bad-request"),
        (b'{"protocol": 1, "verb": "status", "more": 1}\n', "bad-request"),
        (b'{"protocol": 1, "verb": "update", "changes": {"mode": "none"}}\n', "bad-request"),
        (b"x" * (1 << 20), "bad-request"),
    ],
)
def test_a_wrong_control_request_is_refused_and_harms_nothing(
    gateway: Gateway, request_bytes: bytes, code: str
) -> None:
    relay = gateway.start(gateway.config("PROD", "tls"))
    answer = json.loads(relay.ask(request_bytes))
    assert answer["protocol"] == 1
    assert answer["error"]["code"] == code
    assert relay.status()["state"] == "WAITING_HELLO"


def test_silent_control_clients_keep_nobody_waiting(gateway: Gateway, apps: Applications) -> None:
    relay = gateway.start(gateway.config("PROD", "tls"))
    for _ in range(40):
        client = apps.keep(socket.socket(socket.AF_UNIX))
        client.connect(str(relay.socket_path))
    assert relay.status()["state"] == "WAITING_HELLO"
    assert relay.stop()["reason"] == "released"


def test_a_frozen_relay_at_which_as_many_have_asked_as_may_wait_ends_with_its_release(
    gateway: Gateway, apps: Applications
) -> None:
    """Clients that have given up keep their places until it accepts them: connecting would wait for ever."""
    pair = gateway.pair("tls", [(server := apps.listen()).getsockname()])
    consumer, _ = apps.established(server, pair.cons)
    frozen = pair.cons
    os.kill(frozen.pid, signal.SIGSTOP)
    with pytest.raises(BlockingIOError):  # noqa: PT012 - as many as net.core.somaxconn
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(0)
                client.connect(str(frozen.socket_path))
    (row,) = [row for row in gateway.verb("list")["relays"] if row["relay_id"] == frozen.id]
    assert (row["alive"], row["pid"]) == (True, frozen.pid)
    with pytest.raises(RefusedError, match="is alive"):
        frozen.forget()
    with pytest.raises(RefusedError) as refusal:
        frozen.stop()
    assert refusal.value.code == "relay-lost"
    assert not is_running(frozen.pid)
    assert receive_until_broken(consumer) == (b"", "ConnectionResetError")


def test_listing_relays_wakes_none_that_start_has_left_behind(gateway: Gateway) -> None:
    """With a thousand of them, asking each whether it is there would keep the node busy."""
    relays = [gateway.start(gateway.config("PROD", "tls")) for _ in range(3)]
    for relay in relays:
        os.kill(relay.pid, signal.SIGSTOP)
    listed = {row["relay_id"]: row for row in gateway.verb("list")["relays"]}
    sockets = Path("/proc/net/unix").read_text()
    for relay in relays:
        assert listed[relay.id] == {"relay_id": relay.id, "alive": True, "pid": relay.pid}
        assert sockets.count(relay.id) == 1, "a connection waits to be accepted"
        os.kill(relay.pid, signal.SIGCONT)
        assert relay.status()["pid"] == relay.pid


def test_a_relay_in_the_foreground_which_has_no_log_is_listed_too(gateway: Gateway) -> None:
    relay = gateway.run(gateway.config("PROD", "tls"))
    assert gateway.verb("list")["relays"] == [{"relay_id": relay.id, "alive": True, "pid": relay.pid}]


def test_a_relay_keeps_nothing_open_that_its_launcher_had_open(gateway: Gateway) -> None:
    config = gateway.config("PROD", "tls")
    reading, writing = os.pipe()
    try:
        started = subprocess.run(
            [str(gateway.binary), "start", "--runtime-dir", str(gateway.directory)],
            input=json.dumps(config),
            capture_output=True,
            text=True,
            pass_fds=[writing],
            check=True,
            timeout=20,
        )
        relay = Relay(gateway, config, json.loads(started.stdout))
        gateway.relays.append(relay)
        pipe = Path(f"/proc/self/fd/{writing}").readlink()
        assert pipe not in {link.readlink() for link in Path(f"/proc/{relay.pid}/fd").iterdir()}
    finally:
        os.close(reading)
        os.close(writing)
