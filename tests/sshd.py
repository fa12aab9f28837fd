"""A real sshd on a gateway, and the Unix user whom it lets in: no Python, one directory to write in."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

SSHD: Final = shutil.which("sshd") or "/usr/sbin/sshd"
TOOLS: Final = (
    "sh",
    "cat",
    "mkdir",
    "ls",
    "uname",
    "find",
    "rm",
    "mv",
    "chmod",
    "wc",
    "sleep",
    "true",
    "sha256sum",
)


def why_not() -> str | None:
    """What this machine lacks for an sshd of the tests, in one sentence; None if it lacks nothing."""
    if os.geteuid() != 0:
        return "the tests of SSHGateway start an sshd and make a Unix user: they need root"
    needed = [SSHD, "ssh-keygen", "useradd", "userdel"]
    missing = [one for one in needed if not shutil.which(one)]
    return (
        f"the tests of SSHGateway need {', '.join(missing)} (Debian: openssh-server, passwd)"
        if missing
        else None
    )


class Account:
    """A user that owns one directory, `directory`, and has the programs in `tools` only."""

    def __init__(self) -> None:
        self.name = f"gw{secrets.token_hex(4)}"
        # of root alone, up to the top, as sshd wants it for what decides who comes in
        self.etc = Path(tempfile.mkdtemp(prefix="gateway-", dir="/run"))
        self.base = Path(tempfile.mkdtemp(prefix="gateway-", dir="/var/tmp"))
        self.home, self.tools, self.directory = (self.base / one for one in ("home", "tools", "own"))
        for folder in (self.etc, self.base, self.home, self.tools):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)
        argv = ["useradd", "--no-create-home", "--home-dir", str(self.home), "--shell", "/bin/sh"]
        subprocess.run([*argv, "--password", "*", self.name], check=True, capture_output=True)
        self.uid = pwd.getpwnam(self.name).pw_uid

    def clean(self, *, copies: bool = True) -> None:
        """The directory and the programs as they are at first; the copies of the relay may stay."""
        if copies:
            shutil.rmtree(self.directory, ignore_errors=True)
        for file in self.left():
            file.unlink()
        self.directory.mkdir(exist_ok=True)
        os.chown(self.directory, self.uid, self.uid)
        for tool in self.tools.iterdir():
            tool.unlink()
        for name in TOOLS:
            found = shutil.which(name)
            assert found is not None
            (self.tools / name).symlink_to(found)

    def tool(self, name: str, script: str) -> Path:
        """A program of the gateway that is a script of ours."""
        path = self.tools / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def processes(self, name: str = "") -> list[int]:
        """What runs as this user, with names that begin so; sshd's own processes and zombies left out."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
                if status["Uid"].split()[0] == str(self.uid) and (process / "cmdline").read_bytes():
                    found += [int(process.name)] * (
                        status["Name"] != "sshd" and status["Name"].startswith(name)
                    )
        return found

    def relays(self) -> list[int]:
        return self.processes("s2ds")

    def files(self) -> list[Path]:
        """Every file in its directory, the copied binary left out."""
        return [one for one in self.directory.rglob("*") if one.is_file() or one.is_socket()]

    def copies(self) -> list[Path]:
        return [one for one in self.files() if one.name.startswith("s2ds-")]

    def left(self) -> list[Path]:
        return [one for one in self.files() if one not in self.copies()]

    def lost(self) -> list[Path]:
        """What it has written where it should not, and files that were being written when somebody died."""
        elsewhere = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), self.home)
        return [
            *(one for folder in elsewhere for one in folder.iterdir() if _belongs_to(one, self.uid)),
            *self.directory.glob("*.part"),
        ]

    @contextlib.contextmanager
    def small_disk(self, *options: str) -> Iterator[None]:
        """Its directory is a disk of its own as long as the block runs, of the size that the options of tmpfs say.

        Raises:
            PermissionError: When this process may not mount.
        """
        argv = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"uid={self.uid}", "mode=0755"]), "none"]
        mounted = subprocess.run([*argv, str(self.directory)], capture_output=True, text=True)
        if mounted.returncode != 0:
            raise PermissionError(mounted.stderr.strip())
        try:
            yield
        finally:
            # at once, also when somebody is still in it: then it is gone with him
            subprocess.run(["umount", "--lazy", str(self.directory)], check=True)

    def remove(self) -> None:
        """Ends what runs as this user, and removes it with all that it has."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["userdel", self.name], check=True, capture_output=True)
        shutil.rmtree(self.base)
        shutil.rmtree(self.etc)


def _belongs_to(path: Path, uid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_uid == uid
    return False


def _here(what: Callable[[], Any]) -> Any:
    return what()


class Server:
    """An sshd on a port that the kernel chose, with a host key of its own.

    Args:
        account: Who may come in.
        authorized: The content of authorized_keys.
        lines: For sshd_config, before those that are here.
        address: Where it listens.
        inside: Calls a function on the host on which it runs.
    """

    def __init__(
        self,
        account: Account,
        authorized: str,
        *lines: str,
        address: str = "127.0.0.1",
        inside: Callable[[Callable[[], Any]], Any] = _here,
    ) -> None:
        self.account = account
        self.address = address
        self._inside = inside
        self.folder = Path(tempfile.mkdtemp(dir=account.etc))
        self.folder.chmod(0o755)
        self.key = self.folder / "host_key"
        make_key(self.key)
        (self.folder / "authorized_keys").write_text(authorized)
        self.port: int = inside(self._free_port)
        (self.folder / "sshd_config").write_text(
            "\n".join(
                [
                    *lines,
                    f"ListenAddress {f'[{address}]' if ':' in address else address}:{self.port}",
                    f"HostKey {self.key}",
                    f"AuthorizedKeysFile {self.folder}/authorized_keys",
                    f"AllowUsers {account.name}",
                    f"SetEnv PATH={account.tools}",
                    "PidFile none",
                    "UsePAM no",
                    "PasswordAuthentication no",
                    "KbdInteractiveAuthentication no",
                    "PrintMotd no",
                ]
            )
            + "\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def known_as(self) -> str:
        """Its name in known_hosts."""
        return f"[{self.address}]:{self.port}"

    @property
    def host_key(self) -> str:
        """Its line for known_hosts."""
        return f"{self.known_as} {' '.join(self.key.with_suffix('.pub').read_text().split()[:2])}\n"

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self.folder / "log").read_text()

    def start(self) -> None:
        """Returns when it accepts connections."""
        self._inside(self._start)

    def _start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            argv = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
            self.process = subprocess.Popen(
                argv, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        deadline = time.monotonic() + 10
        while True:
            assert self.process.poll() is None, self.log
            with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), timeout=1):
                return
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _free_port(self) -> int:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        with socket.create_server((self.address, 0), family=family) as server:
            return int(server.getsockname()[1])

    def sessions(self) -> list[int]:
        """The processes that serve one connection each, as root."""
        return _sshd_below(self.process.pid) if self.process else []

    def every_session(self) -> list[int]:
        """The same and those below them, which talk with the network as the user."""
        return [two for one in self.sessions() for two in (one, *_sshd_below(one))]

    def kill(self) -> None:
        """SIGKILL to it and to those of its sessions; commands that run in them live on."""
        if self.process is not None and self.process.poll() is None:
            sessions = self.every_session()
            self.process.kill()
            self.process.wait(10)
            for pid in sessions:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _sshd_below(parent: int) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            name, _, rest = (process / "stat").read_text().partition(") ")
            if (
                name.endswith("(sshd")
                and rest.split()[:2] != ["Z", str(parent)]
                and rest.split()[1] == str(parent)
            ):
                found.append(int(process.name))
    return found


def make_key(path: Path, *, passphrase: str = "") -> None:
    """A key pair, the public half beside it."""
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "test", "-f", str(path)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
