"""Chains of relays under test: ours, and each peer in the configurations that its users have."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import psutil
from network.sites import Site
from relay.gateway import MODES, Gateway, Relay, eventually, find_binary, join

from . import processes
from .places import Address, Place, Spot

NOBODY: Final = 65534
START_S: Final = 10.0
END_S: Final = 2.0
STREAM_MODULE: Final = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


@dataclass(frozen=True)
class Chain:
    """Relays that are ready: where the consumer connects, what it says first, and what runs."""

    address: Address
    pids: tuple[int, ...] = ()
    preamble: str = ""

    def family(self) -> list[int]:
        """The relays' processes, with all below them."""
        return processes.family(self.pids)


@dataclass(frozen=True)
class Wish:
    """What a chain has to be.

    Attributes:
        connections: The most at the same time.
        rate_mbits_per_s: Kept by the relays; ours only.
        user: Whose processes the relays are; ours only.
    """

    place: Place
    target: Address
    hops: int = 2
    connections: int = 256
    rate_mbits_per_s: int = 0
    user: int | None = None


Start: TypeAlias = Callable[[Wish], AbstractContextManager[Chain]]


@dataclass(frozen=True)
class Kind:
    """A relay in one configuration.

    Attributes:
        needs: The program; empty for what is always there.
        hops: The lengths of chains that it can make.
        quick: Whether the quick mode has it.
        idle: Whether it is asked to hold thousands of connections.
    """

    name: str
    start: Start
    needs: str = ""
    hops: tuple[int, ...] = (1, 2)
    quick: bool = True
    idle: bool = True

    def missing(self) -> str:
        """The program that is not installed, or nothing."""
        if self.needs == "nginx" and not STREAM_MODULE.exists():
            return "libnginx-mod-stream"
        return "" if not self.needs or find_program(self.needs) else self.needs


def find_program(name: str) -> str | None:
    """A program, also where only the administrator's PATH leads."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


# --- none, and ours --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def direct(wish: Wish) -> Iterator[Chain]:
    """No relay."""
    yield Chain(wish.target)


def ours(mode: str) -> Start:
    """A PROD and a CONS relay; as one hop the PROD relay alone, to which the consumer speaks as CONS does."""

    @contextlib.contextmanager
    def start(wish: Wish) -> Iterator[Chain]:
        binary = find_binary()
        with contextlib.ExitStack() as stack:
            near, far = (_gateway(binary, spot, wish.user, stack) for spot in wish.place.gateways)
            common = {
                "max_connections": wish.connections,
                "rate_mbits_per_s": wish.rate_mbits_per_s,
                "lease_s": 3600,
                "probe": "path",
                "sources": list(wish.place.sources),
            }
            prod = _start(far, "PROD", mode, wish, 1, targets=[join(wish.target)], **common)
            if wish.hops == 1:
                stranger = _start(near, "PROD", mode, wish, 0, **common).public_key
                _admit(prod, stranger, wish.place)
                near.relays[-1].stop()
                yield Chain(prod.address(), (prod.pid,), preamble_of(prod.id).hex())
                return
            cons = _start(near, "CONS", mode, wish, 0, peers=[near.peer_of(prod)], **common)
            _admit(prod, cons.public_key, wish.place)
            eventually(lambda: cons.status()["state"] == "READY")
            yield Chain(cons.address(), (cons.pid, prod.pid))

    return start


def _gateway(binary: Path, spot: Spot, user: int | None, stack: contextlib.ExitStack) -> Gateway:
    gateway = Site(binary, host=spot.host) if spot.host else Gateway(binary, user=user)
    if user is not None:
        os.chown(gateway.directory, user, user)
    stack.callback(gateway.close)
    return gateway


def _start(gateway: Gateway, role: str, mode: str, wish: Wish, at: int, **settings: object) -> Relay:
    listen = {"address": wish.place.gateways[at].ip}
    return gateway.start(gateway.config(role, mode, listen=listen, **settings))


def _admit(prod: Relay, public_key: str, place: Place) -> None:
    prod.update(peers=[{"public_key": public_key, "source_addresses": list(place.sources)}])


def preamble_of(relay_id: str) -> bytes:
    """What CONS says first, in mode none."""
    head = struct.pack(">4sBBBB", b"S2DS", 1, 1, 3, 0)
    return (head + bytes.fromhex(relay_id)).ljust(64, b"\0")


# --- peers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """One relay of a chain as its configuration has it; the first is the consumer's."""

    listen: Address
    onward: Address
    folder: Path
    first: bool


def peer(configure: Callable[[Link], Sequence[str]]) -> Start:
    """Programs in the foreground, one for each hop; `configure` writes files and answers the command."""

    @contextlib.contextmanager
    def start(wish: Wish) -> Iterator[Chain]:
        spots = wish.place.gateways[-wish.hops :]
        addresses = [spot.free_address() for spot in spots]
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            pids = []
            onward = [*addresses[1:], wish.target]
            for number, (spot, listen, to) in enumerate(zip(spots, addresses, onward, strict=True)):
                (folder / str(number)).mkdir()
                argv = configure(Link(listen, to, folder / str(number), number == 0))
                pids.append(stack.enter_context(_running(spot, argv, folder / str(number), listen)).pid)
            yield Chain(addresses[0], tuple(pids))

    return start


