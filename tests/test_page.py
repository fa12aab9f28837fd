"""The operator's page in a real browser, over a real service with real relays behind it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import CHROMIUM, DRIVER, Browser, browsing
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from serving import Caller, Served, serving
from standins.globus import Globus

from scistream_flows.config import load_facility
from scistream_flows.models import split_address
from scistream_flows.s2cs import S2CS, unix_owner

pytestmark = pytest.mark.skipif(
    not CHROMIUM or not DRIVER, reason="needs Debian's packages chromium and chromium-driver"
)

ALICE = "urn:globus:auth:identity:7d1b9b0e-6f3c-4a38-9a53-1f9c6f5f2a10"
HOSTILE = "urn:x:<img/src=x/onerror=window.hit=1>&amp;"
GATEWAYS = """
[[gateway]]
name = "dtn1"
wan_bind = "127.0.0.1"
lan_bind = "127.0.0.1"
capacity_mbits_per_s = 1000
connection_budget = 256

[[gateway]]
name = "dtn2"
wan_bind = "127.0.0.2"
lan_bind = "127.0.0.2"
"""
LIST = "#rows .uid"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    with browsing(folder) as browser:
        yield browser
    assert not (folder / "profile").exists()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("served")
    more = f'administrators = ["{unix_owner()}"]\n'
    with serving(base, "aps", gateway=GATEWAYS, more=more) as served:
        yield served


@pytest.fixture
def facility(served: Served, relays_below: Callable[..., list[int]]) -> Iterator[S2CS]:
    """The same facility in this process, to open streams of anybody; after the test no relay of it runs."""
    base = served.state_dir.parent
    config = load_facility("aps", file=base / "aps.toml", state_dir=served.state_dir, environment={})
    with S2CS(config) as service:
        yield service
        service.evict()
        for gateway in config.gateways:
            service.undrain(gateway.name)
    assert relays_below(base, patience_s=5) == []


@pytest.fixture
def page(browser: Browser, served: Served) -> Browser:
    """The page as somebody meets it for the first time."""
    return fresh(browser, served)


def fresh(browser: Browser, served: Served) -> Browser:
    browser.looks(width=1440)
    browser.driver.get(served.url + "/")
    browser.script("sessionStorage.clear()")
    browser.driver.get(served.url + "/")
    browser.requests()
    browser.complaints()
    return browser


def opened(service: S2CS, uid: str, *, owner: str, target: str, **more: Any) -> Sequence[str]:
    """Both sides of a stream at one facility; the consumer's listeners."""
    base: dict[str, Any] = {"protocol": 1, "uid": uid, **more}
    first = service.request(base | {"role": "PROD", "targets": [target]}, owner=owner)
    second = service.request(base | {"role": "CONS", "offer": first.model_dump(mode="json")}, owner=owner)
    peers = [
        {"protocol": 1, "public_key": one.public_key, "source_addresses": one.dial_addresses}
        for one in second.relays
    ]
    service.update({"protocol": 1, "uid": uid, "role": "PROD", "peers": peers}, owner=owner)
    return second.addresses


@contextlib.contextmanager
def flowing(address: str) -> Iterator[None]:
    """Somebody who connects there and reads a little at a time, until the end of the block."""
    over = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError), socket.create_connection(split_address(address), 30) as connection:
            connection.settimeout(1)
            while not over.wait(0.01) and connection.recv(1 << 16):
                pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join(30)


