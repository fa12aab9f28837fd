"""The same microscope, with the facility of the analysis asked over its action provider, as Globus Flows asks it.

    python examples/microscope/with_action_provider.py compute:ENDPOINT_UUID https://scistream.alcf.example.org

The microscope's facility is asked by functions of Globus Compute, the other one by the actions `start`, `status`,
`monitor` and `release` of its service, in one script. `open_stream` does all this by itself where both facilities are
addresses that it knows; here one sees the steps of docs/flows.md, and what travels between the facilities: one offer
each way, with addresses and public keys and no secret.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import sys
import time
import uuid
from typing import Any

from over_compute import analyse, microscope, options_of
from scistream_flows import Facility, ScistreamError, StreamNotReady, WaitTimeout, connect_facility
from scistream_flows.actions.client import Provider, action_of, in_words
from scistream_flows.actions.expressions import StateError
from scistream_flows.models import Offer, Peer, Release, Request, Status, StatusQuery, Update
from scistream_flows.tokens import Tokens
from scistream_flows.web import NoAnswer, new_session

LOOK_EVERY_S = 0.2
LONGEST_S = 120.0


class Actions:
    """The actions of a facility's provider at `url`; each is run to its end."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._session = new_session()
        self._tokens = Tokens()

    def close(self) -> None:
        """Give back the connections."""
        self._session.close()

    def run(self, name: str, **body: Any) -> dict[str, Any]:
        """The details of an action that has succeeded.

        Raises:
            ScistreamError: It has failed, or the provider does not answer as one.
        """
        provider = Provider(
            f"{self._url}/actions/{name}",
            session=self._session,
            authorizer=self._tokens,
            pause=time.sleep,
            scale=1,
        )
        deadline_s = time.monotonic() + LONGEST_S
        try:
            # every try has the same request_id, so that one that is sent again starts nothing anew
            begun = provider.request("POST", "/run", body={"request_id": str(uuid.uuid4()), "body": body})
            action = action_of(begun, provider, "ActionUnableToRun")
            while action["status"] == "ACTIVE" and time.monotonic() < deadline_s:
                time.sleep(LOOK_EVERY_S)
                action = action_of(
                    provider.request("GET", f"/{action['action_id']}/status"), provider, "ActionUnableToRun"
                )
        except StateError as wrong:
            raise ScistreamError(in_words(wrong.cause), which=provider.url) from None
        except NoAnswer as wrong:
            raise ScistreamError(str(wrong), which=provider.url) from None
        if action["status"] != "SUCCEEDED":
            raise ScistreamError(f"{name}: {in_words(action)}", which=provider.url)
        details: dict[str, Any] = action["details"]
        return details


def wait_ready(uid: str, producer: Facility, consumer: Actions) -> None:
    """Return when a probe has passed through both relays to the microscope."""
    deadline_s = time.monotonic() + LONGEST_S
    while not (
        consumer.run("status", stream_id=uid, role="CONS")["state"] in ("READY", "STREAMING")
        and producer.status(StatusQuery(uid=uid, role="PROD")).ready
    ):
        if time.monotonic() > deadline_s:
            raise StreamNotReady(
                f"{uid} is not ready within {LONGEST_S:g} s", which=uid, leg="wan", reason="no-answer"
            )
        time.sleep(LOOK_EVERY_S)


def ended(uid: str, producer: Facility) -> Status:
    """How the microscope's side has ended, which is when the other one has, or a moment later."""
    deadline_s = time.monotonic() + LONGEST_S
    while not (status := producer.status(StatusQuery(uid=uid, role="PROD"))).ended:
        if time.monotonic() > deadline_s:
            raise WaitTimeout(f"{uid} has not ended within {LONGEST_S:g} s", which=uid)
        time.sleep(LOOK_EVERY_S)
    return status


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Stream from the microscope to the analysis; what came of it."""
    uid = f"microscope-{secrets.token_hex(8)}"
    common: dict[str, Any] = {"mode": options.mode, "lease_s": 300, "linger_s": 1}
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(microscope(options))
        producer = stack.enter_context(contextlib.closing(connect_facility(options.producer)))
        consumer = stack.enter_context(contextlib.closing(Actions(options.consumer)))
        # Repeating a release is no error, nor releasing what never was: so on every path, as a flow does.
        stack.callback(producer.release, Release(uid=uid, role="PROD"))
        offered = producer.request(Request(uid=uid, role="PROD", targets=[target], **common))
        stack.callback(consumer.run, "release", stream_id=uid, role="CONS")
        started = consumer.run(
            "start", stream_id=uid, role="CONS", producer=offered.model_dump(mode="json"), **common
        )
        peers = [
            Peer(public_key=relay.public_key, source_addresses=relay.dial_addresses)
            for relay in Offer.model_validate(started["offer"]).relays
        ]
        producer.update(Update(uid=uid, role="PROD", peers=peers))
        wait_ready(uid, producer, consumer)
        print(f"{uid} is open at {started['listeners'][0]}", file=sys.stderr)
        found = analyse(started["listeners"][0], options)
        watched = consumer.run("monitor", stream_id=uid, role="CONS")
        end = ended(uid, producer)
    return found | {
        "producer_relay_bytes": end.bytes.to_consumer,
        "consumer_relay_bytes": watched["bytes_to_consumer"],
        "end": {"PROD": end.reason, "CONS": watched["reason"]},
    }


def main() -> int:
    """Parse the options, run, and say what came of it."""
    options = options_of("A microscope's frames; one facility over Compute, one over its action provider")
    try:
        print(json.dumps(run(options), indent=2))
    except ScistreamError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
