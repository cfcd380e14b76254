"""Folders side by side, what raters see and do not see, their votes, and what these come to."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from eval_folders import PROMPTS, SAMPLING, SECRET, color_of, write_eval
from PIL import Image

from apt_hooks import AptError
from apt_hooks.results.comparison.folders import read_comparison
from apt_hooks.results.comparison.grid import box_of, choose_rows, run_grid
from apt_hooks.results.comparison.intervals import share_interval, student_t, wilson
from apt_hooks.results.comparison.rating import ORDERS, write_page
from apt_hooks.results.comparison.rating_plan import QUESTIONS, RatingPlan, picture_ids
from apt_hooks.results.comparison.result import count_votes, run_votes, table
from apt_hooks.results.comparison.votes import Vote, last_votes, read_votes

APT, DCO, DREAMBOOTH = (SECRET + name for name in ("apt", "dco", "dreambooth"))


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return write_eval(tmp_path / "eval", [APT, DCO, DREAMBOOTH])


def refused(message: str, *folders: Path, **options: Any) -> None:
    with pytest.raises(AptError, match=message) as error:
        read_comparison(folders, **options)
    assert "\n" not in str(error.value)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folders_of_equal_prompts_seeds_and_sampling_are_one_comparison(tmp_path: Path) -> None:
    first, second = write_eval(tmp_path / "a", ["dco"]), write_eval(tmp_path / "b", ["apt"], seeds=(1, 0))
    found = read_comparison([first, second])
    assert found.seeds == (0, 1) and [prompt.plain for prompt in found.prompts] == [f"a backpack {p}" for p in PROMPTS]
    assert found.picture("apt", 3, 1) == second / "apt" / "003-1.png"
    assert found.picture("dco", 0, 0) == first / "dco" / "000-0.png"
    assert found.picture(None, 2, 0) == first / "base" / "002-0.png"
    assert [path.name for path in found.references] == ["0.jpg", "1.jpg"]


def test_methods_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_eval(tmp_path / "one" / "eval", ["apt", "dco"]), write_eval(tmp_path / "two" / "eval", ["apt"])]
    photos = tmp_path / "one" / "photos"
    found = read_comparison(folders, references=photos)
    assert list(found.methods) == ["apt (one/eval)", "dco", "apt (two/eval)"]
    assert found.picture("apt (two/eval)", 0, 0) == folders[1] / "apt" / "000-0.png"

    # A LoRA that has the name which would be given to another one.
    same = [write_eval(tmp_path / name, ["apt"]) for name in ("a", "b")]
    refused(r"c: has a LoRA 'apt \(a\)', a name that another one has", *same, write_eval(tmp_path / "c", ["apt (a)"]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "sdxl"}, "b: model 'sdxl', but 'sd15' in .*a; .* run `apt-hooks eval` anew"),
        ({"seeds": [0, 1, 2]}, "b: seeds 0, 1, 2, but 0, 1 in .*a"),
        ({"prompts": [{"prompt": "a", "plain": "b"}]}, "b: 1 prompts, but 5 in .*a"),
        ({"sampling": {**SAMPLING, "steps": 30}}, "b: sampling with steps 30, but 50 in .*a"),
        ({"sampling": {**SAMPLING, "eta": 1.0}}, "b: sampling with eta 1.0, but None in .*a"),
    ],
)
def test_folders_that_differ_in_more_than_their_loras_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    refused(message, write_eval(tmp_path / "a", ["dco"]), write_eval(tmp_path / "b", ["apt"], **changed))


def test_the_prompt_that_differs_is_named(tmp_path: Path) -> None:
    first = write_eval(tmp_path / "a", ["dco"])
    prompts = json.loads((first / "manifest.json").read_text())["prompts"]
    prompts[3]["plain"] = "a bag"
    second = write_eval(tmp_path / "b", ["apt"], prompts=prompts)
    refused("b: the plain prompt 3 is 'a bag', but 'a backpack in a city' in .*a", first, second)
    prompts[1]["prompt"] = "a sks bag"
    third = write_eval(tmp_path / "c", ["apt"], prompts=prompts)
    refused("c: prompt 1 is 'a sks bag', but 'a sks backpack on the beach' in .*a", first, third)


def test_photos_of_another_subject_are_refused_unless_they_are_named(tmp_path: Path) -> None:
    folders = write_eval(tmp_path / "one" / "a", ["dco"]), write_eval(tmp_path / "two" / "b", ["apt"])
    refused("b: names other reference photos than .*a; .*--references", *folders)
    assert read_comparison(folders, references=tmp_path / "two" / "photos").references[0].parent.parent.name == "two"
    (tmp_path / "one" / "photos" / "1.jpg").unlink()
    refused(r"a: 1 of its 2 reference photos are gone, first .*1\.jpg; .*--references", folders[0])
    refused("--references .*nowhere: no such folder", folders[0], references=tmp_path / "nowhere")


def test_pictures_that_are_missing_are_counted_with_the_way_out(evaluation: Path) -> None:
    for name in (f"{DCO}/003-1.png", f"{APT}/000-0.png", f"{APT}/000-1.png"):
        (evaluation / name).unlink()
    refused(r"3 of 40 pictures are missing, first .*apt/000-0\.png; run the same `apt-hooks eval` command", evaluation)
    assert [*read_comparison([evaluation], methods=[DREAMBOOTH]).methods] == [DREAMBOOTH]
    (evaluation / "base" / "004-1.png").unlink()
    refused(r"1 of 20 pictures are missing, first .*base/004-1\.png", evaluation, methods=[DREAMBOOTH])


def test_methods_are_chosen_by_name(evaluation: Path) -> None:
    assert list(read_comparison([evaluation], methods=[DREAMBOOTH, APT]).methods) == [DREAMBOOTH, APT]
    refused("--methods: no method 'lora'; there are trained-by-apt, ", evaluation, methods=["lora"])
    refused("--methods: a method is named twice", evaluation, methods=[APT, APT])


def test_what_is_no_folder_of_eval_is_named(tmp_path: Path, evaluation: Path) -> None:
    refused("one or more folders")
    refused("a folder is named twice", evaluation, evaluation / ".." / "eval")
    refused(
        r"nowhere.manifest\.json: cannot be read: .*; name a folder that `apt-hooks eval` wrote", tmp_path / "nowhere"
    )
    manifest = evaluation / "manifest.json"
    good = json.loads(manifest.read_text())
    for broken, message in (
        ({**good, "format": 2}, "must have format 1; found 2"),
        ([good], "must have format 1; found None"),
        ({**good, "prompts": ["a"]}, "is no manifest"),
        ({**good, "model": None}, "is no manifest .*None is no text"),
        ({**good, "seeds": []}, r"must have prompts and seeds; found 5 and \(\)"),
        ({**good, "loras": {}}, "has no LoRA to compare"),
        ({**good, "loras": {"../../etc": ""}}, r"must have a folder's name other than 'base'; found '\.\./\.\./etc'"),
        ({**good, "loras": {"base": ""}}, "found 'base'"),
        ({key: value for key, value in good.items() if key != "sampling"}, "is no manifest .*KeyError: 'sampling'"),
    ):
        manifest.write_text(json.dumps(broken))
        refused(message, evaluation)
    manifest.write_text("{")
    refused("manifest.json: is no JSON", evaluation)


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_rows_are_spread_over_the_prompts_and_take_the_seeds_in_turn() -> None:
    assert choose_rows(25, [3, 4], 4) == [(0, 3), (8, 4), (16, 3), (24, 4)]
    assert choose_rows(3, [7], 10) == [(0, 7), (1, 7), (2, 7)]
    assert choose_rows(5, [7], 1) == [(0, 7)]


def test_the_grid_shows_every_method_in_its_column(evaluation: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said: list[str] = []
    path = run_grid([evaluation], tmp_path / "out", references=None, rows=2, say=said.append)
    assert path == tmp_path / "out" / "grid.png" and said[0].startswith("2 of 5 prompts") and str(path) in said[0]
    picture = Image.open(path).convert("RGB")
    colors = [color for _, color in picture.getcolors(picture.width * picture.height)]
    drawn = [color_of(method, *row) for row in ((0, 0), (4, 1)) for method in ("base", APT, DCO, DREAMBOOTH)]
    assert {*drawn} <= {*colors}
    found = [min(x for x in range(picture.width) if picture.getpixel((x, 100)) == color) for color in drawn[:4]]
    assert found == sorted(found) and len({*found}) == 4
    alone = run_grid([evaluation], tmp_path / "new" / "a.PNG", references=None, rows=9, say=print)
    assert alone.is_file() and Image.open(alone).height > picture.height


def test_a_grid_of_large_pictures_is_of_a_size_to_send_around(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = write_eval(tmp_path / "e", ["apt"], side=1024, seeds=(0,))
    assert Image.open(run_grid([folder], tmp_path, references=None, rows=5, say=print)).size == (
        270 + 3 * 328,
        46 + 5 * 328,
    )
    assert box_of((1024, 1024), 25 * 8) == (200, 200) and box_of((64, 32), 4) == (160, 80)


def test_a_grid_that_cannot_be_drawn_says_why(evaluation: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(AptError, match="--rows must be at least 1; found 0"):
        run_grid([evaluation], tmp_path, references=None, rows=0, say=print)
    (evaluation / APT / "000-0.png").write_bytes(b"no picture")
    with pytest.raises(AptError, match=r"000-0\.png: cannot be read as a picture"):
        run_grid([evaluation], tmp_path, references=None, rows=1, say=print)
    assert not (tmp_path / "grid.png").exists()


# -- the plan --------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(evaluation: Path) -> RatingPlan:
    return RatingPlan(read_comparison([evaluation]), seed=0)


def test_a_rater_finds_the_same_order_again_and_another_rater_another_one(evaluation: Path, plan: RatingPlan) -> None:
    again = RatingPlan(read_comparison([evaluation]), seed=0)
    assert plan.order("ann") == again.order("ann")
    assert plan.order("ann") != plan.order("bob")
    assert plan.order("ann") != RatingPlan(read_comparison([evaluation]), seed=1).order("ann")
    assert {shown.item for shown in plan.order("ann")} == {*plan.items} and len(plan.items) == 10
    assert all(sorted(shown.candidates) == [APT, DCO, DREAMBOOTH] for shown in plan.order("ann"))


def test_every_method_is_at_every_place_equally_often_for_each_rater(plan: RatingPlan) -> None:
    for rater in map(str, range(20)):
        first_nine = [shown.candidates for shown in plan.order(rater)][:9]
        assert Counter((place, method) for shown in first_nine for place, method in enumerate(shown)) == {
            (place, method): 3 for place in range(3) for method in plan.methods
        }


def test_neither_items_nor_candidates_have_a_favored_order_over_raters(plan: RatingPlan) -> None:
    orders = [plan.order(f"rater {number}") for number in range(1200)]
    first_items = Counter(order[0].item for order in orders)
    assert len(first_items) == 10 and max(first_items.values()) < 170  # 120 each, give or take 10
    arrangements = Counter(order[4].candidates for order in orders)
    assert len(arrangements) == 6 and max(arrangements.values()) < 260  # 200 each, give or take 13


def test_raters_compare_two_to_six_methods_with_a_photo(evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(AptError, match=r"2 to 6 methods, found 1 \(trained-by-apt\)"):
        RatingPlan(read_comparison([evaluation], methods=[APT]), 0)
    many = read_comparison([write_eval(tmp_path / "many", [f"m{i}" for i in range(7)])])
    with pytest.raises(AptError, match=r"2 to 6 methods, found 7 .*--methods"):
        RatingPlan(many, 0)
    with pytest.raises(AptError, match=r"need a photo of the subject .*--references"):
        RatingPlan(dataclasses.replace(read_comparison([evaluation]), references=()), 0)


# -- votes -------------------------------------------------------------------------------------------------------------


def vote(chosen: str | None = "a", **changed: Any) -> Vote:
    fields = {"rater": "ann", "prompt": 0, "seed": 1, "criterion": "subject", "shown": ("b", "a")}
    return Vote(**{**fields, "chosen": chosen, "time": "2025-01-01T00:00:00.000Z", **changed})


def save(path: Path, plan: RatingPlan, *votes: Vote) -> Path:
    """A file as a rater's page saves it, with votes on pictures of a plan."""
    ids = picture_ids(plan.comparison)
    lines = []
    for one in votes:
        of = {method: ids[one.prompt, one.seed, method] for method in one.shown}
        chosen = None if one.chosen is None else of[one.chosen]
        answer = {"rater": one.rater, "criterion": one.criterion, "shown": [*of.values()], "chosen": chosen}
        lines.append(json.dumps({**answer, "time": one.time}) + "\n")
    path.write_text("".join(lines))
    return path


