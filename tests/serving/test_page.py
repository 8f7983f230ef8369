"""The page in a real browser: typed into, read, at desktop and phone width; skipped where there is none.

`BERTPAIR_SCREENSHOTS=DIR` keeps the pictures.
"""

import json
import os
import re
import shutil
import time
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

from bertpair.serving.app import PAGE, content_policy, page_response

pytestmark = pytest.mark.slow

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


HOLD_FIRST = """
const real = window.fetch;
window.fetch = async (path, options) => {
  const answer = await real(path, options);
  if (path.endsWith("/v1/predict") && !window.release) {
    await new Promise((done) => { window.release = done; });
  }
  return answer;
};
"""


@needs_browser
def test_an_answer_that_comes_late_does_not_replace_a_newer_one(live: LiveServer, browser: Any) -> None:
    screen(browser, 1280, 800, is_phone=False)
    browser.get(f"http://127.0.0.1:{live.port}/")
    wait(browser, lambda b: "neutral" in text(b, "about"))
    browser.execute_script(HOLD_FIRST)
    ask(browser, "the cat", "sat")
    wait(browser, lambda b: b.execute_script("return Boolean(window.release)"))
    browser.find_element(By.ID, "text-b").send_keys(" on the mat", Keys.ENTER)
    wait(browser, lambda b: text(b, "label"))
    tokens = live.predict({"text_a": "the cat", "text_b": "sat on the mat"}).json["num_tokens"]
    assert f"{tokens} tokens" in text(browser, "note")
    browser.execute_async_script("window.release(); setTimeout(arguments[0], 200);")
    assert f"{tokens} tokens" in text(browser, "note")


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


PRESS = """
const [id, count, init] = arguments;
for (let i = 0; i < count; i++) {
  document.getElementById(id).dispatchEvent(new KeyboardEvent("keydown",
    { key: "Enter", bubbles: true, cancelable: true, repeat: i > 0, ...init }));
}
"""
FETCHES = "return performance.getEntriesByType('resource').filter((e) => e.name.includes('/v1/')).length"


@needs_browser
def test_enter_asks_once_and_not_while_a_word_is_composed(live: LiveServer, browser: Any) -> None:
    screen(browser, 1280, 800, is_phone=False)
    browser.get(f"http://127.0.0.1:{live.port}/")
    wait(browser, lambda b: "neutral" in text(b, "about"))
    for name in ("text-a", "text-b"):
        browser.find_element(By.ID, name).send_keys("the cat")
    for init in ({"keyCode": 229}, {"isComposing": True}, {"shiftKey": True}):
        browser.execute_script(PRESS, "text-b", 1, init)
    time.sleep(0.3)
    assert browser.execute_script(FETCHES) == 0
    browser.execute_script(PRESS, "text-b", 60, {"keyCode": 13})
    wait(browser, lambda b: text(b, "label"))
    time.sleep(0.3)
    assert browser.execute_script(FETCHES) == 1
    browser.find_element(By.ID, "ask").send_keys("")
    for kind in ["rawKeyDown", *["char", "rawKeyDown"] * 20]:  # held on the button, as Chromium reports it
        event = {"type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", {**event, "autoRepeat": kind == "rawKeyDown"})
    time.sleep(0.3)
    assert browser.execute_script(FETCHES) <= 2


@needs_browser
def test_labels_like_numbers_keep_their_order_and_the_answer_is_marked(browser: Any, tmp_path: Path) -> None:
    labels = ["10", "0", "-1"]
    folder = write_hf_folder(tmp_path / "hf-tiny")
    config_file = folder / "config.json"
    values = json.loads(config_file.read_text())
    values["id2label"] = {str(i): name for i, name in enumerate(labels)}
    values["label2id"] = {name: i for i, name in enumerate(labels)}
    config_file.write_text(json.dumps(values))
    predictor, config = make_predictor(folder, max_batch_tokens=512)
    screen(browser, 1280, 800, is_phone=False)
    with serving(predictor, config) as live:
        browser.get(f"http://127.0.0.1:{live.port}/")
        wait(browser, lambda b: "10, 0, -1" in text(b, "about"))
        browser.find_element(By.ID, "example").click()
        wait(browser, lambda b: text(b, "label"))
        bars = browser.find_elements(By.CSS_SELECTOR, "#bars li")
        assert [bar.text.split("\n")[0] for bar in bars] == labels
        best = [bar.text.split("\n")[0] for bar in bars if bar.get_attribute("class") == "best"]
        assert best == [text(browser, "label")]
        mark = "return getComputedStyle(document.querySelector('.best span'), '::before').content"
        assert "✓" in browser.execute_script(mark)
        assert browser.switch_to.active_element.get_attribute("id") == "example"


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fields_have_an_edge_that_can_be_seen(live: LiveServer, browser: Any, scheme: str) -> None:
    screen(browser, 1280, 800, is_phone=False, scheme=scheme)
    browser.get(f"http://127.0.0.1:{live.port}/")
    colours = browser.execute_script(
        "const of = (id, name) => getComputedStyle(document.getElementById(id))[name];"
        "return [of('text-a', 'borderTopColor'), of('text-a', 'backgroundColor'),"
        " of('form', 'backgroundColor'), of('example', 'borderTopColor')]"
    )
    edge, inside, outside, button = (
        luminance([int(part) for part in re.findall(r"\d+", colour)[:3]]) for colour in colours
    )
    for one, other in ((edge, inside), (edge, outside), (button, outside)):
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 3


