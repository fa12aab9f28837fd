"""Tomography in Parsl: the projections of a scan stream into a task, which reconstructs while they arrive.

    python examples/tomography/workflow.py
    python examples/tomography/workflow.py --producer https://scistream.aps.example.org --consumer local:alcf

beamline.py serves the projections over ZeroMQ and knows nothing of relays. The task `reconstruct`, an app of Parsl that
runs on a worker of HTEX, is told an address and knows nothing of facilities. `streaming` opens the stream before the
task begins and releases it after. Each pass of the interlaced scan is filtered and projected back with scikit-image as
soon as it is there, so a first picture stands long before the scan is over.

Needs the extras `demo` and `parsl`. Leaves tomography.png and result.json in build/tomography.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import TimeoutError as FutureTimeout  # one of its own before Python 3.11
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import parsl
from parsl import python_app
from parsl.dataflow.errors import DependencyError
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider
from skimage.metrics import peak_signal_noise_ratio

import figure
import phantom
from scistream_flows import connect_facility
from scistream_flows.errors import ScistreamError
from scistream_flows.models import Role, Status, StatusQuery
from scistream_flows.parsl import streaming

HERE = Path(__file__).resolve().parent
PATIENCE_S = 150


def reconstruct(output: str, batch: int, stream: list[str] | None = None) -> dict[str, Any]:
    """The task: receives a scan, and writes what it found of the sample into a file (.npz)."""
    import hashlib
    import json
    import os

    import numpy as np
    import zmq
    from skimage.transform import iradon

    assert stream is not None
    digests, lengths, angles_deg = [], [], []
    early = found = np.zeros(())
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.connect(f"tcp://{stream[0]}")
        while not (header := json.loads(socket.recv())).get("end"):
            pixels = socket.recv()
            digests.append(hashlib.sha256(pixels).hexdigest())
            counts = np.frombuffer(pixels, header["dtype"]).reshape(header["shape"])
            lengths.append(-np.log(np.maximum(counts, 1) / header["open_beam_counts"]))
            angles_deg.append(header["angle_deg"])
            if len(lengths) % batch == 0 or len(lengths) == header["of"]:
                first = (len(lengths) - 1) // batch * batch
                share = (len(lengths) - first) / header["of"]
                rows = np.stack(lengths[first:], axis=-1)  # row of the detector, pixel, angle
                found = found + share * np.stack(
                    [iradon(row, theta=angles_deg[first:], filter_name="shepp-logan") for row in rows]
                )
                if first == 0:
                    early = found / share
    in_order = np.stack(lengths, axis=1)[:, np.argsort(angles_deg)]
    np.savez(output, sinograms=in_order, early=early, found=found)
    return {"sha256": digests, "worker_pool": os.getppid()}


def run(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bytes]:
    """One scan through the workflow; what came of it, and the picture."""
    # Parsl's own programs are installed beside this Python
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    uid = f"tomography-{secrets.token_hex(8)}"
    workers = HighThroughputExecutor(
        address="127.0.0.1",
        loopback_address="127.0.0.1",
        max_workers_per_node=1,
        # In a session of its own: Ctrl-C reaches this program only, which then stops the others in order. Parsl waits
        # for ever for an interchange that Ctrl-C has ended.
        interchange_launch_cmd=["setsid", "interchange.py"],
        provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
    )
    config = parsl.Config(run_dir=str(folder / "runs"), executors=[workers], initialize_logging=False)
    beamline = subprocess.Popen(
        [sys.executable, HERE / "beamline.py", f"--rate={options.rate}"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert beamline.stdout is not None
        target = json.loads(beamline.stdout.readline())["listening"]
        app = streaming(
            python_app(reconstruct),
            producer=options.producer,
            consumer=options.consumer,
            targets=[target],
            mode=options.mode,
            uid=uid,
        )
        with parsl.load(config):
            task = app(str(folder / "found.npz"), phantom.ANGLES // phantom.PASSES)
            received = task.result(timeout=PATIENCE_S)
            ends = {role: end_of(getattr(options, name), uid, role) for name, role in SIDES}
        sent = json.loads(beamline.communicate(timeout=PATIENCE_S)[0])
    finally:
        beamline.terminate()
        beamline.communicate()
    with np.load(folder / "found.npz") as saved:
        return judged(received, sent, ends, saved)


SIDES: tuple[tuple[str, Role], ...] = (("producer", "PROD"), ("consumer", "CONS"))


def end_of(facility: str, uid: str, role: Role) -> Status:
    """How a side has ended: it is released when the task is done, which is soon after its result is there."""
    deadline_s = time.monotonic() + 30
    with contextlib.closing(connect_facility(facility)) as connected:
        while not (status := connected.status(StatusQuery(uid=uid, role=role))).ended:
            if time.monotonic() > deadline_s:
                raise ScistreamError(f"{uid} was not released at {facility}", which=uid)
            time.sleep(0.1)
    return status


def judged(
    received: dict[str, Any], sent: dict[str, Any], ends: dict[Role, Status], saved: Any
) -> tuple[dict[str, Any], bytes]:
    """What was found, held against the phantom."""
    expected = [
        hashlib.sha256(phantom.projection(number).data).hexdigest() for number in range(phantom.ANGLES)
    ]
    truth, row = phantom.slices(), phantom.ROWS // 2
    top = truth.max()
    quality = {
        name: float(peak_signal_noise_ratio(truth, saved[name], data_range=top))
        for name in ("early", "found")
    }
    picture = figure.render(
        sinogram=saved["sinograms"][row],
        early=saved["early"][row],
        found=saved["found"][row],
        truth=truth[row],
        words={
            "sinogram": f"{len(received['sha256'])} projections",
            "early": f"PSNR {quality['early']:.1f} dB",
            "found": f"PSNR {quality['found']:.1f} dB",
            "error": f"slice {row + 1} of {phantom.ROWS}",
        },
    )
    result = {
        "projections": len(received["sha256"]),
        "verified": sum(
            len(set(digests)) == 1
            for digests in zip(sent["sha256"], received["sha256"], expected, strict=False)
        ),
        "payload_bytes": sent["bytes"],
        "psnr_db": quality,
        "worker_pool": received["worker_pool"],
        "producer_relay_bytes": ends["PROD"].bytes.to_consumer,
        "consumer_relay_bytes": ends["CONS"].bytes.to_consumer,
        "end": {role: end.reason for role, end in ends.items()},
    }
    return result, picture


def interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """Leave through every `finally`; a second signal must not break the tidying."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Parse the options, run, and say what came of it."""
    parser = argparse.ArgumentParser(description="Projections streamed into a task of Parsl")
    parser.add_argument("--producer", default="local:aps", help="facility of the beamline")
    parser.add_argument("--consumer", default="local:alcf", help="facility of the workers")
    parser.add_argument("--mode", choices=["tls", "auth", "none"], default="tls")
    parser.add_argument("--rate", type=float, default=100, help="projections per second")
    parser.add_argument("--output", type=Path, default=Path("build/tomography"), help="folder of the results")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    with tempfile.TemporaryDirectory(prefix="scistream-tomography-") as folder:
        try:
            result, picture = run(options, Path(folder))
        except (ScistreamError, DependencyError) as wrong:
            print(
                wrong.__cause__ or wrong, file=sys.stderr
            )  # why there was no stream is the cause of Parsl's error
            return 1
        except FutureTimeout:
            print(f"the task has not ended within {PATIENCE_S} s", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "tomography.png").write_bytes(picture)
    (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
