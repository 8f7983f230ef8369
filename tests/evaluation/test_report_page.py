"""The report's page: what is in it, and how it behaves in a real browser, skipped where there is none.

`BERTPAIR_SCREENSHOTS=DIR` keeps the pictures.
"""

import base64
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from bertpair import __version__
from bertpair.evaluation.page import (
    Code,
    Column,
    Figure,
    Matrix,
    Note,
    Page,
    Picture,
    Section,
    Table,
    render,
    shown,
)
from bertpair.evaluation.plots import MAX_CLASSES, draw_curves, draw_reliability

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROME and DRIVER), reason="no chromium and chromedriver here")
HOSTILE = (
    "</title></style></script></pre></svg><script>document.body.textContent = 'owned'</script>",
    "\"><img src=x onerror='alert(1)'>",
    "' onmouseover='alert(1)",
    "<!-- ",
    "]]> &lt;b&gt; & {{ 7 * 7 }} {% raw %}",
)
CHINESE, ARABIC = "什么是数据库索引?一种让查询更快的数据结构。", "مسار البيانات في شبكة الحاسوب (SQL)"


@cache
def curves(label: str = "yes") -> bytes:
    records = [{"step": k, "loss": 1 / k, "lr": 1e-5, "eval_f1": 1 - 1 / k} for k in range(1, 30)]
    return draw_curves([{**each, "eval_positive_label": label} for each in records], "f1", as_svg=True)


def filled(text: str) -> Page:
    """A page with this text wherever there can be one."""
    head = [text, Column(text, "share"), Column(text, "text")]
    blocks = [
        text,
        Note(text),
        Note(text, is_warning=True),
        Code(text, text),
        Table(head, [[text, 0.5, text], [None, None, None]], text, is_sortable=True),
        Matrix([[3, 1], [0, 2]], [text, text], text),
        Picture(curves(text), text),
    ]
    return Page(text, text, [Figure(text, text, text)], [Section(text, blocks)])


@cache
def rich_page() -> Page:
    """A page as a run may write it, with what is hard to lay out."""
    generator = np.random.default_rng(0)
    labels = ["negative", "neutral", "positive"]
    texts = [CHINESE, ARABIC, HOSTILE[0], "Donaudampfschiff" * 12, "x" * 300, "bad \udcff\x00 name", "a\nb"]
    errors = [
        [int(k * 37 % 101), labels[k % 3], float(score), texts[k % 7], texts[(k + 3) % 7]]
        for k, score in enumerate(generator.uniform(size=40))
    ]
    many = [
        f"{name} {k}" for k, name in enumerate(["مشكلة", "开户", "a very long name of a class", "no"] * 5)
    ]
    matrix = generator.integers(0, 60, (20, 20)) * (generator.uniform(size=(20, 20)) < 0.3)
    sections = [
        Section("Notes", ["Right: 7 of 9 rows.", Note("Rows are in both files.", is_warning=True)]),
        Section(
            "Classes",
            [
                Table(
                    ["class", Column("f1", "share"), "rows", "loss", *(f"figure {k}" for k in range(20))],
                    [
                        ["b 10", 0.25, 1200, float("nan"), *range(20)],
                        ["b 9", 0.5, 30, None, *range(20)],
                        ["a", 0.125, 4, 2e-5, *range(20)],
                    ],
                    "By class",
                    is_sortable=True,
                ),
                Matrix([[8123, 401, 0], [512, 9004, 7], [1, 2, 4152]], labels, "Confusion matrix"),
                Matrix(matrix + np.diag(generator.integers(0, 2000, 20)), many, "Twenty classes"),
            ],
        ),
        Section(
            "Errors",
            [
                Table(
                    ["line", "gold", "score", Column("reference", "text"), Column("answer", "text")],
                    errors,
                    "Errors",
                    is_sortable=True,
                )
            ],
        ),
        Section("Pictures", [Picture(curves(), "Curves"), Picture(reliability(), "Reliability")]),
        Section("Again", [Code("bertpair evaluate " + "--flag value " * 30, "Command")]),
    ]
    figures = [Figure("accuracy", 0.89591, "95 % interval 0.8805 to 0.9113"), Figure("rows", 23043)]
    return Page("Evaluation of out/" + "long" * 30, "data/dev.tsv", figures, sections)