def luminance(rgb: list[int]) -> float:
    """WCAG's relative luminance."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


@needs_browser
def test_a_text_from_right_to_left_stands_so(live: LiveServer, browser: Any) -> None:
    screen(browser, 360, 740, is_phone=True)
    browser.get(f"http://127.0.0.1:{live.port}/")
    wait(browser, lambda b: "neutral" in text(b, "about"))
    ask(browser, "قواعد البيانات العلائقية (SQL)", "מסד נתונים")
    wait(browser, lambda b: text(b, "label"))
    direction = (
        "return ['text-a', 'text-b'].map((id) => getComputedStyle(document.getElementById(id)).direction)"
    )
    assert browser.execute_script(direction) == ["rtl", "rtl"]
    keep(browser, "rtl")


@needs_browser
def test_errors_name_the_field_and_the_focus_stands_there(live: LiveServer, browser: Any) -> None:
    screen(browser, 1280, 800, is_phone=False)
    browser.get(f"http://127.0.0.1:{live.port}/")
    wait(browser, lambda b: "neutral" in text(b, "about"))
    most = live.service.predictor.limits.max_text_chars

    def click_with(first: str, second: str) -> None:
        fill = "for (const i of [0, 1]) document.getElementById(['text-a', 'text-b'][i]).value = arguments[i]"
        browser.execute_script(fill, first, second)
        browser.find_element(By.ID, "ask").click()

    for first, second, field, said in (
        ("the cat", "a" * (most + 1), "text-b", f"Second text: found {most + 1} characters"),
        ("\u200b\u2800", "sat", "text-a", "First text: found a blank text"),
        ("the cat", "", "text-b", "Second text: please type a text"),
    ):
        click_with(first, second)
        wait(browser, lambda b, said=said: said in text(b, "error"))
        assert "text_" not in text(browser, "error")
        focused = browser.switch_to.active_element
        assert focused.get_attribute("id") == field and focused.get_attribute("aria-invalid") == "true"
    click_with("the cat", "sat")
    wait(browser, lambda b: text(b, "label"))
    assert text(browser, "error") == "" and browser.switch_to.active_element.get_attribute("id") == "ask"


@needs_browser
def test_a_missing_or_strange_key_is_said_and_focused(live: LiveServer, browser: Any) -> None:
    screen(browser, 360, 740, is_phone=True, scheme="dark")
    live.service.key = b"the-right-key"
    try:
        browser.get(f"http://127.0.0.1:{live.port}/")
        assert browser.switch_to.active_element.get_attribute("id") == "key"
        for name in ("text-a", "text-b"):
            browser.find_element(By.ID, name).send_keys("the cat")
        for typed, said in (
            ("", "type the key first"),
            ("ключ", "only the letters"),
            ("a-wrong-one", "or wrong"),
        ):
            browser.find_element(By.ID, "key").clear()
            browser.find_element(By.ID, "key").send_keys(typed)
            browser.find_element(By.ID, "ask").click()
            wait(browser, lambda b, said=said: said in text(b, "error"))
            assert browser.switch_to.active_element.get_attribute("id") == "key"
        keep(browser, "wrong-key")
    finally:
        live.service.key = None


def test_the_policy_names_the_hashes_of_this_very_page() -> None:
    answer = page_response('/a"b', keyed=True)
    policy = answer.headers["Content-Security-Policy"]
    assert policy.count("sha256-") == 2
    assert b'data-root="/a&quot;b" data-keyed="true"' in answer.body
    assert content_policy(bytes(answer.body).decode()) == policy == content_policy(PAGE)
