"""A rater at a desk and one with a phone: what they see, and that each answer is a line of the file."""

from __future__ import annotations

import itertools
import threading
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

from apt_hooks.results.comparison.ballot import Ballot
from apt_hooks.results.comparison.booth import Booth
from apt_hooks.results.comparison.folders import read_comparison
from apt_hooks.results.comparison.server import Server
from apt_hooks.results.comparison.votes import Vote, read_votes

QUESTIONS = ["subject", "prompt", "prior"]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def ballot(tmp_path: Path) -> Ballot:
    loras = [SECRET + name for name in ("apt", "dco", "dreambooth")]
    return Ballot(read_comparison([write_eval(tmp_path / "eval", loras, seeds=(0,))]), seed=0)


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    return tmp_path / "votes.jsonl"


@pytest.fixture
def url(ballot: Ballot, votes: Path) -> Iterator[str]:
    with Booth(ballot, votes) as booth, Server(0, booth, print) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


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


def test_a_rater_at_a_desk_answers_all_by_keys(driver: Any, url: str, ballot: Ballot, votes: Path) -> None:
    resize(driver, 1400, 900)
    driver.get(url)
    begin(driver, "ann")
    given = []
    for page in range(5):
        for question, criterion in enumerate(QUESTIONS):
            assert shown(driver) == f"page {page + 1} of 5, {criterion}"
            given.append((page + question) % 4)
            press(driver, str(given[-1]))
    assert shown(driver) == "end"
    found = read_votes(votes)
    assert [chosen(vote) for vote in found] == given
    expected = [(s.item.prompt, s.candidates, criterion) for s in ballot.order("ann") for criterion in QUESTIONS]
    assert [(vote.prompt, vote.shown, vote.criterion) for vote in found] == expected
    assert errors(driver) == []
    assert {address.split("/")[2] for address in requests(driver)} == {url.split("/")[2]}
    assert SECRET not in driver.page_source


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
def test_everything_fits_and_is_in_its_place(driver: Any, url: str, ballot: Ballot, width: int, height: int) -> None:
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
    assert (
        ballot.comparison.prompts[ballot.order("ann")[0].item.prompt].plain in driver.find_element(By.ID, "prompt").text
    )
    assert errors(driver) == []


def test_with_a_phone_answers_are_changed_by_going_back_and_a_reload_asks_nothing_again(
    driver: Any, url: str, votes: Path
) -> None:
    resize(driver, 390, 844)
    driver.get(url)
    begin(driver, " bob ")
    for number in (1, 3):
        shown(driver)
        choose(driver, number)
    assert shown(driver) == "page 1 of 5, prior"
    driver.find_element(By.ID, "back").click()
    assert shown(driver) == "page 1 of 5, prompt"
    pressed = driver.find_elements(By.CSS_SELECTOR, "#choices [aria-pressed=true]")
    assert [button.text for button in pressed] == ["3"]
    choose(driver, 0)
    assert shown(driver) == "page 1 of 5, prior"
    driver.refresh()
    assert shown(driver) == "page 1 of 5, prior"
    assert [(vote.rater, vote.criterion, chosen(vote)) for vote in read_votes(votes)] == [
        ("bob", "subject", 1),
        ("bob", "prompt", 3),
        ("bob", "prompt", 0),
    ]
    driver.find_element(By.ID, "rater").click()
    begin(driver, "eve")
    assert shown(driver) == "page 1 of 5, subject"
    assert errors(driver) == []


def test_a_click_enlarges_a_picture_and_keys_rest_meanwhile(driver: Any, url: str, votes: Path) -> None:
    resize(driver, 1400, 900)
    driver.get(url)
    begin(driver, "ann")
    shown(driver)
    small = driver.find_element(By.CSS_SELECTOR, "#candidates figure:nth-child(2) img")
    small.click()
    large = driver.find_element(By.CSS_SELECTOR, "#large img")
    assert large.get_attribute("src") == small.get_attribute("src") and large.rect["width"] > small.rect["width"]
    press(driver, "1")
    large.click()
    assert not large.is_displayed() and votes.read_bytes() == b""


def test_an_answer_that_is_not_saved_is_said_and_the_question_stays(driver: Any, url: str, votes: Path) -> None:
    resize(driver, 1400, 900)
    driver.get(url)
    begin(driver, "ann")
    shown(driver)
    driver.execute_script("form.items[place.page].item = 99")
    press(driver, "2")
    failure = driver.find_element(By.CSS_SELECTOR, "#ask .failure")
    WebDriverWait(driver, 10, 0.02).until(lambda driver: failure.text)
    assert failure.text == "Not done: no such item" and shown(driver) == "page 1 of 5, subject"
    assert not driver.find_elements(By.CSS_SELECTOR, "#choices [aria-pressed=true]") and votes.read_bytes() == b""
    assert [message for message in errors(driver) if "400" not in message] == []
