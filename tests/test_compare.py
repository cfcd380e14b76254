"""Folders side by side, what raters see and do not see, votes that are never lost, and what they come to."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import io
import json
import math
import os
import random
import re
import socket
import statistics
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from eval_folders import PROMPTS, SAMPLING, SECRET, color_of, write_eval
from PIL import Image

from apt_hooks import AptError
from apt_hooks.results.comparison import server as server_module
from apt_hooks.results.comparison.ballot import QUESTIONS, Ballot
from apt_hooks.results.comparison.booth import Booth
from apt_hooks.results.comparison.folders import read_comparison
from apt_hooks.results.comparison.grid import box_of, choose_rows, run_grid
from apt_hooks.results.comparison.intervals import share_interval, student_t, wilson
from apt_hooks.results.comparison.result import count_votes, run_votes, table
from apt_hooks.results.comparison.server import Server, serve
from apt_hooks.results.comparison.votes import Vote, VoteFile, read_votes

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


# -- the ballot --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ballot(evaluation: Path) -> Ballot:
    return Ballot(read_comparison([evaluation]), seed=0)


def test_a_rater_finds_the_same_order_again_and_another_rater_another_one(evaluation: Path, ballot: Ballot) -> None:
    again = Ballot(read_comparison([evaluation]), seed=0)
    assert ballot.order("ann") == again.order("ann")
    assert ballot.order("ann") != ballot.order("bob")
    assert ballot.order("ann") != Ballot(read_comparison([evaluation]), seed=1).order("ann")
    assert {shown.item for shown in ballot.order("ann")} == {*ballot.items} and len(ballot.items) == 10
    assert all(sorted(shown.candidates) == [APT, DCO, DREAMBOOTH] for shown in ballot.order("ann"))


def test_every_method_is_at_every_place_equally_often_for_each_rater(ballot: Ballot) -> None:
    for rater in map(str, range(20)):
        first_nine = [shown.candidates for shown in ballot.order(rater)][:9]
        assert Counter((place, method) for shown in first_nine for place, method in enumerate(shown)) == {
            (place, method): 3 for place in range(3) for method in ballot.methods
        }


def test_neither_items_nor_candidates_have_a_favored_order_over_raters(ballot: Ballot) -> None:
    orders = [ballot.order(f"rater {number}") for number in range(1200)]
    first_items = Counter(order[0].item for order in orders)
    assert len(first_items) == 10 and max(first_items.values()) < 170  # 120 each, give or take 10
    arrangements = Counter(order[4].candidates for order in orders)
    assert len(arrangements) == 6 and max(arrangements.values()) < 260  # 200 each, give or take 13


def test_raters_compare_two_to_six_methods_with_a_photo(evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(AptError, match=r"2 to 6 methods, found 1 \(trained-by-apt\)"):
        Ballot(read_comparison([evaluation], methods=[APT]), 0)
    many = read_comparison([write_eval(tmp_path / "many", [f"m{i}" for i in range(7)])])
    with pytest.raises(AptError, match=r"2 to 6 methods, found 7 .*--methods"):
        Ballot(many, 0)
    with pytest.raises(AptError, match=r"need a photo of the subject .*--references"):
        Ballot(dataclasses.replace(read_comparison([evaluation]), references=()), 0)


# -- the file of votes -------------------------------------------------------------------------------------------------


def vote(chosen: str | None = "a", **changed: Any) -> Vote:
    fields = {"rater": "ann", "prompt": 0, "text": "a cup", "seed": 1, "criterion": "subject", "shown": ("b", "a")}
    return Vote(**{**fields, "chosen": chosen, "time": "2025-01-01T00:00:00+00:00", **changed})


def test_votes_are_only_ever_added_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "votes.jsonl"
    given = [vote("a"), vote("b"), vote(None, criterion="prior"), vote("a", rater="Zoë")]
    with contextlib.closing(VoteFile(path)) as file:
        for one in given:
            file.add(one)
        assert file.answers("ann") == {(0, 1, "subject"): given[1], (0, 1, "prior"): given[2]}
    assert read_votes(path) == given
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["shown"] == ["b", "a"]
    with contextlib.closing(VoteFile(path)) as again:
        assert {*again.votes} == {*given[1:]} and again.answers("bob") == {}


def test_the_piece_of_a_line_is_no_error_and_the_next_vote_begins_a_line(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    with contextlib.closing(VoteFile(path)) as file:
        file.add(vote("a"))
        file.add(vote("b"))
    whole = path.read_bytes()
    for cut, kept in ((9, [vote("a")]), (1, [vote("a"), vote("b")])):  # in the second vote; its end of line alone
        path.write_bytes(whole[:-cut])
        assert read_votes(path) == kept
        with contextlib.closing(VoteFile(path)) as file:
            file.add(vote(None))
        assert read_votes(path) == [*kept, vote(None)]


def test_a_line_that_is_no_vote_is_named(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    good = json.dumps(dataclasses.asdict(vote()))
    for bad in ("step 1", "{}", "[1]", good.replace('"chosen": "a"', '"chosen": "c"'), good.replace("1,", '"1",')):
        path.write_text(f"{good}\n{bad}\n{good}\n")
        with pytest.raises(AptError, match=r"votes\.jsonl: line 2 is no vote; found"):
            read_votes(path)
        with pytest.raises(AptError, match="line 2 is no vote"):
            VoteFile(path)
    with pytest.raises(AptError, match="cannot be read: No such file"):
        read_votes(tmp_path / "none.jsonl")
    with pytest.raises(AptError, match="cannot be written to"):
        VoteFile(tmp_path)


def test_a_vote_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "votes.jsonl"
    with contextlib.closing(VoteFile(path)) as file:
        file.add(vote("a"))
        write = os.write
        monkeypatch.setattr(os, "write", lambda handle, line: write(handle, line[:10]))
        with pytest.raises(AptError, match="a vote cannot be written: the disk is full"):
            file.add(vote("b"))
        monkeypatch.undo()
        assert read_votes(path) == [vote("a")] == file.votes
        file.add(vote("b"))
    assert read_votes(path) == [vote("a"), vote("b")]
    with pytest.raises(AptError, match="is closed"):
        file.add(vote("a"))


def test_a_vote_is_on_the_disk_before_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes = tmp_path / "votes.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    with contextlib.closing(VoteFile(path)) as file:
        file.add(vote("a"))
    assert sizes == [path.stat().st_size]


# -- intervals and the result ------------------------------------------------------------------------------------------


def test_students_t_is_that_of_tables() -> None:
    for degrees, t in ((1, 12.7062), (2, 4.30265), (5, 2.57058), (24, 2.06390), (100, 1.98397), (1e6, 1.95997)):
        assert student_t(degrees) == pytest.approx(t, rel=2e-6)
    assert student_t(1.5) == pytest.approx(6.01666, rel=1e-4)


def test_without_scipy_its_install_line_is_told_before_anybody_votes(
    evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in study()))
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(AptError, match=r'need scipy .*: pip install "apt-hooks\[eval\]"'):
        run_votes(path, say=print)
    with pytest.raises(AptError, match="need scipy"):
        serve([evaluation], tmp_path / "new.jsonl", references=None, port=0, methods=None, seed=0, say=print)
    assert not (tmp_path / "new.jsonl").exists()


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
    return [dataclasses.replace(votes[0], chosen="db"), *votes]


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
    path = tmp_path / "votes.jsonl"
    with contextlib.closing(VoteFile(path)) as file:
        for one in study():
            file.add(one)
            file.add(dataclasses.replace(one, criterion="prior", rater="ann"))
    said: list[str] = []
    results = run_votes(path, say=said.append)
    assert [result.criterion for result in results] == ["subject", "prior"]
    assert said[0].split() == ["subject", "prior"]
    assert [line.split("  ")[0] for line in said[1:9]] == [
        *("apt", "db", "dco", "cannot tell", "votes", "raters", "prompts", "items")
    ]
    assert re.fullmatch(r"apt +50\.0% \(\d+% to \d+%\)  50\.0% \(\d+% to \d+%\)", said[1])
    assert said[5].split() == ["votes", "16", "8"] and said[6].split() == ["raters", "2", "1"]
    assert said[-1].startswith("note: one rater tells nothing about others")
    assert said == table(results)


def test_a_result_without_votes_says_where_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "votes.jsonl").touch()
    with pytest.raises(AptError, match=r"votes\.jsonl: has no vote yet; `apt-hooks compare`"):
        run_votes(tmp_path / "votes.jsonl", say=print)


# -- the server --------------------------------------------------------------------------------------------------------


class Client:
    """Speaks with a server as a browser does, and keeps all that it says."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heard = b""

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
        self.heard += f"{response.status} {response.reason}\n{response.headers}".encode() + content
        self.headers = response.headers
        return response.status, content

    def form(self, rater: str = "ann") -> dict[str, Any]:
        status, content = self.ask("GET", f"/form?rater={rater}")
        assert status == 200
        found: dict[str, Any] = json.loads(content)
        return found

    def post(self, posted: object, **headers: str) -> tuple[int, str]:
        given = {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{self.port}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        body = posted if isinstance(posted, bytes) else json.dumps(posted).encode()
        status, content = self.ask("POST", "/vote", body, given)
        return status, content.decode()


@contextlib.contextmanager
def open_booth(ballot: Ballot, votes: Path) -> Iterator[Client]:
    told: list[str] = []
    with Booth(ballot, votes) as booth, Server(0, booth, told.append) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            client = Client(server.server_address[1])
            client.told = told  # type: ignore[attr-defined]
            yield client
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    return tmp_path / "votes.jsonl"


@pytest.fixture
def client(ballot: Ballot, votes: Path) -> Iterator[Client]:
    with open_booth(ballot, votes) as client:
        yield client


def method_of(picture: bytes, item: tuple[int, int]) -> str:
    color = Image.open(io.BytesIO(picture)).getpixel((0, 0))
    return next(m for m in ("base", APT, DCO, DREAMBOOTH) if color_of(m, *item) == color)


def test_nothing_that_a_rater_is_sent_names_a_method(client: Client) -> None:
    form = client.form()
    for path in ("/", "/rater.css", "/rater.js", "/form?rater=bob", "/nothing"):
        client.ask("GET", path)
    for item in form["items"]:
        for name in (item["reference"], item["prior"], *item["candidates"]):
            assert client.ask("GET", f"/picture/{name}")[0] == 200
            assert client.headers["Content-Type"] == "image/png" and "Content-Disposition" not in client.headers
    item = form["items"][0]
    client.post({"rater": "ann", "item": item["item"], "criterion": "prior", "choice": item["candidates"][0]})
    client.post({"rater": "ann", "item": item["item"], "criterion": "prior", "choice": "x"})
    assert len(client.heard) > 10_000
    for word in (SECRET, "dreambooth", "safetensors"):
        assert word.encode() not in client.heard, word


def test_ids_are_new_at_each_start(ballot: Ballot, votes: Path) -> None:
    forms = []
    for _ in range(2):
        with open_booth(ballot, votes) as client:
            forms.append(client.form())
    ids = [{name for item in form["items"] for name in (item["prior"], *item["candidates"])} for form in forms]
    assert len(ids[0]) == 40 and not ids[0] & ids[1]
    assert [item["item"] for item in forms[0]["items"]] == [item["item"] for item in forms[1]["items"]]


def test_the_form_shows_the_pictures_that_the_ballot_says(client: Client, ballot: Ballot) -> None:
    form = client.form("bob")
    assert [question["criterion"] for question in form["questions"]] == ["subject", "prompt", "prior"]
    for item, shown in zip(form["items"], ballot.order("bob"), strict=True):
        where = shown.item.prompt, shown.item.seed
        pictures = [client.ask("GET", f"/picture/{name}")[1] for name in (item["prior"], *item["candidates"])]
        assert [method_of(picture, where) for picture in pictures] == ["base", *shown.candidates]
        assert item["prompt"] == f"a backpack {PROMPTS[shown.item.prompt]}"


def test_a_photo_is_sent_upright_without_what_else_its_file_says(ballot: Ballot, votes: Path) -> None:
    photo = Image.new("RGB", (2000, 900), "red")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "my camera"  # lying on its side
    for path in ballot.comparison.references:
        photo.save(path, exif=exif)
    with open_booth(ballot, votes) as client:
        content = client.ask("GET", f"/picture/{client.form()['items'][0]['reference']}")[1]
    assert b"camera" not in content
    sent = Image.open(io.BytesIO(content))
    assert sent.size == (691, 1536) and not sent.getexif()


def test_a_vote_is_a_line_of_the_file_and_is_not_asked_for_again(client: Client, ballot: Ballot, votes: Path) -> None:
    shown = ballot.order("ann")[3]
    item = client.form()["items"][3]
    assert item["answers"] == {}
    for criterion, choice in (("subject", item["candidates"][2]), ("prior", None)):
        posted = {"rater": " ann ", "item": item["item"], "criterion": criterion, "choice": choice}
        assert client.post(posted) == (200, '{"saved": true}')
    first, second = read_votes(votes)
    assert (first.rater, first.prompt, first.seed, first.criterion) == (
        "ann",
        *dataclasses.astuple(shown.item),
        "subject",
    )
    assert (first.shown, first.chosen, first.text) == (shown.candidates, shown.candidates[2], item["prompt"])
    assert (second.criterion, second.chosen) == ("prior", None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.time)
    assert client.form()["items"][3]["answers"] == {"subject": item["candidates"][2], "prior": None}
    assert all(other["answers"] == {} for other in client.form("bob")["items"])


def test_a_second_answer_replaces_the_first_and_both_stay_in_the_file(client: Client, votes: Path) -> None:
    item = client.form()["items"][0]
    for choice in item["candidates"][:2]:
        client.post({"rater": "ann", "item": item["item"], "criterion": "prompt", "choice": choice})
    assert client.form()["items"][0]["answers"] == {"prompt": item["candidates"][1]}
    assert len(read_votes(votes)) == 2 and count_votes(read_votes(votes))[0].votes == 1


def test_raters_at_the_same_time_lose_no_vote(client: Client, votes: Path) -> None:
    item = client.form("0")["items"][0]

    def rate(rater: str) -> None:
        for criterion in ("subject", "prompt", "prior"):
            posted = {"rater": rater, "item": item["item"], "criterion": criterion, "choice": None}
            assert client.post(posted)[0] == 200

    threads = [threading.Thread(target=rate, args=(str(rater),)) for rater in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({vote.question for vote in read_votes(votes)}) == 24


def test_bad_votes_are_refused_in_one_line_and_not_recorded(client: Client, votes: Path) -> None:
    first, second = client.form()["items"][:2]
    good = {"rater": "ann", "item": first["item"], "criterion": "subject", "choice": first["candidates"][0]}
    for changed, status, message in (
        ({"item": 10}, 400, "no such item"),
        ({"item": -1}, 400, "no such item"),
        ({"item": True}, 400, "no such item"),
        ({"item": "0"}, 400, "no such item"),
        ({"criterion": "beauty"}, 400, "no such criterion"),
        ({"criterion": ["subject"]}, 400, "no such criterion"),
        ({"choice": second["candidates"][0]}, 409, "load the page again"),
        ({"choice": first["prior"]}, 409, "load the page again"),
        ({"choice": 0}, 409, "load the page again"),
        ({"choice": [None]}, 409, "load the page again"),
        ({"rater": "  "}, 400, "1 to 40 printable characters"),
        ({"rater": "a" * 41}, 400, "1 to 40 printable characters"),
        ({"rater": "a\x00b"}, 400, "1 to 40 printable characters"),
        ({"rater": 7}, 400, "1 to 40 printable characters"),
        ({"more": 1}, 400, "a vote has rater, item, criterion and choice"),
    ):
        found, content = client.post({**good, **changed})
        assert (found, content.count("\n")) == (status, 1) and message in content
    for body, headers, status, message in (
        (b"{", {}, 400, "a vote is JSON"),
        (b"[" * 4000, {}, 400, "a vote is JSON"),
        (b"[]", {}, 400, "a vote has rater"),
        (b" " * 4097, {}, 413, "at most 4096 bytes"),
        (good, {"Content_Type": "text/plain"}, 415, "application/json"),
        (good, {"Content_Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        (good, {"Origin": "https://example.com"}, 403, "from this page only"),
        (good, {"Origin": "null"}, 403, "from this page only"),
        (good, {"Origin": "http://127.0.0.1:1"}, 403, "from this page only"),
    ):
        found, content = client.post(body, **headers)
        assert (found, content.count("\n")) == (status, 1) and message in content
    assert votes.read_bytes() == b""
    assert client.post(good)[0] == 200 and len(read_votes(votes)) == 1


def test_a_post_to_elsewhere_or_of_no_known_length_is_refused(client: Client) -> None:
    assert client.ask("POST", "/form", b"{}", {"Content-Type": "application/json"})[0] == 404
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        connection.sendall(b"POST /vote HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 411 ")
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD"):
        assert client.ask(method, "/vote")[0] == 501


@pytest.mark.parametrize(
    "host", ["example.com", "127.0.0.1.example.com", "localhost.example.com:80", "", "10.0.0.1", "::1"]
)
def test_a_name_other_than_this_machines_is_refused(client: Client, votes: Path, host: str) -> None:
    item = client.form()["items"][0]
    good = {"rater": "ann", "item": item["item"], "criterion": "subject", "choice": None}
    for path in ("/", "/form?rater=ann", f"/picture/{item['prior']}"):
        status, content = client.ask("GET", path, headers={"Host": host})
        assert status == 421 and content == b"this is served as 127.0.0.1 and localhost only\n"
    assert client.post(good, Host=host, Origin=f"http://{host}")[0] == 421
    assert votes.read_bytes() == b""


def test_this_machines_names_are_served_at_any_port_of_a_tunnel(client: Client) -> None:
    for host in ("localhost", f"127.0.0.1:{client.port}", "localhost:9999", "[::1]:80"):
        assert client.ask("GET", "/", headers={"Host": host})[0] == 200
    item = client.form()["items"][0]
    good = {"rater": "ann", "item": item["item"], "criterion": "subject", "choice": None}
    assert client.post(good, Host="localhost:9999", Origin="http://localhost:9999")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/manifest.json", "/picture/", "/picture/000-0.png", "/picture/../rater.html", "/form/"),
        *("/picture/%2e%2e/photos/0.jpg", "/../../../../etc/passwd", "//etc/passwd", "/rater.py", "/votes.jsonl"),
    ],
)
def test_nothing_else_of_the_disk_is_served(client: Client, path: str) -> None:
    status, content = client.ask("GET", path)
    assert status == 404 and content == b"there is nothing here\n"


def test_what_is_no_request_is_answered_in_one_line(client: Client) -> None:
    for request, answer in (
        (b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n", rb"HTTP/1.1 400 .*that is no address\n"),
        (b"GET / HTTP/1.1\r\n\r\n", rb"HTTP/1.1 421 .*localhost only\n"),
        (b"hello world\r\n\r\n", rb"Bad HTTP/0.9 request type [^\n]*\n"),
    ):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
            connection.sendall(request)
            content = b"".join(iter(lambda: connection.recv(4096), b""))
        assert re.fullmatch(answer, content, re.DOTALL), content


def test_the_page_may_use_nothing_but_this_server(client: Client) -> None:
    for path in ("/", "/rater.css", "/rater.js", "/nothing"):
        _, content = client.ask("GET", path)
        policy = client.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
        assert client.headers["X-Content-Type-Options"] == "nosniff" and client.headers["Server"] == "apt-hooks"
        assert b"//" not in re.sub(rb"(?m)^ *// .*|; // .*", b"", content)  # no address of another place


def test_a_picture_that_cannot_be_read_is_told_in_the_terminal_alone(client: Client, evaluation: Path) -> None:
    (evaluation / APT / "000-0.png").write_bytes(b"no picture")
    names = [name for item in client.form()["items"] for name in item["candidates"]]
    found = Counter(client.ask("GET", f"/picture/{name}")[0] for name in names)
    assert found == {200: 29, 500: 1} and SECRET.encode() not in client.heard
    assert "000-0.png: cannot be read as a picture" in client.told[0]  # type: ignore[attr-defined]


def test_votes_of_another_comparison_are_not_mixed_with_these(evaluation: Path, tmp_path: Path, votes: Path) -> None:
    comparison = read_comparison([evaluation], methods=[APT, DCO])
    text = comparison.prompts[0].plain
    for other in (
        vote(APT, text=text, shown=(APT, DREAMBOOTH)),
        vote(APT, text="a cup", shown=(APT, DCO)),
        vote(APT, text=text, shown=(APT, DCO), seed=7),
        vote(APT, text=text, shown=(APT, DCO), prompt=5),
    ):
        votes.write_text(json.dumps(dataclasses.asdict(other)) + "\n")
        with pytest.raises(AptError, match=r"votes\.jsonl: has votes of another comparison, on .*; name another file"):
            Booth(Ballot(comparison, 0), votes)
    votes.write_text(json.dumps(dataclasses.asdict(vote(APT, text=text, shown=(DCO, APT)))) + "\n")
    Booth(Ballot(comparison, 5), votes).close()


# -- serve -------------------------------------------------------------------------------------------------------------


def serve_with(monkeypatch: pytest.MonkeyPatch, during: Any, folder: Path, votes: Path, **options: Any) -> list[str]:
    """What `serve` says until it is interrupted, after `during` was called with the port."""
    said: list[str] = []

    def interrupted(server: Server) -> None:
        thread = threading.Thread(target=super(Server, server).serve_forever, args=(0.01,))
        thread.start()
        try:
            during(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(server_module.Server, "serve_forever", interrupted)
    given = {"references": None, "port": 0, "methods": None, "seed": 0, **options}
    serve([folder], votes, say=said.append, **given)
    return said


def test_serve_says_where_it_is_and_ends_with_the_result(
    evaluation: Path, votes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(port: int) -> None:
        client = Client(port)
        item = client.form()["items"][0]
        assert len(item["candidates"]) == 2
        client.post({"rater": "ann", "item": item["item"], "criterion": "prompt", "choice": None})

    said = serve_with(monkeypatch, answer, evaluation, votes, methods=[APT, DCO])
    assert said[0] == f"10 pages of 2 methods; 0 votes in {votes}"
    assert re.match(r"open http://127\.0\.0\.1:\d+/ ", said[1])
    assert [line.split()[0] for line in said[4:]] == [
        *("prompt", APT, DCO, "cannot", "votes", "raters", "prompts", "items", "share", "note:")
    ]
    again = serve_with(monkeypatch, lambda port: None, evaluation, votes, methods=[APT, DCO])
    assert "1 votes in" in again[0] and again[4:] == said[4:]
    assert serve_with(monkeypatch, lambda port: None, evaluation, votes.with_name("new"))[-1] == "no votes yet"


def test_a_port_that_cannot_be_had_is_one_line(evaluation: Path, votes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AptError, match=f"port {port} is in use; choose another by --port"):
            serve_with(monkeypatch, lambda port: None, evaluation, votes, port=port)
    with pytest.raises(AptError, match=r"port 70000 cannot be had \(.*\); choose another by --port"):
        serve_with(monkeypatch, lambda port: None, evaluation, votes, port=70000)


def test_only_this_machine_can_connect(client: Client, ballot: Ballot, votes: Path) -> None:
    with Booth(ballot, votes.with_name("other")) as booth, Server(0, booth, print) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"


def test_the_questions_are_three() -> None:
    assert [question.criterion for question in QUESTIONS] == ["subject", "prompt", "prior"]