def test_votes_are_read_back_to_methods(plan: RatingPlan, tmp_path: Path) -> None:
    given = [
        vote(APT, shown=(DCO, APT, DREAMBOOTH)),
        vote(None, shown=(APT, DCO), criterion="prior", rater="Zoë", prompt=4, seed=0),
    ]
    path, empty = save(tmp_path / "a.jsonl", plan, *given), save(tmp_path / "b.jsonl", plan)
    assert read_votes([path, empty], plan.comparison) == {path: given, empty: []}


def test_a_later_answer_replaces_an_earlier_one_whatever_file_is_named_first() -> None:
    late, early = vote("a", time="2025-01-02T00:00:00.000Z"), vote("b")
    other = vote(None, rater="Zoë")
    assert {*last_votes([late, early, other])} == {*last_votes([other, early, late])} == {late, other}


def test_a_line_that_is_no_vote_is_named(plan: RatingPlan, tmp_path: Path) -> None:
    path = save(tmp_path / "votes.jsonl", plan, vote(APT, shown=(DCO, APT)))
    good = json.loads(path.read_text())
    one, _ = good["shown"]
    no_vote = [
        *("step 1", "{}", "[1]", "7", json.dumps(good)[:-9], "[" * 100_000),
        *({**good, "chosen": "x"}, {**good, "rater": 1}, {**good, "shown": "ab"}, {**good, "shown": [one, one]}),
        *({**good, "shown": [{}, one]}, {**good, "shown": [one], "chosen": one}),
    ]
    for bad in no_vote:
        text = bad if isinstance(bad, str) else json.dumps(bad)
        path.write_text(f"{json.dumps(good)}\n{text}\n")
        with pytest.raises(AptError, match=r"votes\.jsonl: line 2 is no vote; found") as caught:
            read_votes([path], plan.comparison)
        assert "\n" not in str(caught.value)
    with pytest.raises(AptError, match=r"none\.jsonl: cannot be read: No such file"):
        read_votes([tmp_path / "none.jsonl"], plan.comparison)


