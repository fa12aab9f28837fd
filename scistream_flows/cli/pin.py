"""Keys of relays as words that people hand to each other, when no program does it for them.

`IP:PORT#KEY.RELAY.INDEX` is a listener of PROD with what proves it; `KEY@NETWORK,…` is a peer that PROD admits. Keys
are public: whoever reads a pin gains nothing. Whoever can alter one puts a relay of his own there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from scistream_flows.errors import BadRequest
from scistream_flows.models import Listener, Mode, Offer, OfferedRelay, Peer, read, split_address

_KEY: Final = r"[A-Za-z0-9_-]{43}"
_PIN: Final = re.compile(rf"(?P<key>{_KEY})\.(?P<relay>[0-9a-f]{{32}})(?:\.(?P<index>[0-9]{{1,3}}))?")
_FORM: Final = "A pin is KEY.RELAY.INDEX, as PROD's request has printed it in the line Pins"


class Proof(NamedTuple):
    """What proves one listener of PROD: its relay, the relay's key, and the listener's number."""

    relay_id: str
    public_key: str
    number: int


class Named(NamedTuple):
    """A listener of PROD as its user named it; `proof` where a pin was given."""

    address: str
    proof: Proof | None


def pinned(offer: Offer) -> str:
    """The listeners of an offer with their pins, for `read_places`; one that follows from the last has none."""
    words: list[str] = []
    last: Proof | None = None
    for address, _, proof in _proofs(offer):
        follows = last is not None and proof == last._replace(number=last.number + 1)
        words.append(address if follows else f"{address}#{proof.public_key}.{proof.relay_id}.{proof.number}")
        last = proof
    return ",".join(words)


def read_places(text: str) -> list[Named]:
    """The listeners in `IP:PORT[#PIN][,…]`. One without a pin is the next listener of the relay before it, if any.

    Raises:
        BadRequest: When one is no address, or its pin is none.
    """
    places: list[Named] = []
    last: Proof | None = None
    for word in filter(None, (one.strip() for one in text.split(","))):
        address, separator, pin = word.partition("#")
        proof = _proof(pin) if separator else last._replace(number=last.number + 1) if last else None
        try:
            split_address(address)
        except ValueError as wrong:
            raise BadRequest(str(wrong), which=word, hint="PROD_LSTN is IP:PORT[#PIN],…") from None
        if address not in [one.address for one in places]:
            places.append(Named(address, proof))
            last = proof
    if not places:
        raise BadRequest("PROD_LSTN names no listener", which="PROD_LSTN", hint="It is IP:PORT[#PIN],…")
    return places


def offer_at(places: Sequence[Named], *, uid: str, mode: Mode, known: Offer | None) -> Offer:
    """PROD's offer for listeners at these places, from their pins or from the offer that is known.

    An address that the known offer does not have is taken for the listener at the same position in it, as seen from
    behind a translation of addresses.

    Raises:
        BadRequest: When nothing is known that would prove a listener.
    """
    in_order = [*_proofs(known)] if known else []
    listeners: dict[tuple[str, str], list[Listener]] = {}
    for position, place in enumerate(places):
        at_position = in_order[position][2] if position < len(in_order) else None
        at_address = next(
            (proof for address, also, proof in in_order if place.address in (address, *also)), None
        )
        proof = place.proof or at_address or at_position
        if proof is None:
            raise _nothing_known(place.address, uid)
        key = (proof.relay_id, proof.public_key)
        also = next((also for address, also, _ in in_order if address == place.address), [])
        listeners.setdefault(key, []).append(Listener(index=proof.number, address=place.address, also=also))
    data_servers = {one.relay_id: one.data_server for one in known.relays} if known else {}
    relays = [
        OfferedRelay(
            relay_id=relay_id,
            public_key=public_key,
            gateway="prod",
            listeners=theirs,
            data_server=data_servers.get(relay_id),
        )
        for (relay_id, public_key), theirs in listeners.items()
    ]
    lease_s = known.lease_remaining_s if known else 0
    return Offer(
        uid=uid, role="PROD", mode=known.mode if known else mode, lease_remaining_s=lease_s, relays=relays
    )


def peers_of(offer: Offer) -> list[Peer]:
    """The relays of CONS as the peers that PROD is told of."""
    return [Peer(public_key=one.public_key, source_addresses=one.dial_addresses) for one in offer.relays]


def peer_in_words(peer: Peer) -> str:
    """A peer as `read_peer` takes it."""
    return "@".join(filter(None, (peer.public_key, ",".join(peer.source_addresses))))


def read_peer(text: str) -> Peer:
    """The peer in `KEY[@NETWORK,…]`.

    Raises:
        BadRequest: When it is none.
    """
    key, _, networks = text.partition("@")
    if not re.fullmatch(_KEY, key):
        raise BadRequest(
            f"{text!r} is not the pin of a CONS relay",
            which="peer",
            hint="It is KEY or KEY@NETWORK,…, as CONS's request has printed it in the line Peers",
        )
    networks_list = [one for one in networks.split(",") if one]
    return read(Peer, {"protocol": 1, "public_key": key, "source_addresses": networks_list})


def _proofs(offer: Offer) -> Iterator[tuple[str, list[str], Proof]]:
    """Of each listener its address, its address of the other IP version, and its proof, in the order of the index."""
    found = [(one.index, one, relay) for relay in offer.relays for one in relay.listeners]
    for index, one, relay in sorted(found, key=lambda each: each[0]):
        yield one.address, one.also, Proof(relay.relay_id, relay.public_key, index)


def _proof(pin: str) -> Proof:
    match = _PIN.fullmatch(pin)
    if match is None:
        raise BadRequest(f"{pin!r} is not a pin", which="PROD_LSTN", hint=_FORM)
    return Proof(match["relay"], match["key"], int(match["index"] or 0))


def _nothing_known(address: str, uid: str) -> BadRequest:
    return BadRequest(
        f"no key is known that would prove {address} to be PROD's relay of stream {uid!r}",
        which=address,
        hint="Ask on the machine, and as the user, of PROD's request, which has kept it; or give the listener with its"
        " pin, IP:PORT#PIN, as PROD's request has printed it in the line Pins, and let PROD's user run"
        f" `s2uc update {uid} --peer PIN` with what is printed here",
    )
