"""The service of a facility, started as an administrator would start it: the command `s2cs`."""

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from application import ApplicationError

S2CS = Path(sys.executable).with_name("s2cs")  # installed beside this Python
PATIENCE_S = 30


@contextlib.contextmanager
def service(facility: str) -> Iterator[str]:
    """Serve a facility on a port of the kernel's choice; answers the URL. It does not outlive the block.

    Raises:
        ApplicationError: When it does not serve in time.
    """
    with subprocess.Popen(
        [S2CS, "--facility", facility, "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches the demo only, which then stops the others in order
    ) as process:
        try:
            yield _url(process)
        finally:
            process.terminate()
            try:
                process.communicate(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _url(process: "subprocess.Popen[bytes]") -> str:
    """Where it says that it serves."""
    assert process.stderr is not None
    said = b""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        if select.select([process.stderr], [], [], 0.1)[0]:
            piece = os.read(process.stderr.fileno(), 4096)
            said += piece
            served = re.search(rb"serving at (http\S+)", said)
            if served:
                return served[1].decode()
            if not piece:
                break
    words = said.decode(errors="replace").strip().splitlines()
    raise ApplicationError(f"s2cs does not serve; its last words: {words[-1] if words else 'none'}")
