"""The report in a browser: plots are drawn, pictures are there, nothing is fetched, and a phone shows it all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from step_logs import checkpoint, start, step, write

BINS = (0.9, 0.7, 0.5, 0.2)
GAPS, DRIFTS = (0.02, 0.04, 0.05, 0.052, 0.054, 0.055), (0.8, 1.6, 2.0, 3.0, 4.0, 5.0)  # the third is picked
PROMPTS = ["a photo of sks dog on a mountain trail in thick fog, seen from far away, with a river deep below"]
RUNS = ("lora", "plain <b>&", "a_name_without_an_end_" * 4)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, one resumed and with checkpoints and sample pictures, one older."""
    pytest.importorskip("plotly")
    image = pytest.importorskip("PIL.Image")
    from apt_hooks.results.report.page import run_report

    folder = tmp_path_factory.mktemp("runs")
    steps = [step(i, [gamma * i / 60 for gamma in BINS]) for i in range(1, 61)]
    write(folder / f"{RUNS[0]}-apt.jsonl", [start(), *steps[:30], start(30, sample_prompts=PROMPTS), *steps[30:]])
    saved = [checkpoint(10 * k, gap, drift) for k, (gap, drift) in enumerate(zip(GAPS, DRIFTS, strict=True), 1)]
    write(folder / f"{RUNS[0]}-checkpoints.jsonl", [{"run": {"class": "a photo of a dog"}}, *saved])
    write(folder / f"{RUNS[1]}-apt.jsonl", [start(config={"objective": "dreambooth"}), *steps])
    write(folder / f"{RUNS[2]}-apt.jsonl", steps[:40])
    (folder / "sample").mkdir()
    for number in range(10, 70, 10):
        picture = image.new("RGB", (300, 400), (4 * number, 90, 90))
        picture.save(folder / "sample" / f"{RUNS[0]}_{number:06d}_00_202611222300{number}_7.png")
    out = folder / "report.html"
    run_report([folder], out, say=lambda _: None)
    return out


class Shown:
    """The report in a browser; it is opened anew only for another width, or after a test has changed what it shows."""

    def __init__(self, driver: Any, report: Path) -> None:
        self.driver, self.report, self.width = driver, report, 0

    def at(self, width: int) -> Any:
        from selenium.webdriver.support.wait import WebDriverWait

        if width != self.width:
            self.width = width
            browser.resize(self.driver, width, 900)
            self.driver.get(self.report.as_uri())
            drawn = (
                "return [...document.querySelectorAll('.chart')].every(chart => chart.querySelector('path.js-line'))"
            )
            WebDriverWait(self.driver, 20, poll_frequency=0.1).until(lambda _: self.driver.execute_script(drawn))
        return self.driver


@pytest.fixture(scope="module")
def shown(report: Path) -> Iterator[Shown]:
    with browser.chromium() as driver:
        yield Shown(driver, report)


@pytest.fixture(params=[1400])
def page(shown: Shown, request: pytest.FixtureRequest) -> Any:
    """The report with all plots drawn, to look at: on a screen, or as wide as the test is parametrized."""
    return shown.at(request.param)


@pytest.fixture
def own_page(shown: Shown) -> Iterator[Any]:
    """The report on a screen, for a test that changes what it shows."""
    yield shown.at(1400)
    shown.width = 0


def lines(page: Any, within: str) -> list[str]:
    """The paths of the lines drawn there."""
    script = "return [...document.querySelectorAll(arguments[0])].map(path => path.getAttribute('d'))"
    return [path for path in page.execute_script(script, f"{within} .scatterlayer path.js-line") if path]


