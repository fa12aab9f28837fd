"""Where relays run: a gateway puts files and runs commands, and all control of relays goes through that."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from scistream_flows.config import GatewayConfig
from scistream_flows.errors import GatewayUnreachable, RegistryError
from scistream_flows.relay import Outcome, Relays, find_s2ds


class Gateway(Protocol):
    """A node that can run relays."""

    @property
    def config(self) -> GatewayConfig:
        """Its configuration."""
        ...

    @property
    def relays(self) -> Relays:
        """The relays on it."""
        ...

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write a file, whole or not at all."""
        ...

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float) -> Outcome:
        """Run a command and wait for it.

        Raises:
            GatewayUnreachable: When it could not be run or did not end within `timeout_s` seconds.
        """
        ...

    def close(self) -> None:
        """Give back what the connection holds. Relays live on."""
        ...


class LocalGateway:
    """This machine.

    Args:
        config: Its configuration.
        runtime_dir: Where its relays keep sockets and logs; made 0700 by the relay.
    """

    def __init__(self, config: GatewayConfig, *, runtime_dir: Path) -> None:
        self.config = config
        self.runtime_dir = runtime_dir

    @property
    def relays(self) -> Relays:
        """The relays on it; the binary is looked up each time, it may have been installed since."""
        return Relays(
            self.run, binary=find_s2ds(), runtime_dir=str(self.runtime_dir), gateway=self.config.name
        )

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write a file, whole or not at all."""
        part = f"{path}.{os.getpid()}.part"
        try:
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(content)
                Path(part).replace(path)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
        except OSError as wrong:
            raise RegistryError(f"cannot write {path}: {wrong.strerror}", which=path) from wrong

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float) -> Outcome:
        """Run a command and wait for it.

        Raises:
            GatewayUnreachable: When it could not be run or did not end within `timeout_s` seconds.
        """
        try:
            # its own session: Ctrl-C in a terminal must not end a command that cleans up
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as wrong:
            raise GatewayUnreachable(
                f"cannot run {argv[0]} on gateway {self.config.name}: {wrong.strerror}",
                which=self.config.name,
            ) from wrong
        with process:
            try:
                stdout, stderr = process.communicate(stdin, timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise GatewayUnreachable(
                    f"`{Path(argv[0]).name} {argv[1] if len(argv) > 1 else ''}` on gateway {self.config.name}"
                    f" did not end within {timeout_s:g} s",
                    which=self.config.name,
                    hint="Look at the load of the gateway, then try again",
                ) from None
            except BaseException:
                _let_finish(process)
                raise
        return Outcome(process.returncode, stdout, stderr)

    def close(self) -> None:
        """Nothing is held."""


def _let_finish(process: subprocess.Popen[str]) -> None:
    # Interrupted in mid-start: a relay that is half up cannot be stopped yet, one that is up can. It takes moments.
    try:
        process.communicate(timeout=2)
    finally:
        process.kill()


def connect_gateway(config: GatewayConfig, *, state_dir: Path) -> Gateway:
    """The gateway that `config` describes, for a facility whose state is in `state_dir`."""
    return LocalGateway(config, runtime_dir=state_dir / "relays")
