"""Facilities at an address of their own: open_stream over HTTP, against services in processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serving

from scistream_flows import connect_facility, open_stream
from scistream_flows.errors import (
    BadRequest,
    ConfigError,
    Conflict,
    FacilityUnreachable,
    NotFound,
    PolicyDenied,
    StreamNotReady,
    Unauthenticated,
)
from scistream_flows.facility import RestFacility
from scistream_flows.models import (
    Hello,
    ListQuery,
    Release,
    Renewal,
    Request,
    StatusQuery,
    Update,
    read,
)
from scistream_flows.rest import base_url
from scistream_flows.tokens import Tokens

Relays = Callable[..., list[int]]
Talk = Callable[[str, bytes], str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def aps(base: Path) -> Iterator[Served]:
    with serving(base, "aps") as served:
        yield served


@pytest.fixture(scope="module")
def alcf(base: Path, certificate: tuple[Path, Path]) -> Iterator[Served]:
    """Over TLS, by two processes."""
    chain, key = map(str, certificate)
    with serving(base, "alcf", certificate=chain, key=key, workers=2) as served:
        yield served


@pytest.fixture(autouse=True)
def of_the_same_user(
    base: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, relays_below: Relays
) -> Iterator[None]:
    """Whoever runs the facilities finds their tokens; their certificate is trusted; no relay is left."""
    monkeypatch.setenv("SCISTREAM_STATE_DIR", str(base))
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(base / "none"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    yield
    assert relays_below(base, patience_s=5) == []


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def authority(url: str) -> str:
    return url.partition("://")[2]


# --- streams


@pytest.mark.parametrize("producer", ["url", "authority", "local"])
def test_a_stream_between_services(
    aps: Served, alcf: Served, application: Any, talk: Talk, producer: str
) -> None:
    address = {"url": aps.url, "authority": authority(aps.url), "local": "local:aps"}[producer]
    assert alcf.url.startswith("https://")
    with open_stream(address, alcf.url, targets=[application.address], linger_s=1) as stream:
        assert talk(stream.listeners[0], b"to the producer") == sha(application.payload)
        end = stream.wait(20).check()
    assert end.reasons == {"PROD": "finished", "CONS": "finished"}
    assert end.prod.bytes == end.cons.bytes
    assert end.cons.bytes.to_consumer == len(application.payload)
    assert application.received == [sha(b"to the producer")]


def test_what_a_service_refuses_has_its_type_and_leaves_nothing(aps: Served, alcf: Served) -> None:
    with pytest.raises(PolicyDenied, match=r"does not allow 192\.0\.2\.1:9 in targets"):
        open_stream(aps.url, alcf.url, targets=["192.0.2.1:9"])
    with pytest.raises(StreamNotReady) as wrong:
        open_stream(aps.url, alcf.url, targets=["127.0.0.1:9"], ready_timeout_s=1)
    assert wrong.value.leg == "producer-lan"
    with connect_facility(aps.url) as facility:  # type: ignore[attr-defined]
        assert facility.list().streams == []


def test_every_verb_answers_as_it_does_here(aps: Served) -> None:
    """The same stream through HTTP and in this process: the same documents, as far as they do not tell the time."""
    request = read(
        Request, {"protocol": 1, "uid": "v", "role": "PROD", "targets": ["127.0.0.1:9"], "lease_s": 30}
    )
    with RestFacility(aps.url) as far, connect_facility("local:aps") as here:  # type: ignore[attr-defined]
        try:
            offer = far.request(request)
            assert here.request(request).relays == offer.relays
            with pytest.raises(Conflict):
                far.request(request.model_copy(update={"num_conn": 2}))
            assert far.hello(Hello(uid="v", role="PROD", targets=["127.0.0.1:10"])).relays == offer.relays
            updated = far.update(Update(uid="v", role="PROD", targets=["127.0.0.1:11"], rate_mbits_per_s=0))
            assert updated.relays[0].targets == ["127.0.0.1:11"]
            owner = updated.owner
            seen = far.status(StatusQuery(uid="v", role="PROD", owner=owner))
            assert (seen.uid, seen.state, seen.listeners) == ("v", "LISTENING", updated.listeners)
            assert (far.renew(Renewal(uid="v", role="PROD", lease_s=300)).lease_remaining_s or 0) > 200
            assert (far.renew(Renewal(uid="v", role="PROD")).lease_remaining_s or 0) <= 30
            assert [one.uid for one in far.list().streams] == ["v"]
            with pytest.raises(PolicyDenied, match="may not list the streams of everybody"):
                far.list(ListQuery(all_owners=True))
            end = far.release(Release(uid="v", role="PROD")).end
            assert end is not None
            assert end.reason == "released"
            assert far.list().streams == []
            assert "v" in [one.uid for one in far.list(ListQuery(include_ended=True)).streams]
            assert far.release(Release(uid="never", role="CONS")).end is None
            with pytest.raises(NotFound, match="no stream 'never'"):
                far.status(StatusQuery(uid="never", role="CONS"))
        finally:
            here.release(Release(uid="v", role="PROD"))


def test_a_service_that_is_gone_is_unreachable_in_bounded_time(free_address: str) -> None:
    with (
        RestFacility(free_address, deadline_s=1) as facility,
        pytest.raises(FacilityUnreachable, match=r"has not answered list within 1 s: Connection refused"),
    ):
        facility.list()


# --- tokens


def test_without_a_token_the_words_say_where_to_put_one(aps: Served) -> None:
    with (
        RestFacility(aps.url, authorizer=lambda _: None) as facility,
        pytest.raises(Unauthenticated, match="there is no token for") as wrong,
    ):
        facility.list()
    assert "tokens.toml" in wrong.value.hint
    with (
        RestFacility(aps.url, authorizer=lambda _: "wrong") as facility,
        pytest.raises(Unauthenticated, match="this is not the token"),
    ):
        facility.list()


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "configuration"
    folder.mkdir()
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(folder))
    return folder / "tokens.toml"


def test_a_token_pinned_in_the_users_file_is_sent(
    aps: Served, pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCISTREAM_STATE_DIR", str(pins.parent))  # so that it is not found by itself
    pins.write_text(f'[tokens]\n"{aps.url}" = "{aps.state_dir / "token"}"\n')
    with RestFacility(authority(aps.url)) as facility:
        assert facility.list().facility == "aps"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tokens = 3", r"it has one table, \[tokens\]"),
        ("[pins]", r"it has one table, \[tokens\]"),
        ('[tokens]\n"aps.example.org" = "/token"', "'aps.example.org' = '/token' is no pin"),
        ('[tokens]\n"https://aps.example.org" = "token"', "is no pin"),
        ('[tokens]\n"https://aps.example.org" = 3', "is no pin"),
        ("[tokens", "is not TOML"),
    ],
)
def test_pins_that_are_none_are_named(pins: Path, text: str, words: str) -> None:
    pins.write_text(text)
    with pytest.raises(ConfigError, match=words):
        connect_facility("https://aps.example.org")


def test_pins_that_others_may_write_are_not_trusted(pins: Path) -> None:
    pins.write_text("[tokens]\n")
    pins.chmod(0o666)
    with pytest.raises(ConfigError, match="others may write it"):
        Tokens()


# --- servers that are no facility


class _Answers(http.server.BaseHTTPRequestHandler):
    """Gives the next answer of its list, the last one for ever, and writes down who asked with which token."""

    answers: list[tuple[int, str, dict[str, str]]]
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        status, text, headers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def server(*answers: tuple[int, str, dict[str, str]]) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    asked: list[tuple[str, str | None]] = []
    handler = type("Handler", (_Answers,), {"answers": list(answers), "asked": asked})
    serving_here = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=serving_here.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{serving_here.server_port}", asked
    finally:
        serving_here.shutdown()
        thread.join()
        serving_here.server_close()


LISTING = json.dumps({"protocol": 1, "facility": "aps", "streams": []})
DOWN = (503, "<html>no server is available</html>", {"Retry-After": "0"})


def test_a_proxy_whose_server_is_just_starting_is_asked_again() -> None:
    with (
        server(DOWN, DOWN, (200, LISTING, {})) as (url, asked),
        RestFacility(url, authorizer=lambda _: "the-token") as facility,
    ):
        assert facility.list().facility == "aps"
    assert asked == 3 * [("/streams", "Bearer the-token")]


def test_a_proxy_whose_server_never_comes_is_not_asked_for_ever() -> None:
    with (
        server(DOWN) as (url, _),
        RestFacility(url, authorizer=lambda _: "the-token", deadline_s=1) as facility,
        pytest.raises(FacilityUnreachable, match="HTTP 503"),
    ):
        facility.list()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, "<html>", {}), "does not answer as a facility: HTTP 404"),
        ((200, "<html>", {}), "does not answer as a facility: HTTP 200"),
        ((200, "[1]", {}), "does not answer as a facility: HTTP 200"),
        ((200, '{"facility": "aps"}', {}), "does not answer as a facility"),
        ((200, "9" * 5000 + "[" * 5000, {}), "does not answer as a facility"),
        ((200, '{"protocol": 1}', {}), "Listing document is wrong: facility"),
        ((200, '{"protocol": 2, "facility": "aps"}', {}), "protocol 2"),
    ],
    ids=range(7),
)
def test_an_answer_of_something_else_is_no_answer(answer: Any, words: str) -> None:
    with (
        server(answer) as (url, _),
        RestFacility(url, authorizer=lambda _: "the-token") as facility,
        pytest.raises(Exception, match=words) as wrong,
    ):
        facility.list()
    assert type(wrong.value).__module__ == "scistream_flows.errors"


def test_a_redirection_gets_no_token_and_no_request() -> None:
    with server((200, LISTING, {})) as (elsewhere, asked):
        moved = (307, "", {"Location": f"{elsewhere}/streams?token=the-token"})
        with (
            server(moved) as (url, _),
            RestFacility(url, authorizer=lambda _: "the-token") as facility,
            pytest.raises(FacilityUnreachable, match=r"redirects to .*\*\*\*"),
        ):
            facility.list()
    assert asked == []


# --- addresses


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://aps.example.org", "https://aps.example.org"),
        ("https://aps.example.org:8443/scistream/", "https://aps.example.org:8443/scistream"),
        ("aps.example.org:8443", "https://aps.example.org:8443"),
        ("192.0.2.1:8443", "https://192.0.2.1:8443"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("localhost:5000", "http://localhost:5000"),
        ("[::1]:5000", "http://[::1]:5000"),
        ("[2001:db8::1]:5000", "https://[2001:db8::1]:5000"),
    ],
)
def test_an_address_means_https_except_on_loopback(address: str, url: str) -> None:
    assert base_url(address) == url


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://aps.example.org", "plain http is for this machine only"),
        ("http://localhost.example.org", "plain http is for this machine only"),
        ("https://", "not the address"),
        ("https://a@aps.example.org", "not the address"),
        ("https://aps.example.org?x=1", "not the address"),
        ("https://aps.example.org\\@evil", "not the address"),
        ("https://aps.example.org:99999", "not the address"),
        ("https://aps example.org", "not the address"),
        ("aps.example.org:0", "port"),
    ],
)
def test_what_is_no_address_is_refused(address: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        connect_facility(address)