class Endless:
    """An application that sends to whoever connects, for as long as it is read."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.getsockname())
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self._threads.append(threading.Thread(target=self._send, args=(connection,)))
                self._threads[-1].start()

    @staticmethod
    def _send(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(60)
            while True:
                connection.sendall(bytes(1 << 14))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in list(self._threads):
            thread.join(30)


@pytest.fixture
def endless(served: Served) -> Iterator[Endless]:  # noqa: ARG001 - it closes before the service does
    application = Endless()
    yield application
    application.close()


# --- without a browser


def test_the_page_is_for_everybody_and_may_do_nothing_but_ask_its_service(served: Served) -> None:
    for path, kind in {
        "/": "html",
        "/operator.js": "javascript",
        "/operator.css": "css",
        "/icon.svg": "svg",
    }.items():
        answer = httpx.get(served.url + path, timeout=30)
        assert answer.status_code == 200, path
        assert kind in answer.headers["Content-Type"]
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        for part in ("connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
            assert part in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text), path
    html = httpx.get(served.url + "/", timeout=30).text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    assert "aps" not in html


# --- who comes in


def test_a_wrong_token_is_explained_and_asked_for_again(page: Browser, served: Served) -> None:
    for guess, words in (("guess", "this is not the token in"), ("two words", "This is no token")):
        page.sign_in(guess)
        page.until(lambda words=words: words in page.text("#refusal"), "it says why")  # type: ignore[misc]
        assert not page.driver.find_element(By.ID, "figures").is_displayed()
    page.driver.find_element(By.ID, "token").clear()
    page.sign_in(served.token)
    page.until(lambda: page.text("#facility") == "aps", "the right one is taken")
    assert "No streams at this facility" in page.text("#no-streams")
    assert "administrator" in page.text("#who")


def test_a_token_is_in_memory_only_and_in_the_tab_if_asked_for(page: Browser, served: Served) -> None:
    everywhere = (
        "return JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie, location.href])"
    )
    page.sign_in(served.token)
    page.until(lambda: page.text("#facility") == "aps", "it is in")
    assert served.token not in page.script(everywhere)
    assert served.token not in page.script("return document.documentElement.outerHTML")
    page.driver.refresh()
    page.sign_in(served.token, keep=True)
    page.until(lambda: page.text("#facility") == "aps", "it is in again")
    page.driver.refresh()
    page.until(lambda: page.text("#facility") == "aps", "it is in after a reload")
    page.driver.find_element(By.ID, "forget").click()
    page.until(lambda: page.driver.find_element(By.ID, "entry").is_displayed(), "it asks again")
    assert page.script(everywhere).startswith("[{},{},")
    page.driver.refresh()
    page.until(lambda: page.driver.find_element(By.ID, "entry").is_displayed(), "it asks after a reload too")


def test_users_see_their_own_streams_and_administrators_those_of_everybody(
    browser: Browser, tmp_path: Path
) -> None:
    with Globus() as globus:
        client, scope = globus.add_facility()
        ada, bob, eve = (globus.add_person(f"{name}@example.org") for name in ("ada", "bob", "eve"))
        secret = tmp_path / "secret"
        secret.write_text(str(client.secret))
        secret.chmod(0o600)
        more = f'administrators = ["{eve.urn}"]\n[globus]\nclient_id = "{client.id}"\n'
        more += f'client_secret_file = "{secret}"\n'
        with (
            serving(tmp_path, "aps", gateway=GATEWAYS, more=more, environment=globus.environment) as served,
            contextlib.ExitStack() as callers,
        ):
            for person, uid in ((ada, "adas"), (bob, "bobs")):
                caller = Caller(served, globus.mint(person, scope))
                callers.callback(caller.close)
                document = {"uid": uid, "role": "PROD", "targets": ["127.0.0.1:9"], "num_conn": 3}
                caller.ask("POST", "/streams", json=document).raise_for_status()
                callers.callback(caller.ask, "DELETE", f"/streams/{uid}/PROD")
            page = fresh(browser, served)
            page.sign_in("guess")
            page.until(lambda: f"scope {scope}" in page.text("#refusal"), "it says which token it takes")
            page.sign_in(globus.mint(ada, scope))
            page.until(lambda: page.texts(LIST) == ["adas"], "her own stream")
            assert page.texts("#rows .owner") == ["you"]
            assert "bob" not in page.script("return document.body.textContent")
            assert "Your ports\n3" in page.text("#gateways")
            assert len(page.texts(".gateway")) == 1
            page.driver.find_element(By.ID, "forget").click()
            page.sign_in(globus.mint(eve, scope))
            page.until(lambda: page.texts(LIST) == ["adas", "bobs"], "the streams of everybody")
            assert len(page.texts(".gateway")) == 2
            owner = page.driver.find_element(By.CSS_SELECTOR, "#rows .owner")
            assert owner.text == f"{ada.urn[25:33]}…{ada.urn[-4:]}"
            owner.click()
            assert owner.text == ada.urn


# --- what is shown


def test_streams_and_gateways_are_shown_as_they_are_and_move(
    page: Browser, served: Served, facility: S2CS, endless: Endless, tmp_path: Path
) -> None:
    facility.drain("dtn2")
    more = {"rate_mbits_per_s": 400, "lease_s": 90, "lifetime_s": 86_000}
    listener, *_ = opened(facility, "moves", owner=ALICE, target=endless.address, **more)
    facility.request({"protocol": 1, "uid": "waits", "role": "PROD", "lease_s": 90}, owner=unix_owner())
    with flowing(listener):
        page.sign_in(served.token)
        row = "#rows tr.s-STREAMING"
        page.until(lambda: len(page.texts(row)) == 2, "both sides stream")
        page.until(lambda: "Mbit/s" in page.texts(f"{row} .rate")[0], "their rate")
        drawn = "return document.querySelectorAll('#rows .spark .to-consumer').length"
        page.until(lambda: page.script(drawn) >= 2, "their lines")
        producer, consumer, waiting = page.texts("#rows tr")[:3]
        for words in (
            "moves",
            "tls",
            "streaming",
            "1 now, 1 in all",
            "tls-copy, encrypted",
            "on dtn1",
            "ends in 23 h",
        ):
            assert words in producer
            assert words in consumer
        slow = re.compile(r"the consum.+, [0-9]+\s%")  # it reads less than the stream may carry
        page.until(lambda: all(map(slow.search, page.texts("#rows .s-STREAMING .c-limited"))), "what limits")
        for words in ("waits", "you", "waiting for hello", "nothing moves"):
            assert words in waiting
        first, second = page.texts(".gateway")
        for words in ("in service", "Streams\n3", "192 of 256", "800 Mbit/s of 1.00 Gbit/s", "3, no limit"):
            assert words in first
        assert "draining: no new streams" in second
        meters = page.script(
            "return [...document.querySelectorAll('[role=meter]')].map((one) => one.ariaValueText)"
        )
        assert "192 of 256" in meters
        # leases count down by themselves, between two answers too
        before = page.texts(".c-lease")
        page.until(lambda: page.texts(".c-lease") != before, "leases count down")
        for width, scheme in ((360, "light"), (360, "dark"), (1440, "dark"), (1440, "light")):
            page.looks(width=width, scheme=scheme)  # type: ignore[arg-type]
            wide = page.script("return document.documentElement.scrollWidth")
            assert wide <= width
            page.picture(tmp_path / f"{width}-{scheme}.png")
            ground = page.script("return getComputedStyle(document.body).backgroundColor")
            assert (ground == "rgb(18, 22, 27)") == (scheme == "dark")
            card = page.script("return getComputedStyle(document.querySelector('#rows td')).display")
            assert card == ("block" if width == 360 else "table-cell")
    urls = page.requests()
    assert f"{served.url}/streams?all_owners=true" in urls
    assert [one for one in urls if not one.startswith(served.url + "/")] == []
    assert page.complaints() == []


def test_an_end_is_shown_with_its_reason_in_words(page: Browser, served: Served, facility: S2CS) -> None:
    for uid in ("ends", "stays"):
        facility.request({"protocol": 1, "uid": uid, "role": "PROD", "targets": ["127.0.0.1:9"]}, owner=ALICE)
    page.sign_in(served.token)
    page.until(lambda: page.texts(LIST) == ["ends", "stays"], "both")
    facility.evict(uid="ends")
    page.until(lambda: page.texts(LIST) == ["stays"], "the one that is left")
    page.driver.find_element(By.ID, "ended").click()
    words = "ended: ended by an administrator"
    page.until(lambda: any(words in one for one in page.texts("#rows tr")), "the one that has ended, and why")


def test_streams_are_filtered_and_sorted(page: Browser, served: Served, facility: S2CS) -> None:
    for uid, mode, lease_s in (("one", "tls", 300), ("two", "none", 60), ("three", "tls", 100)):
        document = {"uid": uid, "role": "PROD", "mode": mode, "lease_s": lease_s, "targets": ["127.0.0.1:9"]}
        facility.request({"protocol": 1, **document}, owner=ALICE)
    page.sign_in(served.token)
    page.until(lambda: page.texts(LIST) == ["one", "three", "two"], "by name")
    Select(page.driver.find_element(By.ID, "sort")).select_by_value("lease")
    page.until(lambda: page.texts(LIST) == ["two", "three", "one"], "the shortest lease first")
    field = page.driver.find_element(By.ID, "filter")
    for typed, left in (("TLS listening", ["three", "one"]), ("7d1b9b0e none", ["two"]), ("dtn9", [])):
        field.clear()
        field.send_keys(typed)
        page.until(lambda left=left: page.texts(LIST) == left, typed)  # type: ignore[misc]
    assert page.text("#no-streams") == "No stream matches “dtn9”."


# --- what somebody else has written


def test_what_users_have_written_is_text(page: Browser, served: Served, facility: S2CS) -> None:
    facility.request({"protocol": 1, "uid": "s", "role": "PROD", "targets": ["127.0.0.1:9"]}, owner=HOSTILE)
    page.sign_in(served.token)
    page.until(lambda: page.texts(LIST) == ["s"], "the stream")
    page.driver.find_element(By.CSS_SELECTOR, "#rows .owner").click()
    assert page.text("#rows .owner") == HOSTILE
    assert page.script("return [window.hit, document.querySelectorAll('main img').length]") == [None, 0]


def test_whatever_a_service_says_is_text_even_where_no_policy_protects(page: Browser, served: Served) -> None:
    evil = '"><script>window.hit=1</script><img src=x onerror=window.hit=1><b id=bold>'
    counts = {"to_consumer": 1.0, "to_producer": 1.0}
    connection = {"path": {"to_consumer": evil}}
    relay = {"gateway": evil, "bits_per_s": counts, "streams": [connection]}
    stream = {
        **dict.fromkeys(("uid", "role", "owner", "mode", "state", "reason", "message"), evil),
        "bytes": counts,
        "bits_per_s": counts,
        "connections": {"active": 1, "total": 1},
        "relays": [relay],
        "limiting": {"leg": evil, "share": 1},
    }
    gateway = {"name": evil, "message": evil, "kind": evil, "answers": False, "draining": True, "streams": 1}
    gateway |= {"listeners": 1, "ports": 1, "connections": 1, "reserved_mbits_per_s": 1}
    answers = {
        "gateways": {
            "protocol": 1,
            "facility": evil,
            "caller": evil,
            "administrator": True,
            "gateways": [gateway],
        },
        "streams": {"protocol": 1, "facility": evil, "streams": [stream]},
    }
    said = f"const said = {json.dumps(answers)};"
    script = said + "window.fetch = async (path) => new Response(JSON.stringify(said[path.split('?')[0]]));"
    cdp = page.driver.execute_cdp_cmd
    cdp("Page.setBypassCSP", {"enabled": True})
    added = cdp("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        page.driver.get(served.url + "/")
        page.sign_in("any")
        page.until(lambda: page.texts(LIST) == [evil], "the stream")
        page.driver.find_element(By.CSS_SELECTOR, "#rows .owner").click()
        time.sleep(0.2)  # an image that cannot be loaded says so a moment later
        assert page.script("return [window.hit, document.querySelectorAll('main img, #bold').length]") == [
            None,
            0,
        ]
        assert page.text("#facility") == evil
    finally:
        cdp("Page.removeScriptToEvaluateOnNewDocument", added)
        cdp("Page.setBypassCSP", {"enabled": False})
        page.driver.get("about:blank")


# --- when the service is away


def test_a_service_that_is_gone_is_said_and_its_return_too(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, "aps", development=True) as served:
        page = fresh(browser, served)
        page.sign_in(served.token)
        page.until(lambda: page.text("#pulse") == "live", "it is live")
        token, port = served.token, int(served.url.rpartition(":")[2])
        served.stop()
        page.until(lambda: "The service does not answer" in page.text("#trouble"), "it is gone")
        assert re.search(r"Last seen [0-9]+ s ago\.", page.text("#trouble"))
    with serving(tmp_path, "aps", development=True, port=port) as served:
        assert served.token == token
        page.until(lambda: page.text("#pulse") == "live", "it is live again")
        page.until(
            lambda: not page.driver.find_element(By.ID, "trouble").is_displayed(), "no trouble any more"
        )
