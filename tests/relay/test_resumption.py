"""Connections resume the session of an earlier one. The two hellos of each show on the wire what it is."""

import socket
import struct
from dataclasses import dataclass

from .apps import Applications, Payload, Tap, nobody_waits, receive_exactly, receive_until_broken
from .gateway import Gateway, Pair, Relay, eventually, join

CLIENT_HELLO, SERVER_HELLO = 1, 2
PRE_SHARED_KEY, EARLY_DATA, PSK_MODES, KEY_SHARE = 41, 42, 45, 51
X25519, X25519_ML_KEM_768 = 0x001D, 0x11EC
WHOLE = {"tls": [X25519_ML_KEM_768, X25519], "auth": [X25519]}
"""The exchanges that a handshake without a ticket offers."""
WITH_AN_EXCHANGE = b"\x01\x01"
"""The only mode offered: a ticket never stands without fresh keys (RFC 8446, 4.2.9)."""


@dataclass(frozen=True)
class Hello:
    """The first message of one side."""

    extensions: dict[int, bytes]

    @staticmethod
    def read(kind: int, record: bytes) -> "Hello":
        content_type, _, length = struct.unpack(">BHH", record[:5])
        message = record[5 : 5 + length]
        assert (content_type, message[0], len(message)) == (22, kind, length), record[:64].hex()
        at = 4 + 2 + 32
        at += 1 + message[at]  # the session's name of former versions
        at += 2 + int.from_bytes(message[at : at + 2], "big") if kind == CLIENT_HELLO else 2  # ciphers
        at += 2 if kind == CLIENT_HELLO else 1  # no compression
        end = at + 2 + int.from_bytes(message[at : at + 2], "big")
        at += 2
        extensions = {}
        while at < end:
            extension, size = struct.unpack(">HH", message[at : at + 4])
            extensions[extension] = message[at + 4 : at + 4 + size]
            at += 4 + size
        return Hello(extensions)

    def groups(self) -> list[int]:
        """The key exchanges for which a client sends a share."""
        shares, at, groups = self.extensions[KEY_SHARE], 2, []
        while at < len(shares):
            group, size = struct.unpack(">HH", shares[at : at + 4])
            groups.append(group)
            at += 4 + size
        return groups

    def has_ticket(self) -> bool:
        return PRE_SHARED_KEY in self.extensions


def offered(tap: Tap, leg: int) -> Hello:
    return Hello.read(CLIENT_HELLO, bytes(tap.to_prod[leg]))


def has_resumed(tap: Tap, leg: int) -> bool:
    """Whether PROD took the ticket."""
    return Hello.read(SERVER_HELLO, bytes(tap.to_cons[leg])).has_ticket()


def carry(apps: Applications, server: socket.socket, cons: Relay, seed: int = 1) -> None:
    """One connection with payload in both directions, to its end."""
    consumer, producer = apps.through(server, cons)
    apps.exchange(consumer, producer, Payload(seed, 200_000), Payload(seed + 1, 300_000))
    apps.forget(consumer, producer)


def resuming(gateway: Gateway, apps: Applications, tap: Tap, mode: str) -> tuple[socket.socket, Pair]:
    """An application, and a stream to it of which one connection is over that has resumed."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], via=tap)
    carry(apps, server, pair.cons)
    pair.wait_closed(1)
    assert has_resumed(tap, -1)
    return server, pair


def test_a_further_connection_resumes_and_carries_the_exact_bytes(
    gateway: Gateway, apps: Applications, tap: Tap, proven_mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(proven_mode, [server.getsockname()], via=tap)
    probe = len(tap.legs) - 1
    for number in range(3):
        carry(apps, server, pair.cons, number)
    pair.wait_closed(3)
    legs = range(probe, len(tap.legs))
    for leg in legs:
        hello = offered(tap, leg)
        # In mode tls, whoever has no ticket exchanges ML-KEM; whoever has one need not, but always a fresh key.
        assert hello.groups() == ([X25519] if hello.has_ticket() else WHOLE[proven_mode])
        assert hello.extensions[PSK_MODES] == WITH_AN_EXCHANGE
        assert EARLY_DATA not in hello.extensions
        assert has_resumed(tap, leg) == hello.has_ticket() == (leg > probe)
    tickets = [offered(tap, leg).extensions[PRE_SHARED_KEY] for leg in legs[1:]]
    assert len({ticket[4:36] for ticket in tickets}) == len(tickets)


def test_many_connections_at_once_resume_as_far_as_there_are_tickets(
    gateway: Gateway, apps: Applications, tap: Tap, proven_mode: str
) -> None:
    server = apps.listen()
    many = {"max_connections": 100}
    pair = gateway.pair(proven_mode, [server.getsockname()], via=tap, prod=many, cons=many)
    probe = len(tap.legs) - 1
    for _ in range(2):
        consumers = [apps.connect(pair.cons) for _ in range(100)]
        producers = [apps.accept(server) for _ in range(100)]
        for number, consumer in enumerate(consumers):
            consumer.sendall(number.to_bytes(4, "big"))
        arrived = {int.from_bytes(receive_exactly(producer, 4), "big") for producer in producers}
        assert arrived == set(range(100))
        apps.forget(*consumers, *producers)
        pair.wait_idle()
    legs = range(probe, len(tap.legs))
    assert len(legs) == 201
    assert all(has_resumed(tap, leg) == offered(tap, leg).has_ticket() for leg in legs)
    assert sum(has_resumed(tap, leg) for leg in legs[101:]) >= 64


def test_a_ticket_is_worth_nothing_a_second_time_nor_at_another_stream(
    gateway: Gateway, apps: Applications, tap: Tap, proven_mode: str
) -> None:
    server, pair = resuming(gateway, apps, tap, proven_mode)
    other = gateway.pair(proven_mode, [server.getsockname()])
    for relay in (pair.prod, other.prod):
        again = apps.dial(relay.address())
        again.sendall(tap.to_prod[-1][: 5 + int.from_bytes(tap.to_prod[-1][3:5], "big")])
        header = receive_exactly(again, 5)
        answer = header + receive_exactly(again, int.from_bytes(header[3:], "big"))
        assert not Hello.read(SERVER_HELLO, answer).has_ticket()
        apps.forget(again)


def test_no_ticket_is_shown_to_a_relay_with_another_key(
    gateway: Gateway, apps: Applications, tap: Tap, proven_mode: str
) -> None:
    server, pair = resuming(gateway, apps, tap, proven_mode)
    other = gateway.start(gateway.config("PROD", proven_mode, targets=[join(server.getsockname())]))
    gateway.introduce(other, pair.cons)
    first = len(tap.legs)
    address = join(tap(other.address()))
    pair.cons.update(peers=[gateway.peer_of(other, [{"index": 0, "address": address}])])
    eventually(lambda: pair.cons.status()["last_probe"]["address"] == address)
    assert pair.cons.status()["last_probe"]["result"] == "ok"
    assert not offered(tap, first).has_ticket()
    carry(apps, server, pair.cons)
    assert has_resumed(tap, -1)


def begun_with_a_spent_ticket(
    gateway: Gateway, apps: Applications, tap: Tap, mode: str
) -> tuple[socket.socket, Pair, int]:
    """An application, a stream to it of which one connection is over, and the first leg of that one."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], via=tap)
    leg = len(tap.legs)

    def spend(first: bytes) -> None:
        if first[5] == CLIENT_HELLO and Hello.read(CLIENT_HELLO, first).has_ticket():
            spender = apps.dial(pair.prod.address())
            spender.sendall(first)
            receive_exactly(spender, 5)
            apps.forget(spender)

    tap.begins = spend
    carry(apps, server, pair.cons)
    tap.begins = None
    pair.wait_closed(1)
    assert offered(tap, leg).has_ticket()
    assert not has_resumed(tap, leg)
    return server, pair, leg