def test_votes_on_other_pictures_are_not_mixed_with_these(plan: RatingPlan, tmp_path: Path, evaluation: Path) -> None:
    ids, path = picture_ids(plan.comparison), tmp_path / "votes.jsonl"
    first, other, prior = ids[0, 0, APT], ids[1, 0, DCO], ids[0, 0, None]
    for shown in ([first, other], [first, prior], [first, "x"], [1, 2]):
        path.write_text(json.dumps({"rater": "a", "criterion": "b", "shown": shown, "chosen": None, "time": ""}))
        with pytest.raises(AptError, match=r"votes\.jsonl: line 1 is a vote on other pictures than these; name the"):
            read_votes([path], plan.comparison)
    save(path, plan, vote(APT, shown=(DCO, APT)))
    Image.new("RGB", (64, 64), "white").save(evaluation / APT / "000-1.png")  # drawn anew since
    with pytest.raises(AptError, match="a vote on other pictures than these"):
        read_votes([path], plan.comparison)


# -- intervals and the result ------------------------------------------------------------------------------------------


def test_students_t_is_that_of_tables() -> None:
    for degrees, t in ((1, 12.7062), (2, 4.30265), (5, 2.57058), (24, 2.06390), (100, 1.98397), (1e6, 1.95997)):
        assert student_t(degrees) == pytest.approx(t, rel=2e-6)
    assert student_t(1.5) == pytest.approx(6.01666, rel=1e-4)