@contextlib.contextmanager
def _running(
    spot: Spot, argv: Sequence[str], folder: Path, listen: Address
) -> Iterator[subprocess.Popen[bytes]]:
    """A program from the moment it listens; after the block it is gone, with all that it started."""
    program = find_program(argv[0])
    assert program, argv[0]
    if spot.listens(listen):  # then whoever it is would be measured in its place
        raise RuntimeError(f"{argv[0]}: somebody listens at {join(listen)} already")
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            spot.command(program, *argv[1:]),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=folder,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_S
        while not spot.listens(listen):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{argv[0]} does not listen: {(folder / 'said').read_text()[-400:]}")
            time.sleep(0.02)
        yield process
    finally:
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()  # a master takes its workers along, and leaves no zombie to init
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait(START_S)


def haproxy(*, world: str = "", defaults: str = "", tls: bool = False) -> Start:
    """With `tls`, TLS between two of them, a pinned certificate at the far end."""

    def configure(link: Link) -> Sequence[str]:
        file = link.folder / "haproxy.cfg"
        bind = server = ""
        if tls:
            certificate, key = certified(link.folder.parent)
            both = link.folder / "both"
            both.write_text(certificate.read_text() + key.read_text())
            if link.first:
                server = f" ssl verify required ca-file {certificate} ssl-min-ver TLSv1.3"
            else:
                bind = f" ssl crt {both} ssl-min-ver TLSv1.3"
        file.write_text(
            f"global\n{world}\ndefaults\n  mode tcp\n  timeout connect 10s\n  timeout client 1h\n"
            f"  timeout server 1h\n{defaults}\nlisten stream\n"
            f"  bind {join(link.listen)}{bind}\n  server next {join(link.onward)}{server}\n"
        )
        return ["haproxy", "-db", "-f", str(file)]

    return peer(configure)


def nginx(settings: str = "") -> Start:
    def configure(link: Link) -> Sequence[str]:
        file = link.folder / "nginx.conf"
        file.write_text(
            f"load_module {STREAM_MODULE};\nuser root;\ndaemon off;\npid {link.folder}/pid;\n"
            "error_log stderr crit;\nevents { worker_connections 24000; }\n"
            f"stream {{ {settings} server {{ listen {join(link.listen)} backlog=4096; "
            f"proxy_pass {join(link.onward)}; proxy_timeout 1h; proxy_half_close on; }} }}\n"
        )
        return ["nginx", "-e", "stderr", "-p", str(link.folder), "-c", str(file)]

    return peer(configure)


def stunnel(*, null_cipher: bool) -> Start:
    """TLS between two of them, a pinned certificate at the far end; or as SciStream has it, without encryption."""

    def configure(link: Link) -> Sequence[str]:
        common = (
            "foreground = yes\ndebug = 3\npid =\nsocket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n"
            f"[stream]\nclient = {'yes' if link.first else 'no'}\n"
            f"accept = {join(link.listen)}\nconnect = {join(link.onward)}\n"
        )
        secrets = link.folder.parent
        if null_cipher:
            (secrets / "psk").write_text(f"stream:{'5c' * 32}\n")
            (secrets / "psk").chmod(0o600)
            more = (
                f"PSKsecrets = {secrets}/psk\nciphers = eNULL\nsecurityLevel = 0\nsslVersionMax = TLSv1.2\n"
            )
        else:
            certificate, key = certified(secrets)
            more = "sslVersionMin = TLSv1.3\n" + (
                f"CAfile = {certificate}\nverifyPeer = yes\n"
                if link.first
                else f"cert = {certificate}\nkey = {key}\n"
            )
        file = link.folder / "stunnel.conf"
        file.write_text(common + more)
        return ["stunnel", str(file)]

    return peer(configure)


def certified(folder: Path) -> tuple[Path, Path]:
    """The certificate of a chain that has one for itself, and its key."""
    certificate, key = folder / "cert", folder / "key"
    if certificate.exists():
        return certificate, key
    argv = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=bench"
    subprocess.run(
        [*argv.split(), "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return certificate, key


def socat(*options: str) -> Start:
    def configure(link: Link) -> Sequence[str]:
        (host, port), onward = link.listen, join(link.onward)
        listen = f"TCP-LISTEN:{port},bind={host},fork,reuseaddr,backlog=1024,nodelay"
        return ["socat", *options, listen, f"TCP:{onward},nodelay"]

    return peer(configure)


SPLICE: Final = "  option splice-request\n  option splice-response\n"
KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("direct", direct, hops=(0,)),
        *(Kind(mode, ours(mode), hops=(1, 2) if mode == "none" else (2,)) for mode in MODES),
        Kind(
            "haproxy-expert",
            haproxy(world="  tune.pipesize 1048576", defaults=SPLICE),
            "haproxy",
        ),
        Kind("haproxy-scistream", haproxy(world="  tune.bufsize 100000"), "haproxy"),
        Kind("haproxy", haproxy(), "haproxy"),
        Kind("haproxy-tls", haproxy(tls=True), "haproxy", hops=(2,)),
        Kind("nginx", nginx(), "nginx"),
        Kind("nginx-256k", nginx("proxy_buffer_size 256k;"), "nginx", quick=False, idle=False),
        Kind("stunnel", stunnel(null_cipher=False), "stunnel", hops=(2,), idle=False),
        Kind("stunnel-null", stunnel(null_cipher=True), "stunnel", hops=(2,), idle=False),
        Kind("socat", socat(), "socat", idle=False),
        Kind("socat-256k", socat("-b", "262144"), "socat", quick=False, idle=False),
    )
}
OURS: Final = MODES
