"""A detector's PV Access server: NTNDArray images on one channel, as areaDetector's plugin NDPluginPva serves them.

It knows nothing of relays. Like a real one it goes on at its own pace whether somebody looks or not, and who is too
slow misses frames. It listens on every address, port 5075 or `$EPICS_PVAS_SERVER_PORT`, until it is terminated.
"""

import argparse
import json
import signal
import time

import pvaccess
from pvapy.utility.adImageUtility import AdImageUtility

import frames


def serve(channel: str, *, frames_per_s: float) -> None:
    """Show one frame after the other."""
    specimen = frames.Specimen()
    server = pvaccess.PvaServer()
    server.addRecord(channel, AdImageUtility.generateNtNdArray2D(0, specimen.frame(0)), None)
    server.start()
    print(json.dumps({"channel": channel}), flush=True)
    number = 0
    try:
        while True:
            time.sleep(1 / frames_per_s)
            number += 1
            server.update(channel, AdImageUtility.generateNtNdArray2D(number, specimen.frame(number)))
    finally:
        server.stop()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve images over PV Access, as areaDetector does.")
    parser.add_argument("--channel", default=frames.CHANNEL)
    parser.add_argument("--rate", type=float, default=20, help="frames per second")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve(options.channel, frames_per_s=options.rate)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