def test_without_scipy_its_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(AptError, match=r'need scipy .*: pip install "apt-hooks\[eval\]"'):
        count_votes(study())


def test_wilsons_interval_by_hand() -> None:
    # z = 2, n = 12, p = 1/2: (1/2 + 1/6) / (4/3) = 1/2, give or take 2 sqrt(1/48 + 1/144) / (4/3) = 1/4
    assert wilson(0.5, 12, 2) == pytest.approx((0.25, 0.75))
    assert wilson(1, 12, 2) == pytest.approx((0.75, 1)) and wilson(0, 12, 2) == pytest.approx((0, 0.25))


def test_votes_of_one_rater_by_hand() -> None:
    # Prompts 0 and 1 with two votes each: errors 1/2 and 1/2, -1/2 and -1/2; so V = 2/1 (1 + 1) / 16 = 1/4, n' = 1.
    assert share_interval([True, True, False, False], ["r"] * 4, [0, 0, 1, 1]) == wilson(0.5, 1, student_t(1))
    # Each prompt half and half: V = 0, which is no more than 4 votes.
    assert share_interval([True, False, True, False], ["r"] * 4, [0, 0, 1, 1]) == wilson(0.5, 4, student_t(1))


def test_votes_of_two_raters_by_hand() -> None:
    # Rater a says yes, b no, on prompts 0 to 2: sums of errors are 3/2 and -3/2 by rater, 0 by prompt.
    # V = 2/1 (9/4 + 9/4) / 36 = 1/4 of the raters, 0 of the prompts, so n' = 1, with one degree of freedom.
    chosen, raters = [True] * 3 + [False] * 3, ["a"] * 3 + ["b"] * 3
    assert share_interval(chosen, raters, [0, 1, 2] * 2) == wilson(0.5, 1, student_t(1))