def texts(page: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
    return list(page.execute_script(script, selector))


def test_a_line_is_drawn_for_each_run_and_bin(page: Any) -> None:
    for i in range(3):
        assert len(set(lines(page, f"#plot-gamma-{i}"))) == len(BINS) + 1  # and their mean
        assert len(lines(page, f"#plot-loss-{i}")) == 4
    assert len(lines(page, "#plot-delta")) == 6  # of each run the steps and their mean
    assert len(lines(page, "#plot-augmented")) == 6
    assert all("L" in path for path in lines(page, "#gamma"))


def test_headings_name_questions_and_runs_as_text(page: Any) -> None:
    assert texts(page, "h2") == [
        "Which checkpoint?",
        "Did it overfit?",
        "Gamma: where and when it overfits",
        "Delta noise: how far it has moved from the base model",
        "Losses",
        "What APT did",
        "How they were trained",
    ]
    names = sorted(RUNS)
    assert texts(page, "#gamma h3") == texts(page, "#summary h3") == texts(page, "#losses h3") == names
    assert texts(page, ".run > h3") == names
    assert texts(page, "#delta-noise .key button") == names
    assert texts(page, "b") == []


def test_a_resumption_is_marked(page: Any) -> None:
    script = """
return [...document.querySelectorAll('#gamma .chart')].map(plot => plot.querySelectorAll('.shapelayer path').length)"""
    assert page.execute_script(script) == [int(name == "lora") for name in sorted(RUNS)]


def test_sample_pictures_are_shown(page: Any) -> None:
    script = (
        "return [...document.images].map(picture => [picture.complete, picture.naturalWidth, picture.naturalHeight])"
    )
    assert page.execute_script(script) == [[True, 192, 256]] * 6
    assert texts(page, ".samples thead th")[1:3] == [
        "step 20lora-step00000020gamma 0.19",
        "pickedstep 30lora-step00000030gamma 0.29",
    ]
    assert texts(page, ".samples tbody th") == [f"00 {PROMPTS[0]}"]


def test_the_picked_checkpoint_is_marked_in_plots_table_and_pictures(page: Any) -> None:
    assert texts(page, ".verdict")[0].startswith("Step 30 (lora-step00000030.safetensors): ")
    for plot, count in (("#plot-gap-1", 1), ("#plot-drift-1", 2)):  # class drift and free drift
        assert len(lines(page, plot)) == count and texts(page, f"{plot} .annotation-text") == ["picked"]
        assert len(page.find_elements("css selector", f"{plot} .shapelayer path")) == 1
    assert texts(page, "tr.picked td")[0] == "30" and len(texts(page, ".numbers tbody tr")) == 6
    assert len(page.find_elements("css selector", ".samples td.picked img")) == 1


@pytest.mark.parametrize("page", [390], indirect=True)
def test_on_a_phone_the_picked_pictures_and_the_prompt_are_in_sight(page: Any) -> None:
    script = """
return [...document.querySelectorAll('.samples td.picked, .samples tbody th span')]
  .map(element => element.getBoundingClientRect()).map(place => [place.left, place.right])"""
    places = page.execute_script(script)
    assert len(places) == 2 and all(left >= 0 and right <= 390 for left, right in places)


def test_nothing_is_fetched_and_nothing_complained_about(page: Any) -> None:
    assert browser.requests(page) == []
    assert browser.errors(page) == []


def test_a_click_in_a_legend_hides_lines_and_shows_them_again(own_page: Any) -> None:
    button = own_page.find_element("css selector", "#gamma .key button")
    before = len(lines(own_page, "#gamma"))
    for count, pressed in ((before - 3, "false"), (before, "true")):
        button.click()
        assert len(lines(own_page, "#gamma")) == count and button.get_attribute("aria-pressed") == pressed
    own_page.find_element("css selector", "#delta-noise .key button").click()
    assert len(lines(own_page, "#plot-delta")) == 4 and len(lines(own_page, "#plot-augmented")) == 6


def test_looking_closer_in_one_plot_does_so_in_all(own_page: Any) -> None:
    script = """
const done = arguments[0], plots = [...document.querySelectorAll('.chart')];
Plotly.relayout(plots[1], {'xaxis.range': [5, 25]})
  .then(() => setTimeout(() => done(plots.map(plot => plot.layout.xaxis.range)), 300));"""
    assert own_page.execute_async_script(script) == [[5, 25]] * len(texts(own_page, ".chart"))


@pytest.mark.parametrize("page", [1400, 390], indirect=True)
def test_the_page_is_as_wide_as_the_screen(page: Any) -> None:
    assert browser.overflow(page) <= 0
    script = """
const wide = document.documentElement.clientWidth;
return [...document.querySelectorAll('.chart, .main-svg, .card, p, button')]
  .filter(element => element.getBoundingClientRect().right > wide + 0.5)
  .map(element => element.outerHTML.slice(0, 80))"""
    assert page.execute_script(script) == []


@pytest.mark.parametrize("page", [390], indirect=True)
def test_on_a_phone_plots_are_one_below_the_other_and_large_enough(page: Any) -> None:
    script = """
return [...document.querySelectorAll('.chart')]
  .map(plot => plot.getBoundingClientRect()).map(place => [place.left, place.width])"""
    places = page.execute_script(script)
    assert len({left for left, _ in places}) == 1 and all(width > 340 for _, width in places)


def test_on_paper_plots_become_as_wide_as_the_page_and_return(own_page: Any) -> None:
    script = (
        "return Math.max(...[...document.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect().width))"
    )
    assert own_page.execute_script(script) > 1000
    own_page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert 300 < own_page.execute_script(script) <= 700
    own_page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert own_page.execute_script(script) > 1000
