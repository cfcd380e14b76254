"""Inserting marked lines into any bytes and taking them out again."""

from __future__ import annotations

import ast
import codecs

import pytest

from apt_hooks.errors import AptError
from apt_hooks.integrations.patching import MARK, Statements, diff, insert_lines, is_patched, patched_python, strip

PLAIN = b"""import os

def load(f):
    config = read(f)
    return config

if main:
    trainer = Trainer()
    trainer.train()
"""
# Before the function, and after its first statement.
PLACES = ((2, ("def helper():", "    return 1")), (4, ("    config.pop(1)",)))

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


def test_exactly_the_inserted_lines_end_with_the_mark() -> None:
    patched = insert_lines(PLAIN, PLACES, "x.py").decode().splitlines()
    marked = [line for line in patched if line.endswith(MARK)]
    assert len(marked) == 3
    assert [line for line in patched if line not in marked] == PLAIN.decode().splitlines()


def test_edits_of_the_users_own_survive() -> None:
    patched = insert_lines(PLAIN, PLACES, "x.py")
    edits = ((b"import os", b"import os, sys"), (b"    trainer.train()\n", b"    trainer.train(1)\n"))
    edited, wanted = patched, PLAIN
    for old, new in edits:
        edited, wanted = edited.replace(old, new), wanted.replace(old, new)
    assert strip(edited) == wanted


# -- places beside statements ------------------------------------------------------------------------------------------


def statement(source: bytes, line: int) -> ast.stmt:
    """The innermost statement that begins in this line, counted from 1."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt) and node.lineno == line]
    return found[-1]


def test_lines_stand_before_and_after_a_statement_indented_as_it_is() -> None:
    statements = Statements(PLAIN, "x.py")
    places = [statements.before(statement(PLAIN, 8), "a()", "    b()"), statements.after(statement(PLAIN, 8), "c()")]
    lines = insert_lines(PLAIN, places, "x.py").decode().splitlines()
    assert lines[7:11] == [f"    a()  {MARK}", f"        b()  {MARK}", "    trainer = Trainer()", f"    c()  {MARK}"]


def test_tabs_stay_tabs() -> None:
    source = b"if x:\n\tgo()\n"
    assert Statements(source, "x.py").before(statement(source, 2), "a()") == (1, ("\ta()",))


def test_after_a_statement_of_several_lines_is_behind_its_last() -> None:
    source = b"go(\n    1,\n)\nstop()\n"
    assert Statements(source, "x.py").after(statement(source, 1), "a()") == (3, ("a()",))


def test_comments_and_decorators_above_stay_with_their_statement() -> None:
    source = b"x = 1  # no comment of its own line\n# one\n# two\n@cache\n@other\ndef f():\n    pass\n"
    assert Statements(source, "x.py").before(statement(source, 6), "a()") == (1, ("a()",))


@pytest.mark.parametrize("source", [b"a(); b()\n", b"if x: a()\n", b"a(); \\\nb()\n"])
def test_a_statement_that_shares_its_line_is_refused_with_the_line(source: bytes) -> None:
    first = ast.parse(source).body[0]
    anchor = first.body[0] if isinstance(first, ast.If) else first
    with pytest.raises(AptError, match=r"^x\.py: looked for one statement in line 1, found .*a\(\)"):
        Statements(source, "x.py").after(anchor, "c()")


@pytest.mark.parametrize("name", ["lf", "crlf", "bom", "japanese in utf-8", "no final newline"])
def test_a_patched_file_is_python_and_its_lines_are_of_its_encoding(name: str) -> None:
    content = CONTENTS[name]
    new = patched_python(content, PLACES, "x.py")
    ast.parse(new)
    assert strip(new) == content and strip(patched_python(strip(new), PLACES, "x.py")) == content


def test_lines_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AptError, match=r"^x\.py: the inserted lines do not fit .*Nothing was changed"):
        patched_python(PLAIN, [(4, ("        deeper()",))], "x.py")


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
    assert is_patched(insert_lines(CONTENTS[name], PLACES, "x.py"))


def test_diff_shows_the_inserted_lines_and_reads_any_bytes() -> None:
    before = CONTENTS["japanese in shift-jis"]
    text = diff(before, insert_lines(before, PLACES, "x.py"), "x.py")
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
    assert insert_lines(b"", [], "x.py") == b""


def test_a_last_line_in_another_encoding_is_refused_as_any_other_without_a_newline() -> None:
    with pytest.raises(AptError, match=r"^x\.py: .*ends the file without a newline"):
        insert_lines("# 設定".encode("shift_jis"), [(1, ("a",))], "x.py")