def test_votes_that_all_agree_still_leave_a_doubt() -> None:
    low, high = share_interval([True] * 40, ["a"] * 20 + ["b"] * 20, [*range(10)] * 4)
    assert (low, high) == wilson(1, 10, student_t(9)) and 0.6 < low < 0.7 and high == 1
    assert share_interval([True, False], ["a", "b"], [3, 3]) == (0, 1)  # of one prompt: nothing about others


def simulated(chance: random.Random, raters: int, prompts: int, seeds: int) -> tuple[list[bool], list[str], list[int]]:
    of_raters, of_prompts = ([chance.gauss(0, 0.7) for _ in range(n)] for n in (raters, prompts))
    votes = [(r, p) for r in range(raters) for p in range(prompts) for _ in range(seeds)]
    chosen = [chance.random() < 1 / (1 + math.exp(-0.3 - of_raters[r] - of_prompts[p])) for r, p in votes]
    return chosen, [str(r) for r, _ in votes], [p for _, p in votes]


def test_the_interval_holds_the_true_share_of_votes_in_about_95_of_100_studies() -> None:
    chance = random.Random(0)
    logits = [0.3 + chance.gauss(0, math.hypot(0.7, 0.7)) for _ in range(20_000)]
    truth = statistics.fmean(1 / (1 + math.exp(-logit)) for logit in logits)
    held = naive = 0
    for _ in range(300):
        chosen, raters, prompts = simulated(chance, raters=6, prompts=12, seeds=3)
        low, high = share_interval(chosen, raters, prompts)
        held += low <= truth <= high
        low, high = wilson(sum(chosen) / len(chosen), len(chosen), 1.96)
        naive += low <= truth <= high
    assert 0.91 < held / 300 < 0.98
    assert naive / 300 < 0.7  # as if all votes were independent


def study() -> list[Vote]:
    """Two raters, four prompts, two seeds: apt is chosen 8 times, dco 4 times, none 4 times; one vote is replaced."""
    votes = []
    for rater in ("ann", "bob"):
        for prompt in range(4):
            for seed in (0, 1):
                chosen = "apt" if seed else ("dco" if prompt % 2 else None)
                votes.append(vote(chosen, rater=rater, prompt=prompt, seed=seed, shown=("apt", "dco", "db")))
    return [dataclasses.replace(votes[0], chosen="db", time=""), *votes]


