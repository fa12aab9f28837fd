"""One service per facility: its actions for Globus Flows, the same verbs as plain REST, and the server around them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scistream_flows import __version__
from scistream_flows.config import FacilityConfig
from scistream_flows.doorway import serve_socket
from scistream_flows.errors import BadRequest, ConfigError, MissingExtra
from scistream_flows.models import ip_of, join_address
from scistream_flows.s2cs import S2CS

from .auth import AuthConfig, Authenticator, authenticator, loopback_hosts
from .lifecycle import Lifecycle
from .operations import OPERATIONS
from .records import Records

if TYPE_CHECKING:
    from fastapi import FastAPI

THREADS: Final = 80
"""Requests at a time in one process; each waits at most `lifecycle.ANSWER_WITHIN_S` for an action."""

_EXTRA = "pip install 'scistream-flows[server]'"


def build(
    service: S2CS,
    *,
    auth: Authenticator,
    records: Records,
    base_url: str,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The web application of a facility. When the server shuts down, it closes what it was given.

    Args:
        service: The facility.
        auth: Proves who calls.
        records: What is known of the actions.
        base_url: Where it is reached, such as `https://gateway.example.org:8443`.
        hosts: What the header `Host` may say; None: anything.

    Raises:
        MissingExtra: When FastAPI is not installed.
    """
    try:
        from anyio import to_thread
        from fastapi import FastAPI
    except ImportError:
        raise MissingExtra("fastapi is not installed", which="fastapi", hint=_EXTRA) from None
    from . import metrics, page, provider, rest
    from .admission import Admission
    from .answers import Doorkeeper, answer_errors

    lifecycle = Lifecycle(service, auth=auth, records=records)
    admission = Admission(service, auth=auth)
    figures = metrics.Metrics(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield
        await to_thread.run_sync(figures.close)
        await to_thread.run_sync(lifecycle.close)

    app = FastAPI(
        title=f"SciStream facility {service.config.name}",
        version=__version__,
        summary="Memory-to-memory streams between facilities",
        servers=[{"url": base_url}],
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    answer_errors(app)
    app.add_middleware(Doorkeeper, hosts=hosts, note=figures.note)
    for operation in OPERATIONS:
        app.include_router(
            provider.routes(operation, lifecycle=lifecycle, admission=admission, facility=service.config)
        )
    app.include_router(rest.routes(service, admission=admission, base_url=base_url))
    app.include_router(metrics.routes(figures, service=service, admission=admission))
    app.include_router(page.routes())

    @app.get("/health", tags=["health"], operation_id="health")
    async def health() -> dict[str, str]:
        """Whether the service answers at all."""
        return {"status": "ok"}

    return app


def _end_with_the_parent() -> None:
    """A worker whose parent was killed ends too, rather than keep the port from the next service."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="parent", daemon=True).start()


@dataclass(frozen=True, kw_only=True)
class _Application:
    """Builds the application in the process that serves it: what it opens does not survive a fork."""

    config: FacilityConfig
    base_url: str
    hosts: tuple[str, ...] | None
    built: Event | threading.Event

    def __call__(self) -> FastAPI:
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # where it serves, we say ourselves
        from .answers import FewWarnings

        logging.getLogger("uvicorn.error").addFilter(FewWarnings())
        _end_with_the_parent()
        app = build(
            S2CS(self.config),
            auth=authenticator(self.config),
            records=Records(self.config.state_dir),
            base_url=self.base_url,
            hosts=self.hosts,
        )
        self.built.set()
        return app


def serve(
    config: FacilityConfig,
    *,
    listener_ip: str = "127.0.0.1",
    port: int = 0,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    workers: int = 1,
) -> None:
    """Serve a facility until SIGTERM or SIGINT. Its relays live on.

    When it serves, it says on stderr at which URL. Without a Globus client in the configuration it is in development
    mode: loopback only, and one token in a file of the state directory.

    Args:
        config: The facility.
        listener_ip: The address to bind, exactly.
        port: The port; 0 lets the kernel choose.
        certificate: The certificate chain, PEM; without it there is no TLS, and only loopback is served.
        key: Its private key, PEM.
        workers: Processes.

    Raises:
        BadRequest: When the address, the certificate and the mode do not go together.
        ConfigError: When the configuration, the certificate or a secret cannot be used.
        MissingExtra: When the extra `server` is not installed.
    """
    try:
        import fastapi  # noqa: F401 - first asked for in the midst of serving, where it is no good answer any more
        import uvicorn
        from uvicorn.supervisors import Multiprocess
    except ImportError as missing:
        raise MissingExtra(f"{missing.name} is not installed", which=str(missing.name), hint=_EXTRA) from None
    development = AuthConfig.of(config).development
    address = _admit_listener(listener_ip, development=development, encrypted=certificate is not None)
    _check_certificate(certificate, key)
    _check_facility(config)
    with _listen(address, port) as listening, serve_socket(config) as path:
        port = listening.getsockname()[1]
        base_url = f"{'https' if certificate else 'http'}://{join_address(address, port)}"
        application = _Application(
            config=config,
            base_url=base_url,
            hosts=tuple(sorted(loopback_hosts(port))) if development else None,
            built=multiprocessing.get_context("spawn").Event() if workers > 1 else threading.Event(),
        )
        settings: dict[str, Any] = {
            "factory": True,
            "workers": workers,
            "log_config": None,
            "access_log": False,
            "http": "scistream_flows.actions.answers:PromptHTTP",
            "ws": "none",
            "server_header": False,
            "proxy_headers": False,
            "ssl_certfile": str(certificate) if certificate else None,
            "ssl_keyfile": str(key) if key else None,
            "timeout_graceful_shutdown": 10,
            "limit_concurrency": 4 * THREADS,
            "h11_max_incomplete_event_size": 64 * 1024,
        }
        said = f"facility {config.name}: serving at {base_url}" + (
            f" (development: loopback only, the token is in {config.state_dir / 'token'})"
            if development
            else ""
        )
        if path is not None:
            said += f" and at {path}"
        said += f"\nServer started on {join_address(address, port)}"  # as scripts for SciStream wait for it
        server = uvicorn.Config(application, **settings)
        threading.Thread(target=_announce, args=(said, application.built), daemon=True).start()
        with _ended_by_a_signal():
            if workers > 1:
                Multiprocess(server, sockets=[listening]).run()
            else:
                uvicorn.Server(server).run(sockets=[listening])


def _announce(said: str, built: Event | threading.Event) -> None:
    """Say it when the first process is about to serve; the socket listens already."""
    built.wait()
    # in one piece: print would let a line of the log in before the end of this one
    sys.stderr.write(f"{said}\n")
    sys.stderr.flush()


def _admit_listener(listener_ip: str, *, development: bool, encrypted: bool) -> str:
    """The address to bind; refused where a token could be read on the way, or anybody could come."""
    address = ip_of(listener_ip)
    if address is None:
        raise BadRequest(f"{listener_ip!r} is not a numeric IP address", which="listener_ip")
    if not address.is_loopback and development:
        raise BadRequest(
            f"without a Globus client only loopback is served, not {listener_ip}",
            which="listener_ip",
            hint="Add the table [globus] to the configuration, or use 127.0.0.1",
        )
    if not address.is_loopback and not encrypted:
        raise BadRequest(
            f"{listener_ip} is not served without a certificate: tokens would be readable on the way",
            which="listener_ip",
            hint="Give certificate and key, or bind 127.0.0.1 behind a server that has them",
        )
    return str(address)


def _check_certificate(certificate: str | Path | None, key: str | Path | None) -> None:
    if certificate is None:
        if key is not None:
            raise BadRequest("a key without a certificate", which="key", hint="Give both, or none")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ssl.SSLError) as wrong:
        raise ConfigError(
            f"the certificate {certificate} cannot be used: {wrong}",
            which=str(certificate),
            hint="Give a PEM chain and its key, without a passphrase",
            file=str(certificate),
        ) from None


def _check_facility(config: FacilityConfig) -> None:
    """Open everything once, so that what is wrong is said before the first process starts."""
    with S2CS(config):
        authenticator(config).close()
        Records(config.state_dir).close()


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=1024)
    except (OSError, OverflowError) as wrong:
        raise BadRequest(
            f"{join_address(address, port)} cannot be bound: {wrong}",
            which="port",
            hint="Choose another address or port; 0 lets the kernel choose",
        ) from None


@contextlib.contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the server, and are no failure: it sends itself the signal again when it is done."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
