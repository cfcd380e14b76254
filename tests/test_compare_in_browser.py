"""A rater at a desk and one with a phone: what they see, what their browser keeps, and what they save."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
pytest.importorskip("selenium", reason="selenium is not installed")

from browser import chromium, errors, overflow, requests, resize
from eval_folders import SECRET, write_eval
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from apt_hooks.results.comparison.folders import read_comparison
from apt_hooks.results.comparison.rating import ORDERS, write_page
from apt_hooks.results.comparison.rating_plan import RatingPlan
from apt_hooks.results.comparison.votes import Vote, read_votes

QUESTIONS = ["subject", "prompt", "prior"]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def plan(tmp_path: Path) -> RatingPlan:
    loras = [SECRET + name for name in ("apt", "dco", "dreambooth")]
    return RatingPlan(read_comparison([write_eval(tmp_path / "eval", loras, seeds=(0,))]), seed=0)


@pytest.fixture
def url(driver: Any, plan: RatingPlan, tmp_path: Path) -> str:
    write_page([tmp_path / "eval"], tmp_path / "rate.html", references=None, methods=None, seed=0, say=print)
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    url = (tmp_path / "rate.html").as_uri()
    driver.get(url)
    driver.execute_script("localStorage.clear()")
    driver.get("about:blank")
    return url


def save(driver: Any, file: Path, plan: RatingPlan) -> list[Vote]:
    """The votes in the file that the button which is in view saves."""
    next(button for button in driver.find_elements(By.CLASS_NAME, "save") if button.is_displayed()).click()
    WebDriverWait(driver, 10, 0.02).until(lambda _: file.exists())
    found = read_votes([file], plan.comparison)[file]
    file.unlink()
    return found


def shown(driver: Any) -> str:
    """Page and question, once its pictures are there."""
    script = """
        const loading = [...document.querySelectorAll("#choices button")].some(button => button.disabled);
        if (!document.querySelector("#end").hidden) return "end";
        if (document.querySelector("#page").hidden || loading) return null;
        const { criterion } = document.querySelector("#page").dataset;
        return `${document.querySelector("#progress").textContent}, ${criterion}`;
    """
    found: str = WebDriverWait(driver, 10, 0.02).until(lambda driver: driver.execute_script(script))
    return found


def begin(driver: Any, name: str) -> None:
    driver.find_element(By.ID, "name").send_keys(name, Keys.ENTER)


def press(driver: Any, keys: str) -> None:
    driver.find_element(By.TAG_NAME, "body").send_keys(keys)


def choose(driver: Any, number: int) -> None:
    """By its button; 0: cannot tell."""
    driver.find_elements(By.CSS_SELECTOR, "#choices button")[number - 1].click()


def chosen(vote: Vote) -> int:
    return 0 if vote.chosen is None else vote.shown.index(vote.chosen) + 1


def test_a_rater_at_a_desk_answers_all_by_keys_and_saves_them(driver: Any, url: str, plan: RatingPlan) -> None:
    resize(driver, 1400, 900)
    driver.get(url)
    begin(driver, "ann")
    given = []
    for page in range(5):
        for question, criterion in enumerate(QUESTIONS):
            assert shown(driver) == f"page {page + 1} of 5, {criterion}"
            given.append((page + question) % 4)
            press(driver, str(given[-1]))
    assert shown(driver) == "end" and driver.find_element(By.ID, "file").text == "votes-ann.jsonl"
    found = save(driver, plan.comparison.base.parents[1] / "votes-ann.jsonl", plan)
    assert [chosen(vote) for vote in found] == given and {vote.rater for vote in found} == {"ann"}
    asked = [(vote.prompt, vote.shown, vote.criterion) for vote in found]
    orders = [plan.order(str(number)) for number in range(ORDERS)]
    assert asked in [[(s.item.prompt, s.candidates, name) for s in order for name in QUESTIONS] for order in orders]
    assert errors(driver) == [] and requests(driver) == []
    assert SECRET not in driver.page_source


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
def test_everything_fits_and_is_in_its_place(driver: Any, url: str, plan: RatingPlan, width: int, height: int) -> None:
    resize(driver, width, height)
    driver.get(url)
    begin(driver, "ann")
    assert shown(driver) == "page 1 of 5, subject" and overflow(driver) == 0
    tops = {
        name: driver.find_element(By.CSS_SELECTOR, name).rect
        for name in ("#prompt", "#reference img", "#prior img", "#candidates figure:first-child img", "#ask")
    }
    for above, below in itertools.combinations(
        ["#prompt", "#prior img", "#candidates figure:first-child img", "#ask"], 2
    ):
        assert tops[above]["y"] + tops[above]["height"] <= tops[below]["y"]
    photo, prior = tops["#reference img"], tops["#prior img"]
    assert photo["x"] + photo["width"] <= prior["x"] and abs(photo["y"] - prior["y"]) < prior["height"]
    for image in driver.find_elements(By.CSS_SELECTOR, "#page figure img"):
        assert image.rect["width"] > 100 and image.rect["x"] >= 0 and image.rect["x"] + image.rect["width"] <= width
    assert tops["#ask"]["y"] + tops["#ask"]["height"] == pytest.approx(height, abs=1)  # in view without scrolling
    for button in driver.find_elements(By.CSS_SELECTOR, "#choices button"):
        assert button.rect["height"] >= 44 and button.rect["x"] + button.rect["width"] <= width
    assert driver.find_element(By.ID, "prompt").text[1:-1] in [prompt.plain for prompt in plan.comparison.prompts]
    assert errors(driver) == []


def test_with_a_phone_answers_are_changed_by_going_back_and_a_reload_asks_nothing_again(
    driver: Any, url: str, plan: RatingPlan, tmp_path: Path
) -> None:
    resize(driver, 390, 844)
    driver.get(url)
    begin(driver, " Zoë  B. ")
    for number in (1, 3):
        shown(driver)
        choose(driver, number)
    assert shown(driver) == "page 1 of 5, prior"
    driver.find_element(By.ID, "back").click()
    assert shown(driver) == "page 1 of 5, prompt"
    pressed = driver.find_elements(By.CSS_SELECTOR, "#choices [aria-pressed=true]")
    assert [button.text for button in pressed] == ["3"]
    choose(driver, 0)
    assert shown(driver) == "page 1 of 5, prior" and overflow(driver) == 0
    expected = [("Zoë B.", "subject", 1), ("Zoë B.", "prompt", 0)]
    for _ in range(2):
        found = save(driver, tmp_path / "votes-Zoë_B_.jsonl", plan)
        assert [(vote.rater, vote.criterion, chosen(vote)) for vote in found] == expected
        driver.refresh()
        assert shown(driver) == "page 1 of 5, prior"
    driver.find_element(By.ID, "rater").click()
    begin(driver, "eve")
    assert shown(driver) == "page 1 of 5, subject"
    assert save(driver, tmp_path / "votes-eve.jsonl", plan) == []
    assert errors(driver) == []


def test_raters_of_other_names_see_other_orders(driver: Any, url: str) -> None:
    driver.get(url)
    script = (
        """const found = {}; for (const name of arguments[0]) found[orderOf(name)] = 1; return Object.keys(found)"""
    )
    taken = driver.execute_script(script, [f"rater {number}" for number in range(1000)])
    assert {*map(int, taken)} == {*range(ORDERS)}


def test_an_address_that_ends_in_no_name_begins_with_the_first_view(driver: Any, url: str) -> None:
    driver.get(f"{url}#%E0%A4%A")
    assert driver.find_element(By.ID, "name").is_displayed() and errors(driver) == []
    begin(driver, "kim")
    assert shown(driver) == "page 1 of 5, subject"


def test_a_click_enlarges_a_picture_and_keys_rest_meanwhile(driver: Any, url: str) -> None:
    resize(driver, 1400, 900)
    driver.get(url)
    begin(driver, "Ann 2")
    shown(driver)
    small = driver.find_element(By.CSS_SELECTOR, "#candidates figure:nth-child(2) img")
    small.click()
    large = driver.find_element(By.CSS_SELECTOR, "#large img")
    assert large.get_attribute("src") == small.get_attribute("src") and large.rect["width"] > small.rect["width"]
    press(driver, "1")
    large.click()
    assert not large.is_displayed() and shown(driver) == "page 1 of 5, subject"


def test_what_is_in_no_file_yet_is_asked_about_before_it_is_left(
    driver: Any, url: str, plan: RatingPlan, tmp_path: Path
) -> None:
    driver.get(url)
    begin(driver, "tom")
    shown(driver)
    press(driver, "2")
    shown(driver)
    driver.find_element(By.ID, "rater").click()
    driver.switch_to.alert.dismiss()
    assert shown(driver) == "page 1 of 5, prompt"
    # WebDriver itself says yes to the browser's question.
    script = "const e = new Event('beforeunload', {cancelable: true}); dispatchEvent(e); return e.defaultPrevented"
    assert driver.execute_script(script)
    assert [chosen(vote) for vote in save(driver, tmp_path / "votes-tom.jsonl", plan)] == [2]
    assert not driver.execute_script(script)


def test_a_browser_that_keeps_nothing_says_so_and_votes_can_be_saved(
    driver: Any, url: str, plan: RatingPlan, tmp_path: Path
) -> None:
    driver.get(url)
    driver.execute_script("Storage.prototype.setItem = () => { throw new DOMException('full') }")
    begin(driver, "max")
    shown(driver)
    press(driver, "1")
    assert shown(driver) == "page 1 of 5, prompt"
    failure = driver.find_element(By.CSS_SELECTOR, "#ask .failure")
    assert failure.text == "This browser keeps nothing: save your votes before you close this page."
    assert [chosen(vote) for vote in save(driver, tmp_path / "votes-max.jsonl", plan)] == [1]


def failure(driver: Any) -> str:
    text: str = driver.find_element(By.CSS_SELECTOR, "#ask .failure").text
    return text


def test_votes_that_cannot_be_read_again_are_not_written_over_and_the_rater_is_told(
    driver: Any, url: str, plan: RatingPlan, tmp_path: Path
) -> None:
    driver.get(url)
    cut_off = '{"cut off'
    driver.execute_script("rater = 'sue'; localStorage.setItem(drawer(), arguments[0])", cut_off)
    driver.refresh()
    begin(driver, "sue")
    told = (
        "What this browser has kept of this name cannot be read: go on under another (the button with your name), or "
        "save your votes before you close this page."
    )
    assert shown(driver) == "page 1 of 5, subject" and failure(driver) == told
    press(driver, "3")
    assert shown(driver) == "page 1 of 5, prompt" and failure(driver) == told
    press(driver, Keys.ARROW_LEFT)
    assert shown(driver) == "page 1 of 5, subject" and failure(driver) == told
    driver.find_element(By.ID, "rater").click()
    assert "and this browser does not keep them" in driver.switch_to.alert.text
    driver.switch_to.alert.dismiss()
    assert driver.execute_script("return localStorage.getItem(drawer())") == cut_off
    assert [chosen(vote) for vote in save(driver, tmp_path / "votes-sue.jsonl", plan)] == [3]
    driver.find_element(By.ID, "rater").click()
    begin(driver, "sam")
    assert shown(driver) == "page 1 of 5, subject" and failure(driver) == ""


def test_what_is_kept_and_is_no_vote_of_this_page_is_left_as_it_is(driver: Any, url: str) -> None:
    driver.get(url)
    begin(driver, "ida")
    shown(driver)
    press(driver, "2")
    shown(driver)
    script = "const text = JSON.stringify(arguments[0]); localStorage.setItem(drawer(), text); keep(); "
    script += "return [localStorage.getItem(drawer()) === text, unkept !== '']"
    prior, answers = next(iter(driver.execute_script("return JSON.parse(localStorage.getItem(drawer()))").items()))
    ((criterion, vote),) = answers.items()
    strange: list[Any] = ["hello", 5, [1, 2], {prior: "abc"}, {prior: [vote]}, {prior: {criterion: None}}]
    strange += [{prior: {criterion: {**vote, "choice": "bogus"}}}, {prior: {criterion: {"choice": vote["choice"]}}}]
    strange += [{prior: {"bogus": vote}}, {"zzz": answers}, {prior: answers, "zzz": answers}]
    for kept in strange:
        assert driver.execute_script(script, kept) == [True, True], kept
    for kept in (None, {}, {prior: answers}, {prior: {criterion: {**vote, "choice": None}}}):
        assert driver.execute_script(script, kept)[1] is False, kept


@pytest.fixture
def tabs(driver: Any) -> Iterator[tuple[str, str]]:
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    second = driver.current_window_handle
    driver.switch_to.window(first)
    yield first, second
    driver.switch_to.window(second)
    driver.close()
    driver.switch_to.window(first)


def test_votes_of_the_same_rater_in_two_tabs_are_all_kept_and_the_later_counts(
    driver: Any, url: str, plan: RatingPlan, tmp_path: Path, tabs: tuple[str, str]
) -> None:
    first, second = tabs
    file = tmp_path / "votes-liz.jsonl"

    def answers() -> list[tuple[str, int]]:
        return [(vote.criterion, chosen(vote)) for vote in save(driver, file, plan)]

    for tab in tabs:
        driver.switch_to.window(tab)
        driver.get(url)
        begin(driver, "liz")
        assert shown(driver) == "page 1 of 5, subject"
    for answer in ("1", "2"):
        shown(driver)
        press(driver, answer)
    assert shown(driver) == "page 1 of 5, prior"
    driver.switch_to.window(first)  # in which nothing has been answered
    assert answers() == [("subject", 1), ("prompt", 2)]
    press(driver, "0")
    assert shown(driver) == "page 1 of 5, prior"
    driver.switch_to.window(second)  # that knows the first tab's answer as soon as it saves, or has one of its own
    press(driver, "3")
    assert shown(driver) == "page 2 of 5, subject"
    wanted = [("subject", 0), ("prompt", 2), ("prior", 3)]
    assert answers() == wanted
    for tab in tabs:
        driver.switch_to.window(tab)
        assert answers() == wanted
        driver.refresh()
        assert shown(driver) == "page 2 of 5, subject"
