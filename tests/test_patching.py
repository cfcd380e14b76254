"""Inserting marked lines into any bytes and taking them out again."""

from __future__ import annotations

import codecs

import pytest

from apt_hooks.errors import AptError
from apt_hooks.integrations.patching import MARK, Insertion, diff, insert, insert_lines, is_patched, strip

PLAIN = b"""import os

def load(f):
    config = read(f)
    return config

if main:
    trainer = Trainer()
    trainer.train()
"""
BEFORE = Insertion("def load(f):", ("def helper():", "    return 1"))
AFTER = Insertion("    config = read(f)", ("    config.pop(1)",), after=True, within="def load(f):")
INSERTIONS = (BEFORE, AFTER)

CONTENTS = {
    "lf": PLAIN,
    "crlf": PLAIN.replace(b"\n", b"\r\n"),
    "both line endings": PLAIN.replace(b"read(f)\n", b"read(f)\r\n"),
    "no final newline": PLAIN.rstrip(b"\n"),
    "bom": codecs.BOM_UTF8 + PLAIN,
    "japanese in utf-8": PLAIN.replace(b"import os", "import os  # 設定を読む".encode()),
    "japanese in shift-jis": PLAIN.replace(b"import os", "import os  # 設定を読む".encode("shift_jis")),
    "bytes of no encoding": PLAIN.replace(b"import os", b"import os  # \xff\xfe\x00\x80"),
    "form feed and lone carriage return": PLAIN.replace(b"import os\n", b"import os\n\x0c\nx = 1\r"),
    "trailing blank lines": PLAIN + b"\n\n  \n",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_strip_restores_every_byte(content: bytes) -> None:
    patched = insert(content, INSERTIONS, "x.py")
    assert patched != content
    assert strip(patched) == content


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_inserting_twice_equals_inserting_once(content: bytes) -> None:
    once = insert(content, INSERTIONS, "x.py")
    assert insert(once, INSERTIONS, "x.py") == once


def test_an_anchor_that_ends_the_file_without_a_newline_is_refused_since_no_undo_could_restore_that() -> None:
    with pytest.raises(AptError, match=r"^x\.py: .*`last\(\)`"):
        insert(b"first()\n    last()", [Insertion("    last()", ("    more()",), after=True)], "x.py")


def test_lines_go_in_before_an_anchor_that_ends_the_file_without_a_newline() -> None:
    content = b"first()\nlast()"
    patched = insert(content, [Insertion("last()", ("more()",))], "x.py")
    assert patched.splitlines()[-1] == b"last()"
    assert strip(patched) == content


def test_lines_go_before_and_after_their_anchors_in_order() -> None:
    lines = insert(PLAIN, INSERTIONS, "x.py").decode().splitlines()
    start = lines.index("def load(f):")
    assert lines[start - 2 : start + 3] == [
        f"def helper():  {MARK}",
        f"    return 1  {MARK}",
        "def load(f):",
        "    config = read(f)",
        f"    config.pop(1)  {MARK}",
    ]


def test_exactly_the_inserted_lines_end_with_the_mark() -> None:
    patched = insert(PLAIN, INSERTIONS, "x.py").decode().splitlines()
    marked = [line for line in patched if line.endswith(MARK)]
    assert len(marked) == len(BEFORE.lines) + len(AFTER.lines)
    assert [line for line in patched if line not in marked] == PLAIN.decode().splitlines()


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_inserted_lines_end_as_their_anchor_does(ending: bytes) -> None:
    patched = insert(PLAIN.replace(b"\n", ending), INSERTIONS, "x.py")
    assert patched.count(ending) == patched.count(b"\n") == PLAIN.count(b"\n") + 3


def test_edits_of_the_users_own_survive() -> None:
    patched = insert(PLAIN, INSERTIONS, "x.py")
    edited = patched.replace(b"import os", b"import os, sys").replace(
        b"    trainer.train()\n", b"    trainer.train(1)\n"
    )
    wanted = PLAIN.replace(b"import os", b"import os, sys").replace(b"    trainer.train()\n", b"    trainer.train(1)\n")
    assert strip(edited) == wanted


def test_lines_of_an_older_version_are_replaced() -> None:
    older = insert(PLAIN, [Insertion("    trainer = Trainer()", ("    older()",), after=True), BEFORE], "x.py")
    assert insert(older, INSERTIONS, "x.py") == insert(PLAIN, INSERTIONS, "x.py")


@pytest.mark.parametrize(
    ("content", "insertion", "times"),
    [
        (PLAIN.replace(b"read(f)", b"parse(f)"), AFTER, "it is not there"),
        (PLAIN.replace(b"    config = read(f)", b"\tconfig = read(f)"), AFTER, "it is not there"),
        (PLAIN.replace(b"    config = read(f)", b"    config = read(f)  # edited"), AFTER, "it is not there"),
        (PLAIN.replace(b"def load", b"def open"), BEFORE, "it is not there"),
        (PLAIN.replace(b"def load(f):", b"def load(f):\ndef load(f):"), BEFORE, "it stands 2 times"),
        (b"", BEFORE, "it is not there"),
    ],
    ids=["gone", "other indentation", "comment behind it", "renamed", "twice", "empty file"],
)
def test_an_anchor_that_stands_not_once_is_refused_with_file_line_and_count(
    content: bytes, insertion: Insertion, times: str
) -> None:
    with pytest.raises(AptError) as error:
        insert(content, [insertion], "library/x.py")
    assert "library/x.py" in str(error.value) and times in str(error.value)
    assert insertion.anchor.strip() in str(error.value)


def test_within_looks_in_its_own_block_only() -> None:
    block = b"def one(f):\n    go()\n\n# a comment\n    stop()\n"
    content = b"def zero():\n    go()\n" + block + b"def two():\n    go()\n"
    insertion = Insertion("    go()", ("    more()",), after=True, within="def one(f):")
    lines = insert(content, [insertion], "x.py").decode().splitlines()
    assert [i for i, line in enumerate(lines) if line.endswith(MARK)] == [lines.index("def one(f):") + 2]
    with pytest.raises(AptError, match=r"`stop\(\)`.*not there"):
        insert(content, [Insertion("    stop()", ("    more()",), within="def two():")], "x.py")


def test_an_anchor_only_before_the_line_it_has_to_follow_is_refused() -> None:
    insertion = Insertion("import os", ("import sys",), within="def load(f):")
    with pytest.raises(AptError, match=r"`import os`.*not there"):
        insert(PLAIN, [insertion], "x.py")


@pytest.mark.parametrize("content", [b"", b"x = 1\n", PLAIN, CONTENTS["crlf"]])
def test_content_without_marks_is_not_patched_and_stays(content: bytes) -> None:
    assert not is_patched(content)
    assert strip(content) == content


def test_a_mark_elsewhere_in_a_line_is_no_mark() -> None:
    content = f'note = "{MARK} is how lines end"\n'.encode()
    assert not is_patched(content)
    assert strip(content) == content


@pytest.mark.parametrize("name", ["lf", "crlf", "no final newline", "japanese in shift-jis"])
def test_is_patched_sees_the_marks(name: str) -> None:
    assert is_patched(insert(CONTENTS[name], INSERTIONS, "x.py"))


def test_diff_shows_the_inserted_lines_and_reads_any_bytes() -> None:
    before = CONTENTS["japanese in shift-jis"]
    text = diff(before, insert(before, INSERTIONS, "x.py"), "x.py")
    added = [line for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert added == [f"+def helper():  {MARK}", f"+    return 1  {MARK}", f"+    config.pop(1)  {MARK}"]
    assert "a/x.py" in text and "b/x.py" in text
    assert diff(before, before, "x.py") == ""


def marked(*lines: str, ending: bytes = b"\n") -> bytes:
    return b"".join(f"{line}  {MARK}".encode() + ending for line in lines)


@pytest.mark.parametrize("at", range(4))
def test_lines_go_before_the_line_of_their_number_and_behind_the_last(at: int) -> None:
    lines = [b"zero\n", b"one\n", b"two\n"]
    wanted = b"".join(lines[:at]) + marked("a", "b") + b"".join(lines[at:])
    assert insert_lines(b"".join(lines), [(at, ("a", "b"))], "x.py") == wanted


@pytest.mark.parametrize("at", [0, 1, 2], ids=["at 0", "between", "at the end"])
def test_groups_for_one_place_keep_their_order(at: int) -> None:
    lines = [b"zero\n", b"one\n"]
    groups = [(at, ("b", "a")), (at, ("d",)), (at, ()), (at, ["c", "c"])]
    wanted = b"".join(lines[:at]) + marked("b", "a", "d", "c", "c") + b"".join(lines[at:])
    assert insert_lines(b"".join(lines), groups, "x.py") == wanted


def test_numbers_are_those_of_the_content_in_whatever_order_the_places_come() -> None:
    places = [(2, ("c",)), (0, ("a",)), (1, ("b", "b")), (2, ("d",))]
    wanted = marked("a") + b"zero\n" + marked("b", "b") + b"one\n" + marked("c", "d")
    assert insert_lines(b"zero\none\n", iter(places), "x.py") == wanted


def test_inserted_lines_end_as_the_line_before_and_at_0_as_the_first_line() -> None:
    content = b"zero\r\none\ntwo\rthree\r\n"
    patched = insert_lines(content, [(at, (str(at), "more")) for at in range(5)], "x.py")
    groups = [
        marked(str(at), "more", ending=ending) for at, ending in enumerate([b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n"])
    ]
    lines = [b"zero\r\n", b"one\n", b"two\r", b"three\r\n", b""]
    assert patched == b"".join(group + line for group, line in zip(groups, lines, strict=True))
    assert strip(patched) == content


def test_before_the_only_line_of_a_file_without_a_newline_there_is_room() -> None:
    assert insert_lines(b"zero", [(0, ("a",))], "x.py") == marked("a") + b"zero"


def test_behind_a_line_that_ends_the_file_without_a_newline_there_is_none() -> None:
    with pytest.raises(AptError, match=r"^x\.py: the line `one` ends the file without a newline"):
        insert_lines(b"zero\n  one", [(0, ("a",)), (2, ("b",))], "x.py")


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_strip_takes_out_lines_inserted_by_number(content: bytes) -> None:
    count = len(content.splitlines())
    patched = insert_lines(content, [(at, ("a", "b")) for at in range(count)], "x.py")
    assert sum(is_patched(line) for line in patched.splitlines()) == 2 * count
    assert strip(patched) == content


def test_lines_go_into_an_empty_file() -> None:
    assert insert_lines(b"", [(0, ("a", "b"))], "x.py") == marked("a", "b")


def test_no_insertions_leave_an_empty_file_as_it_is() -> None:
    assert insert(b"", [], "x.py") == b""


def test_a_last_line_in_another_encoding_is_refused_as_any_other_without_a_newline() -> None:
    with pytest.raises(AptError, match=r"^x\.py: .*ends the file without a newline"):
        insert_lines("# 設定".encode("shift_jis"), [(1, ("a",))], "x.py")