def reliability() -> bytes:
    return draw_reliability([0.2, 0.7, np.nan], [0.3, 0.6, np.nan], [5, 90, 0], as_svg=True)


class Parsed(HTMLParser):
    """A page's tags with the names of their attributes, and its attributes and texts."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.other: list[str] = []
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def values(self, wanted: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == wanted]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup(text: str) -> None:
    plain, hostile = Parsed(render(filled("plain"))), Parsed(render(filled(text)))
    assert hostile.tags == plain.tags and not hostile.other
    count = sum(each.strip() == "plain" for each in plain.texts)
    assert count > 15 and sum(each.strip() == text.strip() for each in hostile.texts) == count
    for name in ("title", "aria-label", "data-name"):
        assert hostile.values(name) == [text if each == "plain" else each for each in plain.values(name)]


def test_what_utf8_and_html_cannot_hold_is_replaced() -> None:
    page = render(filled("a\x00b\udcff\x1b\x85\ufffe\ttab")).decode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe]", page)
    assert page.count("a\ufffdb\ufffd\ufffd\ufffd\ufffd\ttab") > 15


def test_the_page_loads_nothing() -> None:
    page = render(rich_page())
    parsed = Parsed(page)
    assert not re.search(rb"(?i)https?:|@import|url\((?!#)", page)
    assert {name for name, _ in parsed.tags}.isdisjoint(
        {"img", "iframe", "object", "embed", "base", "audio", "video", "form", "image"}
    )
    links = [value for _, name, value in parsed.attributes if name in ("src", "srcset", "href", "action")]
    assert len(links) > 5 and all(link.startswith("#") or link == "data:," for link in links)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link[0] == "#"} <= set(ids)
    assert set(" ".join(parsed.values("aria-labelledby")).split()) <= set(ids)


def test_the_policy_names_the_hash_of_the_script() -> None:
    page = render(filled("plain")).decode()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in page


def test_the_page_says_what_wrote_it_and_has_one_heading_a_section() -> None:
    parsed = Parsed(render(rich_page()))
    assert f"bertpair {__version__}" in parsed.values("content")
    names = [name for name, _ in parsed.tags]
    assert (names.count("h1"), names.count("h2"), names.count("section"), names.count("main")) == (1, 5, 5, 1)
    assert parsed.values("lang") == ["en"] and parsed.values("scope").count("row") == 3 + 3 + 20 + 40


def test_the_same_page_gives_the_same_bytes_and_little_more_than_its_texts() -> None:
    assert render(rich_page()) == render(rich_page())
    assert len(render(Page("empty", "", [], []))) < 20_000
    head = ["line", "gold", "predicted", "score", Column("text_a", "text"), Column("text_b", "text")]
    rows = [[k, "positive", "negative", 0.9, "正" * 250, "确" * 250] for k in range(200)]
    page = Page("errors", "", [], [Section("Errors", [Table(head, rows, "Errors", is_sortable=True)])])
    assert len(render(page)) < 500_000


def test_cells_are_shown_as_people_read_them_and_sorted_by_their_value() -> None:
    assert [shown(value) for value in (None, "a", 1234567, 0.89591, 2e-5, 0.0, 1234.5)] == [
        *("–", "a", "1,234,567", "0.8959", "2e-05", "0.0000", "1,234.5000")
    ]
    rows = [["a", 1200, 0.123456789], ["b", None, float("inf")], ["c", 3, float("nan")]]
    page = Page("t", "", [], [Section("s", [Table(["name", "rows", "loss"], rows, is_sortable=True)])])
    assert Parsed(render(page)).values("data-value") == ["1200.0", "0.123456789", "", "Infinity", "3.0", ""]
    plain = Page("t", "", [], [Section("s", [Table(["name", "rows", "loss"], rows)])])
    assert not Parsed(render(plain)).values("data-value")


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        render(Page("t", "", [], [Section("s", [Table(["a", "b"], [["one"]])])]))


def test_bars_are_for_shares_that_are_there() -> None:
    table = Table(["name", Column("f1", "share")], [["a", 0.25], ["b", None], ["c", float("nan")], ["d", 1]])
    parsed = Parsed(render(Page("t", "", [], [Section("s", [table])])))
    assert parsed.values("style") == ["--share: 0.25", "--share: 1"]


def test_the_matrix_has_counts_shares_and_shades() -> None:
    page = render(Page("t", "", [], [Section("s", [Matrix([[3, 1, 0], [0, 1000, 2], [0, 0, 0]], [*"abc"])])]))
    cells = re.findall(rb'<td class="(\w+)"(?: style="--share: ([\d.]+)")?>(.*?)</td>', page)
    assert cells == [
        (b"right", b"0.75", b"<b>3</b> <small>75.0%</small>"),
        (b"wrong", b"0.5", b"<b>1</b> <small>25.0%</small>"),
        *[(b"none", b"", b"0"), (b"rows", b"", b"4"), (b"none", b"", b"0")],
        (b"right", b"0.998", b"<b>1,000</b> <small>99.8%</small>"),
        (b"wrong", b"0.045", b"<b>2</b> <small>0.2%</small>"),
        *[(b"rows", b"", b"1,002"), *[(b"none", b"", b"0")] * 3, (b"rows", b"", b"0")],
    ]


def test_the_smallest_of_very_many_classes_are_one_in_the_matrix() -> None:
    num_labels = MAX_CLASSES + 10
    matrix = Matrix(np.eye(num_labels, dtype=int), [f"class {k}" for k in range(num_labels)])
    assert matrix.names == [*(f"class {k}" for k in range(MAX_CLASSES)), "10 others"]
    assert matrix.lines[-1] == [*[(0, 0.0)] * MAX_CLASSES, (10, 1.0)]


def test_texts_have_a_direction_of_their_own() -> None:
    tags = Parsed(render(rich_page())).tags
    assert sum("dir" in names for tag, names in tags if tag == "td") == 80


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser that shows the rich page from a file."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_bytes(render(rich_page()))
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(30)
    driver.get(file.as_uri())
    yield driver
    driver.quit()


def screen(browser: Any, width: int, scheme: str = "light", media: str = "screen") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.refresh()


def sortable(browser: Any, number: int) -> Any:
    return browser.find_elements(By.CSS_SELECTOR, "table.sortable")[number]


def column(table: Any, number: int) -> list[str]:
    cells = table.find_elements(By.CSS_SELECTOR, f"tbody tr > :nth-child({number + 1})")
    return [cell.text for cell in cells]


def orders(table: Any) -> list[str]:
    return [head.get_attribute("aria-sort") for head in table.find_elements(By.TAG_NAME, "th")[:4]]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 800, 1280])
def test_the_page_never_scrolls_sideways(browser: Any, width: int, scheme: str) -> None:
    screen(browser, width, scheme)
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) <= 0
    if folder := os.environ.get("BERTPAIR_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder, f"report-{width}-{scheme}.png")))


@needs_browser
@pytest.mark.slow
def test_the_browser_finds_no_fault_and_asks_for_nothing(browser: Any) -> None:
    screen(browser, 1280)
    assert browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert browser.execute_script("return document.querySelectorAll('th button').length") == 24 + 5
    assert browser.get_log("browser") == []


@needs_browser
@pytest.mark.slow
def test_a_click_sorts_numbers_and_another_turns_them(browser: Any) -> None:
    screen(browser, 1280)
    table = sortable(browser, 0)
    assert column(table, 0) == ["b 10", "b 9", "a"] and orders(table) == ["none"] * 4
    buttons = table.find_elements(By.CSS_SELECTOR, "th button")
    buttons[2].click()
    assert column(table, 2) == ["4", "30", "1,200"]
    assert orders(table) == ["none", "none", "ascending", "none"]
    buttons[2].click()
    assert column(table, 2) == ["1,200", "30", "4"] and orders(table)[2] == "descending"
    for _ in range(2):  # what has no value stands last both ways, in its order
        buttons[3].click()
        assert column(table, 3) == ["2e-05", "nan", "–"]
    buttons[4].click()  # all are equal: nothing moves
    assert column(table, 0) == ["a", "b 10", "b 9"]


@needs_browser
@pytest.mark.slow
def test_the_keyboard_skips_to_the_content_and_sorts_texts(browser: Any) -> None:
    screen(browser, 1280)
    webdriver.ActionChains(browser).send_keys(Keys.TAB).perform()
    skip = browser.switch_to.active_element
    assert skip.text == "Skip to the content" and skip.rect["y"] >= 0
    webdriver.ActionChains(browser).send_keys(Keys.ENTER, Keys.TAB, Keys.TAB, Keys.SPACE).perform()
    button = browser.switch_to.active_element
    assert (button.tag_name, button.text) == ("button", "class")
    table = sortable(browser, 0)
    assert column(table, 0) == ["a", "b 9", "b 10"] and orders(table)[0] == "ascending"
    assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", button) == "solid"
    webdriver.ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert column(table, 0) == ["b 10", "b 9", "a"] and orders(table)[0] == "descending"


@needs_browser
@pytest.mark.slow
def test_rows_with_texts_are_cards_on_a_phone_and_sorted_there(browser: Any) -> None:
    screen(browser, 375)
    table = sortable(browser, 1)
    assert table.find_element(By.CSS_SELECTOR, "tbody tr").value_of_css_property("display") == "flex"
    table.find_element(By.CSS_SELECTOR, "th button").click()
    lines = [int(line) for line in column(table, 0)]
    assert lines == sorted(lines) and len(lines) == 40


@needs_browser
@pytest.mark.slow
def test_what_scrolls_has_the_focus_and_a_name(browser: Any) -> None:
    screen(browser, 375)
    faults = """
      const scrolls = [...document.querySelectorAll("main *")].filter((e) => !e.closest("svg")
        && getComputedStyle(e).overflowX === "auto" && e.scrollWidth > e.clientWidth);
      const byId = (e) => document.getElementById(e.getAttribute("aria-labelledby"));
      const isNamed = (e) => Boolean(e.ariaLabel || byId(e).textContent);
      return [scrolls.length, scrolls.filter((e) => e.tabIndex !== 0 || !isNamed(e)).length];
    """
    found, without = browser.execute_script(faults)
    assert found >= 3 and without == 0


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_of_the_matrix_and_of_the_page_can_be_read(browser: Any, scheme: str) -> None:
    screen(browser, 1280, scheme)
    colors = browser.execute_script(
        "const of = (element, name) => getComputedStyle(element)[name];"
        "const ground = of(document.body, 'backgroundColor');"
        "return [...document.querySelectorAll('.matrix td, main p, figcaption, thead th, dd, nav a')]"
        ".map((e) => [of(e, 'color'), of(e, 'backgroundColor'), ground])"
    )
    assert len(colors) > 400
    for color, shade, ground in {tuple(each) for each in colors}:
        ink, below = rgba(color)[:3], np.array(rgba(ground)[:3])
        *top, alpha = rgba(shade)
        light, dark = sorted((luminance(ink), luminance(below + alpha * (top - below))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (color, shade)


def rgba(color: str) -> list[float]:
    found = [float(part) for part in re.findall(r"[\d.]+", color)]
    return found if len(found) == 4 else [*found, 1.0]


def luminance(rgb: Any) -> float:
    """WCAG's relative luminance."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


@needs_browser
@pytest.mark.slow
def test_on_paper_all_is_black_on_white_and_nothing_is_cut(browser: Any) -> None:
    screen(browser, 700, "dark", "print")
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert browser.execute_script(style, "body", "backgroundColor") == "rgb(255, 255, 255)"
    assert {browser.execute_script(style, name, "display") for name in ("nav", ".skip")} == {"none"}
    assert browser.execute_script(style, ".tall", "maxHeight") == "none"
    assert browser.execute_script(style, ".tall", "overflowX") == "visible"
    assert browser.execute_script(style, ".matrix .right", "printColorAdjust") == "exact"
    assert column(sortable(browser, 0), 0) == ["b 10", "b 9", "a"]


@needs_browser
@pytest.mark.slow
def test_pictures_follow_the_dark_scheme(browser: Any) -> None:
    fill = "return getComputedStyle(document.querySelector('svg text')).fill"
    found = set()
    for scheme in ("light", "dark"):
        screen(browser, 1280, scheme)
        found.add(browser.execute_script(fill))
    assert len(found) == 2
