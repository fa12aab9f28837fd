"""A beamline's data server: pushes the projections of a scan over ZeroMQ. It knows nothing of relays.

Prints its address as one JSON line, then, when the scan is over and the consumer has gone, what it has sent.
"""

import argparse
import hashlib
import json
import time

import zmq

import phantom


def serve(*, projections_per_s: float) -> None:
    """One scan. The pace is the beamline's, or the consumer's where that is slower."""
    digests = []
    sent_bytes = 0
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.SNDTIMEO, 120_000)
        socket.setsockopt(zmq.LINGER, 30_000)
        socket.bind("tcp://127.0.0.1:*")
        address = socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        print(json.dumps({"listening": address}), flush=True)
        for number, angle_deg in enumerate(phantom.angles_deg()):
            projection = phantom.projection(number)
            header = {
                "number": number,
                "of": phantom.ANGLES,
                "angle_deg": angle_deg,
                "open_beam_counts": phantom.OPEN_BEAM_COUNTS,
                "shape": projection.shape,
                "dtype": str(projection.dtype),
            }
            socket.send_json(header, zmq.SNDMORE)
            socket.send(projection.data)
            digests.append(hashlib.sha256(projection.data).hexdigest())
            sent_bytes += projection.nbytes
            time.sleep(1 / projections_per_s)
        # Whoever closes first may cut off what the other has not read yet: let the consumer be the first.
        consumer = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send_json({"end": True})
        consumer.poll(60_000)
        socket.disable_monitor()
    print(json.dumps({"projections": phantom.ANGLES, "bytes": sent_bytes, "sha256": digests}))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve the projections of a scan over ZeroMQ (PUSH).")
    parser.add_argument("--rate", type=float, default=100, help="projections per second, at most")
    serve(projections_per_s=parser.parse_args().rate)


if __name__ == "__main__":
    main()
