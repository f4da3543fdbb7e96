"""The demo page in a browser: needs gradio, selenium, chromium and its driver; skipped without them.

With THOUGHTBUBBLES_SCREENSHOTS=FOLDER the screenshots are kept there.
"""

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_commands import fail
from tests.run_fixtures import RECIPE
from thoughtbubbles.app.exhibit import Exhibit, Growth
from thoughtbubbles.app.page import EXAMPLES
from thoughtbubbles.data import PreparedData
from thoughtbubbles.model.loading import load_model, load_tokenizer
from thoughtbubbles.recipes.training import load_recipe
from thoughtbubbles.training.run import train

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install 'thoughtbubbles[demo]'")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PHONE, DESK = (390, 844), (1280, 1000)


@pytest.fixture(scope="module")
def dense_run(tiny_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    (folder / "recipe.yaml").write_text(RECIPE.format(data=tiny_data.path, output=folder / "run"))
    train(load_recipe(folder / "recipe.yaml", ["model.routing=none", "training.steps=2"]), progress=False)
    return folder / "run"


@contextmanager
def served(*runs: Path) -> Iterator[str]:
    """The address of the page of some runs, while the context lasts."""
    from thoughtbubbles.app.page import serve

    server = serve([Exhibit(run.name, load_model(run), load_tokenizer(run)) for run in runs])
    try:
        yield server.address
    finally:
        server.close()


@pytest.fixture(scope="module")
def address(tiny_run: Path, dense_run: Path) -> Iterator[str]:
    """Two models side by side: the tiny run and a dense one."""
    with served(tiny_run, dense_run) as found:
        yield found


# What gradio logs of a request under way when its page is left or asks anew.
CUT_SHORT = ("AbortError", "Connection errored out")


class Browser:
    """A page in headless Chromium, found by CSS selectors."""

    def __init__(self, driver: Any, address: str, panels: int = 2) -> None:
        self.driver = driver
        driver.get(address)
        self.wait(lambda: all(len(self.all(f"#tokens-{place} button.tb-token")) > 5 for place in range(panels)))

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def one(self, selector: str) -> Any:
        return self.all(selector)[0]

    def text(self, selector: str) -> str:
        return " ".join(str(each.text) for each in self.all(selector))

    def wait(self, condition: Callable[[], object]) -> None:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 30, ignored_exceptions=[StaleElementReferenceException, IndexError]).until(
            lambda _: condition()
        )

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def retype(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.one(selector).send_keys(Keys.CONTROL, "a")
        self.one(selector).send_keys(text)

    def shoot(self, name: str) -> None:
        if folder := os.environ.get("THOUGHTBUBBLES_SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if BROWSER is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Named, since otherwise selenium asks the network for one.
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Any, address: str) -> Iterator[Browser]:
    """The page, fresh; afterwards nothing may have gone wrong in it or have come from elsewhere."""
    resize(driver, DESK)
    shade(driver, "light")
    driver.get_log("browser")
    driver.get_log("performance")
    yield Browser(driver, address)
    said = [entry["message"] for entry in driver.get_log("browser")]
    assert [message for message in said if not any(known in message for known in CUT_SHORT)] == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls
    assert [url for url in urls if not url.startswith((address, "data:", "blob:", "chrome:"))] == []
    answers = [m["params"]["response"] for m in messages if m["method"] == "Network.responseReceived"]
    assert [(each["url"], each["status"]) for each in answers if each["status"] >= 400] == []


def resize(driver: Any, size: tuple[int, int]) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def shade(driver: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_typed_text_shows_its_bubbles_and_the_slider_changes_them(browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    assert "The text is too long: only its first 16 tokens are taken." in browser.text("#status-0")
    browser.retype("#text textarea", "the root of fork")
    browser.one("#show").click()
    browser.wait(lambda: "too long" not in browser.text("#status-0") and browser.text("#status-0"))
    browser.wait(lambda: len(browser.all("#tokens-0 button.tb-token")) == len(browser.all("#tokens-1 button.tb-token")))
    assert "budget 1.5" in browser.text("#status-0")
    silhouettes = [each.get_attribute("outerHTML") for each in browser.all("#tokens-0 svg")]
    browser.one("#budget input[type=range]").send_keys(*[Keys.ARROW_RIGHT] * 2)
    browser.wait(lambda: "budget 2;" in browser.text("#status-0"))
    assert [each.get_attribute("outerHTML") for each in browser.all("#tokens-0 svg")] != silhouettes
    browser.shoot("bubbles")


def test_a_chosen_token_opens_its_tree_and_predictions(browser: Browser) -> None:
    browser.all("#tokens-0 button.tb-token")[4].click()
    browser.wait(lambda: browser.all("#detail-0 svg") and browser.all("#detail-0 table"))
    assert "Token 4," in browser.text("#detail-0 figcaption")
    assert len(browser.all("#detail-0 tbody tr")) == 8
    assert browser.all("#detail-1 svg") == []
    pressed = browser.all("#tokens-0 [aria-pressed=true]")
    assert [each.get_attribute("data-token") for each in pressed] == ["4"]
    browser.shoot("chosen")


def test_the_chosen_token_stays_at_another_budget(browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.all("#tokens-0 button.tb-token")[4].click()
    browser.wait(lambda: browser.all("#detail-0 svg"))
    browser.one("#budget input[type=range]").send_keys(Keys.HOME)
    browser.wait(lambda: "budget 1;" in browser.text("#status-0"))
    browser.wait(lambda: "forks made: 0" in browser.text("#detail-0 figcaption"))
    assert len(browser.all("#tokens-0 [aria-pressed=true]")) == 1
    rows = [
        [cell.text for cell in row.find_elements("css selector", "td")] for row in browser.all("#detail-0 tbody tr")
    ]
    assert all(with_forks == without for with_forks, without in rows)


def test_everything_is_reached_by_keyboard(browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.retype("#text textarea", "the root")
    browser.one("#text textarea").send_keys(Keys.SHIFT, Keys.ENTER)
    browser.wait(lambda: len(browser.all("#tokens-0 button.tb-token")) < 12)
    reached = []
    for _ in range(25):
        browser.press(Keys.TAB)
        reached.append(browser.run("return document.activeElement.id || document.activeElement.dataset.token || ''"))
        if reached[-1] == "1":
            break
    assert {"show", "generate", "stop", "0", "1"} <= set(reached)
    browser.press(Keys.ENTER)
    browser.wait(lambda: "Token 1," in browser.text("#detail-0 figcaption"))


def test_generation_comes_with_its_bubbles(browser: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.all("#tokens-0 button.tb-token")[4].click()
    browser.wait(lambda: browser.all("#detail-0 svg"))
    browser.retype("#text textarea", "the")
    browser.one("#generate").click()
    browser.wait(lambda: all(browser.all(f"#tokens-{place} button.tb-made") for place in (0, 1)))
    # The text that came, its bubbles, and none of what was there before.
    tokens = browser.all("#tokens-0 button.tb-token")
    made = browser.all("#tokens-0 button.tb-made")
    assert len(made) == len(tokens) - len(browser.all("#tokens-0 button:not(.tb-made)")) > 3
    assert len(browser.all("#status-0 .tb-text span[title]")) == len(tokens)
    assert browser.text("#status-0 .tb-prompt").endswith("the")
    assert browser.all("#detail-0 svg") == []
    assert {each.get_attribute("class") for each in browser.all("#status-1 .tb-text span[title]")} == {"tb-s1"}
    browser.shoot("generated")
    made[0].click()
    browser.wait(lambda: browser.all("#detail-0 svg"))
    # Another budget is one for the text that is shown.
    browser.one("#budget input[type=range]").send_keys(*[Keys.ARROW_RIGHT] * 2)
    browser.wait(lambda: "budget 2;" in browser.text("#status-0"))
    assert len(browser.all("#tokens-0 button.tb-made")) == len(made)
    browser.one("#show").click()
    browser.wait(lambda: not browser.all("#tokens-0 button.tb-made"))
    assert browser.all("#status-0 .tb-text") == []


def test_stopped_generation_shows_what_there_is(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch)
    browser.retype("#text textarea", "the")
    browser.one("#generate").click()
    browser.wait(lambda: len(browser.all("#status-0 .tb-text span[title]")) > 2)
    browser.one("#stop").click()
    browser.wait(lambda: browser.all("#tokens-0 button.tb-made"))
    count = len(browser.all("#tokens-0 button.tb-token"))
    assert len(browser.all("#status-0 .tb-text span[title]")) == count < 12


@pytest.mark.parametrize("place", [1, 2])
def test_an_example_is_shown_at_once(browser: Browser, place: int) -> None:
    before = browser.text("#tokens-0 .tb-piece")
    browser.one(f"#example-{place}").click()
    browser.wait(lambda: browser.text("#tokens-0 .tb-piece") not in ("", before))
    assert browser.one("#text textarea").get_attribute("value") == list(EXAMPLES.values())[place]
    assert len(browser.all("#examples button")) == 3


def test_another_text_ends_a_generation(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch)
    browser.retype("#text textarea", "the")
    browser.one("#generate").click()
    browser.wait(lambda: len(browser.all("#status-0 .tb-text span[title]")) > 2)
    browser.one("#show").click()
    browser.wait(lambda: browser.all("#tokens-0 button.tb-token"))
    time.sleep(1.5)  # the generation would go on meanwhile
    assert browser.all("#tokens-0 button.tb-made") == browser.all("#status-0 .tb-text") == []


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let generation take half a second for each token from the third on."""
    grow = Exhibit.generate

    def slowly(self: Exhibit, *arguments: Any) -> Iterator[Growth]:
        for step, growth in enumerate(grow(self, *arguments)):
            yield growth
            time.sleep(0.05 if step < 2 else 0.5)

    monkeypatch.setattr(Exhibit, "generate", slowly)


def test_tokens_look_clickable_and_are_explained(browser: Browser) -> None:
    assert "Click a token" in browser.text("#tokens-0 .tb-hint")
    assert all(word in browser.text("#legend") for word in ("shape", "number", "Colour"))
    style = "return getComputedStyle(document.querySelector('button.tb-token'))."
    assert browser.run(f"{style}cursor") == "pointer"
    assert browser.run(f"{style}borderTopWidth") == "1px"
    assert browser.run(f"{style}borderTopColor") not in ("rgba(0, 0, 0, 0)", "transparent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(browser: Browser, scheme: str) -> None:
    resize(browser.driver, PHONE)
    shade(browser.driver, scheme)
    browser.driver.refresh()
    browser.wait(lambda: browser.all("#tokens-0 button.tb-token"))
    browser.all("#tokens-0 button.tb-token")[4].click()
    browser.wait(lambda: browser.all("#detail-0 svg"))
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]
    first, second = (browser.one(f"#tokens-{place}").rect for place in (0, 1))
    assert second["y"] > first["y"]
    assert max(browser.one(button).rect["width"] for button in ("#show", "#generate", "#stop")) < PHONE[0] / 2
    assert first["y"] < browser.one("#legend").rect["y"]
    assert browser.all("button.tb-token")[0].rect["y"] < PHONE[1] - 80
    ink, ground = (
        browser.run(f"return getComputedStyle(document.querySelector('{selector}')).{name}")
        for selector, name in ((".tb-piece", "color"), ("body", "backgroundColor"))
    )
    assert contrast(ink, ground) > 7
    browser.shoot(f"phone-{scheme}")


def test_a_dense_model_alone_has_no_budget(driver: Any, dense_run: Path) -> None:
    resize(driver, DESK)
    with served(dense_run) as address:
        dense = Browser(driver, address, panels=1)
        assert dense.all("#budget") == dense.all("#legend") == []
        assert "one stream per token" in dense.text("#status-0")
        dense.all("button.tb-token")[3].click()
        dense.wait(lambda: dense.all("#detail-0 table"))
        assert len(dense.all("#detail-0 thead th")) == 2
        dense.one("#generate").click()
        dense.wait(lambda: dense.all("button.tb-made"))
        driver.get("about:blank")


def contrast(one: str, other: str) -> float:
    """WCAG contrast of two colours `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_no_file_can_be_read_and_nothing_comes_from_elsewhere(address: str, tiny_run: Path) -> None:
    assert address.startswith("http://127.0.0.1:")
    for path in ("/etc/passwd", Path(__file__), tiny_run / "recipe.yaml", "pyproject.toml"):
        for prefix in ("gradio_api/file=", "gradio_api/file/", "file=", "%67radio_api/file%3D", "/gradio_api//file="):
            assert status_of(f"{address}{prefix}{path}") in (403, 404)
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "googleapis" not in answer.read().decode()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_a_taken_port_is_bad_input(
    address: str, tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    assert f"port {port}: expected one that is free" in fail(capsys, monkeypatch, "demo", tiny_run, "--port", port)
