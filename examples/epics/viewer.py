"""Monitors images over PV Access and compares each with the image on disk. It knows nothing of relays.

Where to look for the channel it is told as every program of EPICS is: by its environment. Where broadcasts do not get
through, `EPICS_PVA_NAME_SERVERS=HOST:PORT` makes it search over TCP (`EPICS_PVA_AUTO_ADDR_LIST=NO`: there only).
Prints one JSON line when it has seen enough frames; exit code 3 when one of them was not as the image.
"""

import argparse
import json
import queue
import sys
import time

import pvaccess
from pvapy.utility.adImageUtility import AdImageUtility

import frames


def watch(channel: str, *, count: int, patience_s: float) -> dict[str, object] | None:
    """See so many frames; None when one of them is not there within `patience_s`."""
    specimen = frames.Specimen()
    images: queue.Queue[pvaccess.PvObject] = queue.Queue()
    monitor = pvaccess.Channel(channel)
    monitor.subscribe("viewer", images.put)
    monitor.startMonitor("field()")
    numbers: list[int] = []
    verified = seen_bytes = 0
    began_s = time.monotonic()
    try:
        while len(numbers) < count:
            number, image, *_ = AdImageUtility.reshapeNtNdArray(images.get(timeout=patience_s))
            verified += frames.digest(image) == frames.digest(specimen.frame(number))
            numbers.append(number)
            seen_bytes += image.nbytes
    except queue.Empty:
        return None
    finally:
        monitor.stopMonitor()
        monitor.unsubscribe("viewer")
    return {
        "frames": len(numbers),
        "verified": verified,
        "in_order": numbers == sorted(set(numbers)),
        "missed": numbers[-1] - numbers[0] + 1 - len(numbers),
        "bytes": seen_bytes,
        "elapsed_s": time.monotonic() - began_s,
    }


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Monitor and check images over PV Access.")
    parser.add_argument("--channel", default=frames.CHANNEL)
    parser.add_argument("--frames", type=int, default=100, help="see so many, then end")
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for each")
    options = parser.parse_args()
    seen = watch(options.channel, count=options.frames, patience_s=options.patience)
    if seen is None:
        print(f"no image on {options.channel} within {options.patience:g} s", file=sys.stderr)
        return 1
    print(json.dumps(seen), flush=True)
    return 0 if seen["verified"] == seen["frames"] and seen["in_order"] else 3


if __name__ == "__main__":
    sys.exit(main())
