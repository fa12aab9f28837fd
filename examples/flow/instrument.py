"""An instrument: listens, sends its data to the one that connects, and says what it has sent.

It knows nothing of SciStream. Prints one JSON line with `listening`, and one at the end with `bytes` and `sha256`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import sys
import time

BLOCK_BYTES = 65_536


def block(number: int) -> bytes:
    """The data at one place of the stream: no two places are alike."""
    return hashlib.shake_256(number.to_bytes(8, "big")).digest(BLOCK_BYTES)


def main() -> int:
    """Listen and send."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1000, help=f"of {BLOCK_BYTES} bytes each")
    parser.add_argument("--seconds", type=float, default=0, help="for all of them, at least")
    options = parser.parse_args()
    digest = hashlib.sha256()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        print(json.dumps({"listening": "{}:{}".format(*server.getsockname())}), flush=True)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(60)
        try:
            for number in range(options.blocks):
                time.sleep(options.seconds / options.blocks)
                connection.sendall(block(number))
                digest.update(block(number))
        except OSError as wrong:
            print(f"instrument: {wrong}", file=sys.stderr)
            return 1
    print(json.dumps({"bytes": options.blocks * BLOCK_BYTES, "sha256": digest.hexdigest()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
