"""Shared fixtures. Every tensor shape that a signature states is checked while tests run."""

from __future__ import annotations

import base64
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
install_import_hook("iddc", "beartype.beartype")  # before the first import of iddc

settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
settings.register_profile("soak", deadline=None, max_examples=2000)
settings.load_profile("default")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data beside the checkout; users do not have it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the development data (shared/data beside the checkout) is not here")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of three clusters that segments in milliseconds; not to be changed."""
    from tiny import tiny_segmenter  # after the import hook

    folder = tmp_path_factory.mktemp("run")
    tiny_segmenter(3).save(folder)
    return folder


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """A headless Chromium that asks nobody anything; tests take `browser`."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for switch in (
        "headless",
        "no-sandbox",  # it has none as root, in a container
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
        "hide-scrollbars",  # or screenshots lack a strip
        "window-size=1200,900",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{switch}")
    # With the driver named, selenium looks for none and fetches none.
    running = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield running
    running.quit()


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Chrome]:
    """A fresh tab; the test fails if an error stands in its console at the end."""
    first = chromium.current_window_handle
    chromium.switch_to.new_window("tab")
    chromium.get_log("browser")
    yield chromium
    errors = [line["message"] for line in chromium.get_log("browser") if line["level"] == "SEVERE"]
    chromium.close()
    chromium.switch_to.window(first)
    assert not errors


@pytest.fixture
def axe(browser: Chrome) -> Callable[[], list[str]]:
    """Look for what keeps people from using the present page: axe-core, with all its rules."""
    package = pytest.importorskip("axe_selenium_python")
    source = Path(package.__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
    script = (
        "const done = arguments[0];"
        "axe.run().then(({ violations }) => done(violations.map(({ id, nodes }) =>"
        " `${id}: ${nodes[0].html}`)), (error) => done([String(error)]))"
    )

    def look() -> list[str]:
        browser.execute_cdp_cmd("Runtime.evaluate", {"expression": source.read_text("utf-8")})
        browser.set_script_timeout(120)
        found: list[str] = browser.execute_async_script(script)
        return found

    return look


@pytest.fixture(params=["light-1200", "dark-1200", "light-390", "dark-390"])
def screen(browser: Chrome, request: pytest.FixtureRequest) -> str:
    """The scheme of the browser and the width of its window, which they have from here on."""
    name: str = request.param
    scheme, width = name.split("-")
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": int(width), "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    return name


@pytest.fixture
def check_page(
    browser: Chrome, axe: Callable[[], list[str]], screen: str, artefacts: Path
) -> Callable[[str], None]:
    """Keep a picture of the present page, which must fit its window and please axe-core."""

    def check(name: str) -> None:
        root = "document.documentElement"
        # A window as high as the page: what is out of sight is not drawn.
        height = int(browser.execute_script(f"return Math.max(900, {root}.scrollHeight)"))
        size = {"width": int(screen.partition("-")[2]), "height": height}
        size |= {"deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_async_script(
            "const done = arguments[0];"
            "requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        )
        picture = browser.execute_cdp_cmd("Page.captureScreenshot", {})["data"]
        (artefacts / f"{name}-{screen}.png").write_bytes(base64.b64decode(picture))
        assert browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
        script = "return [...document.images].every(image => image.hasAttribute('alt'))"
        assert browser.execute_script(script)
        assert axe() == []

    return check


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """Where screenshots are kept to be looked at; git ignores it."""
    folder = Path(__file__).parent / "artefacts"
    folder.mkdir(exist_ok=True)
    return folder


SLOW_FILES = {
    *("test_bench", "test_cluster", "test_comparison", "test_components", "test_determinism"),
    *("test_engines", "test_export", "test_faults", "test_hostile", "test_label_page"),
    *("test_load", "test_pretrain_trials", "test_pretraining", "test_reproduce"),
}
"""Files that start processes, servers, browsers or whole trainings for most of their tests."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark such files slow as a whole, so that `-m "not slow"` is done within three minutes."""
    for item in items:
        if item.path.stem in SLOW_FILES and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.slow(file=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were skipped and why, a line for each reason: a skipped check is no check."""
    places: dict[str, Counter[str]] = {}
    for report in terminalreporter.getreports("skipped"):
        if isinstance(report.longrepr, tuple):
            file, _, reason = report.longrepr
            reason = str(reason).removeprefix("Skipped: ")
            places.setdefault(reason, Counter())[
                Path(report.nodeid.partition("::")[0] or file).name
            ] += 1
    if not places:
        return
    total = sum(found.total() for found in places.values())
    terminalreporter.section(f"{total} skipped, which were not checked")
    for reason, found in sorted(places.items(), key=lambda item: -item[1].total()):
        files = ", ".join(f"{name} {number}" for name, number in sorted(found.items()))
        terminalreporter.line(f"{found.total():4}  {reason}  ({files})")
