"""Headless Chromium for tests that look at pages; where there is none, the test is skipped and says what is missing."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@contextlib.contextmanager
def chromium(width: int = 1400, height: int = 1000) -> Iterator[Any]:
    """A selenium driver, with `get_log("browser")` of all levels; sizes are in CSS pixels, see `resize`.

    Skips the test where selenium, Chromium or its driver is not installed.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = next((path for name in _CHROMIUM if (path := shutil.which(name))), None)
    driver_program = shutil.which("chromedriver")
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(_CHROMIUM)} is on the PATH")
    if driver_program is None:
        pytest.skip("chromedriver is not on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for option in (*_OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
        try:
            resize(driver, width, height)
            yield driver
        finally:
            driver.quit()


def resize(driver: Any, width: int, height: int) -> None:
    """Make the page exactly this large; below 600 px it is a phone: touch, and the page's own viewport holds."""
    # Not the window: Chromium's windows do not become as narrow as a phone.
    phone = width < 600
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})


def screenshot(driver: Any, path: Path) -> None:
    """The page as it is shown, into a PNG file."""
    path.write_bytes(driver.get_screenshot_as_png())


def errors(driver: Any) -> list[str]:
    """What the pages have complained about since the last call, and what they could not load."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requests(driver: Any) -> list[str]:
    """Addresses that the page has fetched since it was opened, itself and data: URIs apart."""
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    return [address for address in driver.execute_script(script) if not address.startswith("data:")]


def overflow(driver: Any) -> int:
    """By how many pixels the page is wider than the screen."""
    # Not window.innerWidth, which on a phone grows with what it shows.
    script = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
    return int(driver.execute_script(script))