def test_shares_are_of_all_answers_and_the_last_vote_counts() -> None:
    (result,) = count_votes([*study(), vote("a", criterion="prior")])[:1]
    assert {method: share.share for method, share in result.shares.items()} == {"apt": 0.5, "dco": 0.25, "db": 0.0}
    assert result.ties.share == 0.25
    assert (result.votes, result.raters, result.prompts, result.items) == (16, 2, 4, 8)
    counted = [vote for vote in study() if vote.chosen != "db"]
    raters, prompts = [v.rater for v in counted], [v.prompt for v in counted]
    expected = share_interval([v.chosen == "dco" for v in counted], raters, prompts)
    assert (result.shares["dco"].low, result.shares["dco"].high) == expected
    assert all(share.low <= share.share <= share.high for share in result.shares.values())


def test_the_result_is_a_table_of_methods_and_criteria(tmp_path: Path) -> None:
    folder = write_eval(tmp_path / "eval", ["apt", "dco", "db"])
    plan = RatingPlan(read_comparison([folder]), 0)
    both = [*study(), *(dataclasses.replace(one, criterion="prior", rater="ann") for one in study())]
    files = [
        save(tmp_path / f"{name}.jsonl", plan, *(one for one in both if one.rater == name)) for name in ("ann", "bob")
    ]
    said: list[str] = []
    results = run_votes([folder], files, say=said.append)
    assert [result.criterion for result in results] == ["subject", "prior"]
    assert said[0].split() == ["subject", "prior"]
    assert [line.split("  ")[0] for line in said[1:9]] == [
        *("apt", "db", "dco", "cannot tell", "votes", "raters", "prompts", "items")
    ]
    assert re.fullmatch(r"apt +50\.0% \(\d+% to \d+%\)  50\.0% \(\d+% to \d+%\)", said[1])
    assert said[5].split() == ["votes", "16", "8"] and said[6].split() == ["raters", "2", "1"]
    assert said[-1].startswith("note: one rater tells nothing about others")
    assert said == table(results)


def test_a_name_in_two_files_and_a_file_without_votes_are_told(
    evaluation: Path, plan: RatingPlan, tmp_path: Path
) -> None:
    one, two, none = tmp_path / "1.jsonl", tmp_path / "2.jsonl", tmp_path / "3.jsonl"
    save(one, plan, vote(APT, shown=(APT, DCO)))
    save(two, plan, vote(DCO, shown=(APT, DCO), time="2026"))
    save(none, plan)
    said: list[str] = []
    (result,) = run_votes([evaluation], [one, two, none], methods=[APT, DCO], say=said.append)
    assert said[0] == f"note: {none} has no vote"
    assert said[1].startswith(f"note: 'ann' is the rater of {one} and {two}: of two answers to a question the later")
    assert result.votes == 1 and result.shares[DCO].share == 1
    with pytest.raises(AptError, match="--result: a file is named twice"):
        run_votes([evaluation], [one, tmp_path / "." / "1.jsonl"], say=print)
    with pytest.raises(AptError, match="no vote in any of the files; raters give some on the page"):
        run_votes([evaluation], [none], say=print)


def test_the_questions_are_three() -> None:
    assert [question.criterion for question in QUESTIONS] == ["subject", "prompt", "prior"]


# -- the page ----------------------------------------------------------------------------------------------------------


def write(folder: Path, out: Path, **options: Any) -> tuple[str, list[str]]:
    said: list[str] = []
    write_page([folder], out, say=said.append, **{"references": None, "methods": None, "seed": 0, **options})
    return out.read_text(encoding="utf-8"), said


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.split('id="data">')[1].split("</script>")[0])
    return found


def content_of(uri: str) -> bytes:
    return base64.b64decode(uri.split(";base64,")[1])


