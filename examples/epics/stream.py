"""EPICS PV Access images from a detector at one facility to a viewer at another.

On a node of the detector's facility; where both facilities can be asked; on a node of the viewer's facility:

    python examples/epics/detector.py
    python examples/epics/stream.py local:aps local:alcf --target 10.11.0.1:5075 --consumers 10.22.0.0/24
    EPICS_PVA_AUTO_ADDR_LIST=NO EPICS_PVA_NAME_SERVERS=10.22.0.3:5075 python examples/epics/viewer.py

The stream stays until it is interrupted; then it says what it has carried. `pvget`, `pvmonitor` and every other client
finds the channel in the same way as the viewer.

A client of PV Access first searches: it asks who has the channel, is told an address, and connects there. Relays carry
TCP, so the search must go over TCP too: `EPICS_PVA_NAME_SERVERS` names the listener at the client's own site, and the
server must answer there. That of pvapy does; others have not been tried. The trap is in the answer: a server that
listens on every address, as is the default, says "the address that you have asked, port 5075", its own port, whatever
the port of the listener was. So

* the listener must have the server's port. Either the consumer's gateway has `port_range = "5075"`, or the server is
  started with the port of the listener (`EPICS_PVAS_SERVER_PORT`). This program refuses a listener with another port;
* `EPICS_PVAS_INTF_ADDR_LIST` must not name an address of the server: its clients would be sent there, past the relays;
* with everything on one machine, both can go wrong unseen: clients are sent past the relays, and get there. Look at the
  bytes that the relays have carried.

Such a server closes a connection on which nobody says anything for 6 seconds. That by which READY was proven may end in
this way; the relay makes a new one when a client comes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from types import FrameType
from typing import NoReturn

from scistream_flows import BadRequest, open_stream
from scistream_flows.errors import ScistreamError
from scistream_flows.models import split_address


def run(options: argparse.Namespace) -> dict[str, object]:
    """Hold the stream open until interrupted; what it has carried."""
    with open_stream(
        options.producer,
        options.consumer,
        targets=[options.target],
        consumers=options.consumers,
        mode=options.mode,
        until="released",  # clients come and go, and a monitor is never at its end
    ) as stream:
        (listener,) = stream.listeners
        port = split_address(options.target)[1]
        if split_address(listener)[1] != port:
            raise BadRequest(
                f"the listener is at {listener}, but the server will send its clients to port {port}",
                which=listener,
                hint=f'Give the gateway of {options.consumer} port_range = "{port}", or the server another port',
            )
        print(json.dumps({"listener": listener}), flush=True)
        print(f"EPICS_PVA_AUTO_ADDR_LIST=NO EPICS_PVA_NAME_SERVERS={listener}", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            stream.wait()
        end = stream.release()
    return {
        "producer_relay_bytes": end.prod.bytes.to_consumer,
        "consumer_relay_bytes": end.cons.bytes.to_consumer,
        "end": end.reasons,
    }


def interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """Leave through every `finally`; a second signal must not break the tidying."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Parse the options, run, and say what came of it."""
    parser = argparse.ArgumentParser(description="Images over PV Access through a stream")
    parser.add_argument("producer", help="facility of the detector, such as local:aps")
    parser.add_argument("consumer", help="facility of the viewer")
    parser.add_argument("--target", required=True, help="host:port of the PV Access server")
    parser.add_argument("--consumers", action="append", default=[], help="network the viewer comes from")
    parser.add_argument("--mode", choices=["tls", "auth", "none"], default="tls")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    try:
        print(json.dumps(run(options)))
    except ScistreamError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before it was open; what there was is released
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