def test_who_finds_its_ticket_forgotten_dials_anew_before_it_says_a_word(
    gateway: Gateway, apps: Applications, tap: Tap
) -> None:
    """Without the ticket that handshake has X25519 alone, which is not what mode tls promises."""
    server, pair, leg = begun_with_a_spent_ticket(gateway, apps, tap, "tls")
    # Its hello and nothing else.
    assert len(tap.to_prod[leg]) == 5 + int.from_bytes(tap.to_prod[leg][3:5], "big")
    assert offered(tap, leg + 1).groups() == WHOLE["tls"]
    assert not offered(tap, leg + 1).has_ticket()
    assert len(tap.legs) == leg + 2
    carry(apps, server, pair.cons)
    assert has_resumed(tap, -1)


def test_in_mode_auth_who_finds_its_ticket_forgotten_proves_its_key_on_the_same_connection(
    gateway: Gateway, apps: Applications, tap: Tap
) -> None:
    server, pair, leg = begun_with_a_spent_ticket(gateway, apps, tap, "auth")
    carry(apps, server, pair.cons)
    pair.wait_closed(2)
    assert len(tap.legs) == leg + 2
    assert has_resumed(tap, -1)
    assert pair.prod.events("refused") == []


def test_who_dials_anew_has_hung_up_before(gateway: Gateway, apps: Applications) -> None:
    """It holds one place in front of PROD, not two: there may be no other one."""
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()], cons={"connect_timeout_s": 120})
    front = apps.listen(backlog=0)
    address = join(front.getsockname())
    pair.cons.update(peers=[gateway.peer_of(pair.prod, [{"index": 0, "address": address}])])
    near = apps.accept(front)
    hello = near.recv(1 << 16)
    assert Hello.read(CLIENT_HELLO, hello).has_ticket()
    for _ in range(2):  # the first has spent it
        far = apps.dial(pair.prod.address())
        far.sendall(hello)
        flight = far.recv(1 << 16)
    assert not Hello.read(SERVER_HELLO, flight).has_ticket()
    apps.dial(front.getsockname())  # now the kernel lets nobody in
    near.sendall(flight)
    assert receive_until_broken(near) == (b"", "ConnectionResetError")


def test_a_peer_that_is_revoked_in_the_middle_of_its_handshake_does_not_come_in(
    gateway: Gateway, apps: Applications, tap: Tap, proven_mode: str
) -> None:
    """PROD has taken the ticket already; nothing that the peer says after that is heard."""
    server = apps.listen()
    pair = gateway.pair(proven_mode, [server.getsockname()], via=tap)
    carry(apps, server, pair.cons)
    pair.wait_closed(1)

    def revoke(first: bytes) -> None:
        if first[5] == SERVER_HELLO and Hello.read(SERVER_HELLO, first).has_ticket():
            pair.prod.update(peers=[{"public_key": pair.prod.public_key, "source_addresses": ["127.0.0.1"]}])

    tap.begins = revoke
    assert apps.knock(pair.cons.address()) == (b"", "ConnectionResetError")
    assert has_resumed(tap, -1)
    eventually(lambda: [close["reason"] for close in pair.cons.events("close")] == ["closed", "denied"])
    assert nobody_waits(server)
    # The ticket that it was given with that answer is worth nothing either.
    leg = len(tap.legs)
    assert apps.knock(pair.cons.address()) == (b"", "ConnectionResetError")
    assert offered(tap, leg).has_ticket()
    assert not has_resumed(tap, leg)
    assert nobody_waits(server)
