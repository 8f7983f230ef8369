"""The page in a real browser: typed into, read, at desktop and phone width; skipped where there is none.

`BERTPAIR_SCREENSHOTS=DIR` keeps the pictures.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_hf_folder
from live_server import LiveServer, make_predictor, serving
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from bertpair.page import Page

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROME and DRIVER), reason="no chromium and chromedriver here")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")
    predictor, config = make_predictor(folder, max_batch_tokens=512)
    with serving(predictor, config) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


def wait(browser: Any, condition: Callable[[Any], object]) -> None:
    WebDriverWait(browser, 20).until(condition)


def text(browser: Any, name: str) -> str:
    return str(browser.find_element(By.ID, name).text)


def screen(browser: Any, width: int, height: int, *, is_phone: bool, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def keep(browser: Any, name: str) -> None:
    if folder := os.environ.get("BERTPAIR_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder, f"{name}.png")))


def ask(browser: Any, first: str, second: str) -> None:
    """By keyboard alone: the first field has the focus."""
    keys = webdriver.ActionChains(browser)
    keys.send_keys(first).send_keys(Keys.TAB).send_keys(second).send_keys(Keys.ENTER).perform()


@needs_browser
@pytest.mark.parametrize(
    ("name", "width", "height", "is_phone", "scheme"),
    [
        ("desktop", 1280, 800, False, "light"),
        ("phone", 360, 740, True, "light"),
        ("dark", 360, 740, True, "dark"),
    ],
)
def test_a_pair_typed_and_answered(
    live: LiveServer, browser: Any, name: str, width: int, height: int, is_phone: bool, scheme: str
) -> None:
    screen(browser, width, height, is_phone=is_phone, scheme=scheme)
    browser.get(f"http://127.0.0.1:{live.port}/")
    wait(browser, lambda b: "neutral" in text(b, "about"))
    assert text(browser, "model") == "hf-tiny" and "negative, neutral, positive" in text(browser, "about")
    ask(browser, "数据库索引 the cat", "不是一个索引")
    wait(browser, lambda b: text(b, "label"))
    expected = live.predict({"text_a": "数据库索引 the cat", "text_b": "不是一个索引"}).json
    assert text(browser, "label") == expected["label"]
    bars = browser.find_elements(By.CSS_SELECTOR, "#bars li")
    found = {bar.text.split("\n")[0]: float(bar.text.split("\n")[1].split(" ")[0]) for bar in bars}
    assert found == pytest.approx({k: 100 * p for k, p in expected["probabilities"].items()}, abs=0.051)
    assert f"{expected['num_tokens']} tokens" in text(browser, "note")
    keep(browser, name)
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) <= 0
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@needs_browser
def test_a_model_of_single_texts_is_asked_for_one(browser: Any, tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "single")
    raw = json.loads((folder / "config.json").read_text())
    raw["bertpair"] = {"takes_pairs": False, "header": None}
    (folder / "config.json").write_text(json.dumps(raw))
    with serving(*make_predictor(folder, max_batch_tokens=512)) as server:
        screen(browser, 1280, 800, is_phone=False)
        browser.get(f"http://127.0.0.1:{server.port}/")
        wait(browser, lambda b: "neutral" in text(b, "about"))
        assert not browser.find_element(By.ID, "text-b").is_displayed()
        browser.find_element(By.ID, "text-a").send_keys("the cat sat", Keys.ENTER)
        wait(browser, lambda b: text(b, "label") or text(b, "error"))
        assert text(browser, "label") == server.predict({"text_a": "the cat sat"}).json["label"]


@needs_browser
def test_cuts_and_errors_are_told_in_words(live: LiveServer, browser: Any) -> None:
    screen(browser, 1280, 800, is_phone=False)
    browser.get(f"http://127.0.0.1:{live.port}/")
    wait(browser, lambda b: "neutral" in text(b, "about"))
    ask(browser, "the cat " * 40, "sat")
    wait(browser, lambda b: "was cut" in text(b, "note"))
    assert "64 tokens" in text(browser, "note")
    browser.refresh()
    wait(browser, lambda b: "neutral" in text(b, "about"))
    ask(browser, "the cat", " ")
    wait(browser, lambda b: "type a text" in text(b, "error"))
    live.service.is_warm = False
    try:
        ask(browser, "", "sat")  # the focus went to the empty field
        browser.find_element(By.ID, "ask").click()
        wait(browser, lambda b: text(b, "error"))
    finally:
        live.service.is_warm = True
    keep(browser, "error")


@needs_browser
def test_a_key_is_asked_for_and_kept_in_memory_only(live: LiveServer, browser: Any) -> None:
    screen(browser, 1280, 800, is_phone=False)
    live.service.key = b"the-right-key"
    try:
        browser.get(f"http://127.0.0.1:{live.port}/")
        key = browser.find_element(By.ID, "key")
        assert key.is_displayed() and "asks for a key" in text(browser, "about")
        key.send_keys("a-wrong-key")
        browser.find_element(By.ID, "text-a").send_keys("the cat")
        browser.find_element(By.ID, "text-b").send_keys("sat", Keys.ENTER)
        wait(browser, lambda b: "key is missing or wrong" in text(b, "error"))
        key.clear()
        key.send_keys("the-right-key")
        browser.find_element(By.ID, "text-b").send_keys(Keys.ENTER)
        wait(browser, lambda b: text(b, "label"))
        keep(browser, "key")
        stored = "return localStorage.length + sessionStorage.length + document.cookie.length"
        assert browser.execute_script(stored) == 0
    finally:
        live.service.key = None


def test_the_policy_names_the_hashes_of_this_very_page() -> None:
    page = Page()
    assert page.policy.count("sha256-") == 2
    body, headers = page.render('/a"b', keyed=True)
    assert b'data-root="/a&quot;b" data-keyed="true"' in body
    assert Page(body.decode()).policy == headers["Content-Security-Policy"]
