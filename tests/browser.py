"""A real browser without a window: Debian's Chromium and its driver, which leave no process and no file behind."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """One page in one browser."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def looks(self, *, width: int, height: int = 900, scheme: Literal["light", "dark"] = "light") -> None:
        """Set the size of the window, and whether its user likes it light or dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def text(self, css: str = "body") -> str:
        """What somebody reads there."""
        return self.driver.find_element(By.CSS_SELECTOR, css).text

    def texts(self, css: str) -> list[str]:
        """What somebody reads in each such element."""
        words: list[str] = self.script(
            "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)", css
        )
        return words

    def script(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page."""
        return self.driver.execute_script(script, *arguments)

    def sign_in(self, token: str, *, keep: bool = False) -> None:
        """Give the page a token, as its user does."""
        self.until(lambda: self.driver.find_element(By.ID, "token").is_displayed(), "it asks for a token")
        self.driver.find_element(By.ID, "token").send_keys(token)
        if keep:
            self.driver.find_element(By.ID, "keep").click()
        self.driver.find_element(By.CSS_SELECTOR, "#entry button").click()

    def until(self, condition: Callable[[], object], what: str, *, timeout_s: float = 30) -> None:
        """Wait until a condition holds; past the deadline, say what the page shows."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}; it shows: {self.text()}"
            time.sleep(0.05)

    def requests(self) -> list[str]:
        """The URLs asked for since this was last called."""
        events = [json.loads(one["message"])["message"] for one in self.driver.get_log("performance")]
        return [
            one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """What the console says that is worse than a note."""
        return [one["message"] for one in self.driver.get_log("browser") if one["level"] != "INFO"]

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """The page as PNG, also what one has to scroll for."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own below `folder`, which asks no other machine for anything."""
    profile = folder / "profile"
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new",
        f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-first-run",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),  # it refuses to be root's otherwise
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(str(DRIVER)))
    children = psutil.Process(driver.service.process.pid).children(recursive=True)
    try:
        yield Browser(driver)
    finally:
        children += [one for one in _below(children) if one not in children]
        driver.quit()
        _, left = psutil.wait_procs(children, timeout=10)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        shutil.rmtree(profile, ignore_errors=True)
        assert not left, f"{len(left)} processes of the browser were left"


def _below(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += one.children(recursive=True)
    return found
