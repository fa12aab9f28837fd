"""A microscope's data server: pushes frames over ZeroMQ to whoever connects. It knows nothing of relays.

Prints its address as one JSON line, sends frames from the first connection on for as long as it was told, then an end
message, and closes when the consumer has. The pace is the consumer's.
"""

import argparse
import json
import time

import zmq

import slide


def serve(*, seconds: float, at_least_bytes: float) -> None:
    """Push frames until both `seconds` have passed and `at_least_bytes` were sent."""
    frames = slide.fields()
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.SNDHWM, 8)
        socket.setsockopt(zmq.SNDTIMEO, 60_000)
        socket.setsockopt(zmq.LINGER, 30_000)
        socket.bind("tcp://127.0.0.1:*")
        address = socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        print(json.dumps({"listening": address}), flush=True)

        count = sent_bytes = 0
        began_s = None
        while began_s is None or time.monotonic() - began_s < seconds or sent_bytes < at_least_bytes:
            frame = frames[count % len(frames)]
            header = {
                "frame": count,
                "field": count % len(frames),
                "shape": frame.shape,
                "dtype": str(frame.dtype),
            }
            socket.send_json(header, zmq.SNDMORE)
            socket.send(frame.data, copy=False)
            began_s = began_s or time.monotonic()
            count += 1
            sent_bytes += frame.nbytes
        # Whoever closes first may cut off what the other has not read yet: let the consumer be the first.
        consumer = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send_json({"end": True, "frames": count, "bytes": sent_bytes})
        consumer.poll(60_000)
        socket.disable_monitor()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve frames of a microscopy image over ZeroMQ (PUSH).")
    parser.add_argument("--seconds", type=float, default=5, help="send at least for so long")
    parser.add_argument("--bytes", type=float, default=1e9, help="send at least so much")
    options = parser.parse_args()
    serve(seconds=options.seconds, at_least_bytes=options.bytes)


if __name__ == "__main__":
    main()
