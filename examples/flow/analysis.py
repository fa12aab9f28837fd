"""An analysis: connects, reads to the end of the data, and says what it got as JSON: `bytes` and `sha256`.

It knows nothing of SciStream.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys


def main(address: str) -> int:
    """Connect to `HOST:PORT` and read."""
    host, _, port = address.rpartition(":")
    digest, count = hashlib.sha256(), 0
    try:
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            while data := connection.recv(1 << 18):
                digest.update(data)
                count += len(data)
    except OSError as wrong:
        print(f"analysis: {wrong}", file=sys.stderr)
        return 1
    print(json.dumps({"bytes": count, "sha256": digest.hexdigest()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