def test_nothing_that_a_rater_gets_names_a_method(evaluation: Path, tmp_path: Path) -> None:
    page, said = write(evaluation, tmp_path / "new" / "rate.html")
    data = data_of(page)
    assert len(data["pictures"]) == 40
    everything = page.encode() + b"".join(map(content_of, [*data["pictures"].values(), *data["photos"]]))
    for word in (SECRET, "dreambooth", "safetensors", str(tmp_path)):
        assert word.encode() not in everything, word
    assert re.match(r".*new.rate\.html: \d\.\d MB; open it in a browser, or send", said[1])
    assert said[0] == "10 pages of 3 methods: reading 40 pictures"
    # In the page a picture's candidates stand in the order of their ids, which is none of the methods'.
    ids = picture_ids(read_comparison([evaluation]))
    method_of = {name: method for (*_, method), name in ids.items()}
    assert len({tuple(method_of[name] for name in item["candidates"]) for item in data["items"]}) > 2


def test_the_page_may_fetch_nothing(evaluation: Path, tmp_path: Path) -> None:
    page, _ = write(evaluation, tmp_path / "rate.html")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and policy[1] == (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    )
    assert "http://" not in page and "https://" not in page


def test_the_page_shows_the_pictures_that_the_ballot_says(evaluation: Path, plan: RatingPlan, tmp_path: Path) -> None:
    data = data_of(write(evaluation, tmp_path / "rate.html")[0])
    assert [question["criterion"] for question in data["questions"]] == ["subject", "prompt", "prior"]
    assert len(data["orders"]) == ORDERS and len({json.dumps(order) for order in data["orders"]}) == ORDERS
    for number in (0, 7):
        for (index, places), shown in zip(data["orders"][number], plan.order(str(number)), strict=True):
            item, where = data["items"][index], (shown.item.prompt, shown.item.seed)
            names = [item["prior"], *(item["candidates"][place] for place in places)]
            colors = [Image.open(io.BytesIO(content_of(data["pictures"][name]))).getpixel((0, 0)) for name in names]
            assert colors == [color_of(method, *where) for method in ("base", *shown.candidates)]
            assert item["prompt"] == f"a backpack {PROMPTS[shown.item.prompt]}"
            assert item["reference"] == plan.reference(shown.item)


def test_the_same_pictures_give_the_same_page_so_that_votes_stay_valid(evaluation: Path, tmp_path: Path) -> None:
    first, again = (write(evaluation, tmp_path / name)[0] for name in ("a.html", "b.html"))
    assert first == again
    ids = [
        {*data_of(write(evaluation, tmp_path / "c.html", methods=names)[0])["pictures"]} for names in (None, [APT, DCO])
    ]
    assert ids[1] < ids[0]


def test_a_prompt_may_hold_what_html_and_templates_mean_something_by(tmp_path: Path) -> None:
    text = 'a "$5" </script><b> & ${x}'
    folder = write_eval(tmp_path / "eval", ["a", "b"], prompts=[{"prompt": text, "plain": text}] * 5)
    assert data_of(write(folder, tmp_path / "rate.html")[0])["items"][0]["prompt"] == text


def test_a_photo_is_upright_without_what_else_its_file_says(evaluation: Path, tmp_path: Path) -> None:
    photo = Image.new("RGB", (2000, 900), "red")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "my camera"  # lying on its side
    for path in read_comparison([evaluation]).references:
        photo.save(path, exif=exif, comment=b"my camera")
    content = content_of(data_of(write(evaluation, tmp_path / "rate.html")[0])["photos"][0])
    assert b"camera" not in content
    sent = Image.open(io.BytesIO(content))
    assert sent.size == (461, 1024) and sent.format == "JPEG" and not sent.getexif()


def test_a_picture_that_cannot_be_read_leaves_no_page(evaluation: Path, tmp_path: Path) -> None:
    (evaluation / APT / "000-0.png").write_bytes(b"no picture")
    with pytest.raises(AptError, match=r"000-0\.png: cannot be read as a picture"):
        write(evaluation, tmp_path / "rate.html")
    assert not (tmp_path / "rate.html").exists()
