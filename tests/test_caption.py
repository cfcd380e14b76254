"""Captions for photos: what is made of answers, which photos, a server that fails in every way, a model of its own."""

from __future__ import annotations

import base64
import email.utils
import io
import json
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from PIL import Image, PngImagePlugin

from apt_hooks import AptError
from apt_hooks.integrations.captioning import captions, endpoint
from apt_hooks.integrations.captioning.answers import BadAnswer, NoCaption, caption_of, estimated_tokens, with_subject
from apt_hooks.integrations.captioning.captions import read_key, read_prompt, run_caption
from apt_hooks.integrations.captioning.endpoint import Endpoint
from apt_hooks.integrations.captioning.photos import find_photos, jpeg, load_photo

KEY = "sk-secret-0123456789"
CAPTION = "a photo of sks dog on a red sofa"
Reply = Callable[[BaseHTTPRequestHandler], None]


# -- a server that does as it is told ----------------------------------------------------------------------------------


def reply(status: int, content: bytes | str | dict[str, Any], **headers: str) -> Reply:
    body = json.dumps(content).encode() if isinstance(content, dict) else content
    body = body.encode() if isinstance(body, str) else body

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return send


def says(content: Any, reason: str | None = "stop", **message: Any) -> Reply:
    return reply(200, {"choices": [{"message": {"content": content, **message}, "finish_reason": reason}]})


def error(status: int, message: str, **headers: str) -> Reply:
    return reply(status, {"error": {"message": message}}, **headers)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def break_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def be_silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.5)
    handler.close_connection = True


class Server:
    """Sends one reply after another, the last one for good; `requests` holds (path, headers, body)."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [says(CAPTION)]
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, dict(self.headers), body))
                answer = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
                answer(self)

            def do_GET(self) -> None:
                server.requests.append((self.path, dict(self.headers), {}))
                server.replies[-1](self)

            def log_message(self, *_args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = Server()
    yield found
    found.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos, the second one without anything special."""
    for name, color in (("a.png", "red"), ("b.JPG", "green"), ("c.webp", "blue")):
        Image.new("RGB", (40, 30), color).save(tmp_path / name)
    return tmp_path


def ask(server: Server, *replies: Reply, **options: Any) -> tuple[str, list[float], list[str]]:
    """The caption of a red picture, how long was waited, and what was said."""
    waits: list[float] = []
    said: list[str] = []
    server.replies = list(replies)
    end = Endpoint(server.address, "llava", say=said.append, sleep=waits.append, **options)
    answer = end.describe(Image.new("RGB", (8, 8), "red"), "what is it?", lambda text: caption_of(text, "sks dog"))
    return answer, waits, said


def caption(folder: Path, server: Server | None = None, **options: Any) -> tuple[list[Path], list[str]]:
    said: list[str] = []
    if server is not None:
        options = {"endpoint": server.address, "model": "llava", "retries": 0} | options
    return run_caption(folder, subject="sks dog", say=said.append, **options), said


# -- from an answer to a caption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        CAPTION,
        f"  {CAPTION}\n",
        f'"{CAPTION}"',
        f"“{CAPTION}”",
        f"'{CAPTION}'",
        f"Caption: {CAPTION}",
        f"**Caption:** {CAPTION}",
        f'The image caption: "{CAPTION}"',
        f'"Caption: {CAPTION}"',
        f"Sure! Here is a caption for this photo:\n\n{CAPTION}",
        f"Sure! {CAPTION}",
        f"{CAPTION}\n\nI hope this helps!",
        f"Here is the caption:\n\n**{CAPTION}**\n \nLet me know if you want changes.",
        f"Certainly, the caption for this photo is:\n{CAPTION}",
        f"Here's the caption:\n> {CAPTION}",
        f"```\n{CAPTION}\n```",
        f"```text\n{CAPTION}\n```",
        f"<think>A dog? I'm sorry,\nsks dog.</think>{CAPTION}",
        f"the tag was opened by the template</think>\n{CAPTION}",
        f"<think>one</think><answer>{CAPTION}</answer>",
        f"<THINK>so</THINK>{CAPTION}<think>cut o",
        "a photo of\n sks  dog on\ta red\u200b sofa\x00\ud800",
        "a photo of SKS Dog on a red sofa",
    ],
)
def test_what_chatty_models_put_around_a_caption_goes(answer: str) -> None:
    assert caption_of(answer, "sks dog") == CAPTION


@pytest.mark.parametrize(
    "answer",
    [
        "a photo of sks dog below a sign that reads: 'caption: none'",
        '"Hi" says the sign above sks dog, "bye" the other one',
        "sks dog before a yellow sign, okay, and a clock that shows 5:30",
        "a photo of sks dog's bowl",
        "okay to sks dog: a clock that shows 5:30",
    ],
)
def test_colons_and_quotation_marks_within_a_caption_stay(answer: str) -> None:
    assert caption_of(answer, "sks dog") == answer


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("", "is empty$"),
        (" \n", "is empty$"),
        ('""', 'no caption is in the model\'s answer: ""'),
        ("<think>what may this be</think>", "no caption is in the model's answer: <think>what may"),
        ("<think>what may this be", "no caption is in the model's answer: <think>what may"),
        ("Caption: ...", "no caption is in"),
        ("I'm sorry, but I can't describe people.", "refuses: I'm sorry, but"),
        ("I\u2019m unable to see the image.", "refuses"),
        ("Sure! I cannot help with that.", "refuses: I cannot"),
        ("Please upload the image.", "refuses"),
    ],
)
def test_an_answer_that_is_no_caption_is_told_and_never_taken(answer: str, said: str) -> None:
    with pytest.raises(BadAnswer, match=said):
        caption_of(answer, "sks dog")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("A dog on a red sofa. The wall is A4.", "a photo of sks dog, a dog on a red sofa. The wall is A4."),
        ("Paris at night", "a photo of sks dog, Paris at night"),
        ("two sks dogs in the snow", "a photo of sks dog, two sks dogs in the snow"),
        ("asks dog owners", "a photo of sks dog, asks dog owners"),
        ("SKS\tdog and Sks dog", "sks dog and sks dog"),
    ],
)
def test_where_the_subject_is_missing_it_is_put_in_front(given: str, found: str) -> None:
    assert with_subject(given, "sks dog") == found


def test_a_subject_may_have_any_characters() -> None:
    assert with_subject("a photo of <S*> (\\1)", "<s*> (\\1)") == "a photo of <s*> (\\1)"
    assert caption_of("a photo of <s1>", "<s1>") == "a photo of <s1>"


def test_clips_tokens_are_estimated_by_words() -> None:
    assert estimated_tokens("a " * 50) == 65
    assert estimated_tokens("a " * 57) == 75 < estimated_tokens("a " * 58)


# -- the prompt and the key --------------------------------------------------------------------------------------------


def test_the_prompt_is_filled_in_and_asks_for_less_than_clip_reads() -> None:
    prompt = read_prompt(None, "sks dog")
    assert "The main dog in the photo" in prompt and 'a photo of sks dog"' in prompt and "{" not in prompt
    assert "50 words" in prompt and estimated_tokens("word " * 50) < 75
    assert "The main corgi in the photo" in read_prompt(None, "sks dog", "corgi")
    assert "The main subject in the photo" in read_prompt(None, "sks")


def test_a_prompt_of_ones_own_may_have_braces_or_no_placeholder(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text('Answer {"caption": {subject}, {0}}\n')
    assert read_prompt(path, "sks dog") == 'Answer {"caption": sks dog, {0}}'
    path.write_text(" \n")
    with pytest.raises(AptError, match=r"--prompt .*prompt\.txt: is empty"):
        read_prompt(path, "sks dog")
    path.write_bytes(b"\xff")
    with pytest.raises(AptError, match=r"prompt\.txt: cannot be read"):
        read_prompt(path, "sks dog")
    with pytest.raises(AptError, match="nowhere: cannot be read: No such file"):
        read_prompt(tmp_path / "nowhere", "sks dog")


def test_a_key_comes_from_the_environment_and_what_is_none_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert read_key("OPENAI_API_KEY") is None
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert read_key("OPENAI_API_KEY") == KEY
    with pytest.raises(AptError, match="the environment has no OTHER_KEY"):
        read_key("OTHER_KEY")
    for bad in (f"{KEY}\nX-Other: 1", f"{KEY} two", f"{KEY}é"):
        monkeypatch.setenv("OTHER_KEY", bad)
        with pytest.raises(AptError, match="OTHER_KEY: holds no key") as caught:
            read_key("OTHER_KEY")
        assert "secret" not in str(caught.value)


# -- photos ------------------------------------------------------------------------------------------------------------


def test_photos_are_those_that_sd_scripts_finds(folder: Path) -> None:
    for name in ("10_sks dog/d.bmp", "3/e.jpeg", "10_sks dog/more/f.png", "other/g.png", ".hidden/h.png", "._a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "notes.txt").touch()
    (folder / "5_folder.png").mkdir()
    found = [str(path.relative_to(folder)) for path in find_photos(folder)]
    assert found == ["a.png", "b.JPG", "c.webp", "10_sks dog/d.bmp", "3/e.jpeg"]
    assert captions.unseen_folders(folder) == ["other"]


def test_a_folder_without_photos_and_photos_that_share_a_caption_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "a.jpeg").touch()
    with pytest.raises(AptError, match=r"a\.jpeg and a\.png would share a\.txt; rename"):
        find_photos(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(AptError, match="none: no photos there"):
        find_photos(tmp_path / "none")
    with pytest.raises(AptError, match="nowhere: no such folder"):
        find_photos(tmp_path / "nowhere")


def test_a_photo_is_turned_shrunk_and_sent_without_what_its_file_tells(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is right in the file belongs below
    exif[0x010F] = "SecretCamera"
    photo = Image.new("RGB", (400, 200), "red")
    photo.paste("blue", (200, 0, 400, 200))
    photo.save(tmp_path / "a.jpg", exif=exif, comment=b"SecretPlace")
    picture = load_photo(tmp_path / "a.jpg", 100)
    assert picture.size == (50, 100) and load_photo(tmp_path / "a.jpg", 1024).size == (200, 400)
    top, bottom = picture.getpixel((25, 10)), picture.getpixel((25, 90))
    assert top[0] > 200 > 50 > top[2] and bottom[2] > 200 > 50 > bottom[0]
    assert b"Secret" in (tmp_path / "a.jpg").read_bytes() and b"Secret" not in jpeg(picture)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "SecretPlace")
    photo.save(tmp_path / "b.png", pnginfo=text, exif=exif)
    assert b"Secret" not in jpeg(load_photo(tmp_path / "b.png", 100))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_photos_of_any_mode_are_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (20, 10), "white").convert(mode).save(path)
    picture = load_photo(path, 64)
    assert picture.mode == "RGB" and min(picture.getpixel((3, 3))) > 250


def test_what_is_transparent_is_seen_as_trainers_see_it(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 10), (200, 10, 10, 0)).save(tmp_path / "a.png")
    assert load_photo(tmp_path / "a.png", 64).getpixel((3, 3)) == (200, 10, 10)


def test_broken_photos_are_no_captions(folder: Path) -> None:
    whole = (folder / "b.JPG").read_bytes()
    for content in (b"", b"no picture", whole[: len(whole) // 2], b"\x89PNG\r\n\x1a\n" + b"\0" * 40):
        (folder / "b.JPG").write_bytes(content)
        with pytest.raises(NoCaption, match="cannot be read as a picture"):
            load_photo(folder / "b.JPG", 64)


def test_without_pillow_its_install_line_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(AptError, match=r'pip install "apt-hooks\[caption\]"'):
        caption(folder, dry_run=True)


# -- the server --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "/", "/chat/completions", "/chat/completions/", "?api-version=1"])
def test_a_question_is_what_openai_documents(server: Server, end: str) -> None:
    server.address += end
    assert ask(server, says(CAPTION)) == (CAPTION, [], [])
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" + ("?api-version=1" if "?" in end else "")
    assert "Authorization" not in headers and headers["Content-Type"] == "application/json"
    assert body["model"] == "llava" and body["temperature"] == 0 and body["max_tokens"] == 2000
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "what is it?"} and body["messages"][0]["role"] == "user"
    kind, content = image["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    seen = Image.open(io.BytesIO(base64.b64decode(content)))
    assert seen.format == "JPEG" and seen.size == (8, 8) and seen.getpixel((4, 4))[0] > 240  # type: ignore[index]


def test_a_key_is_a_bearer_token(server: Server) -> None:
    ask(server, says(CAPTION), key=KEY)
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"


def test_failures_that_pass_are_tried_again_ever_later(server: Server) -> None:
    passing = [error(500, "oops"), error(503, "busy"), hang_up, break_off, reply(200, {"error": {"message": "no GPU"}})]
    answer, waits, said = ask(server, *passing, says(CAPTION), retries=5)
    assert answer == CAPTION and waits == [1, 2, 4, 8, 16] and len(server.requests) == 6
    assert "answers 500 (oops); next try in 1 s" in said[0] and "broke off the connection" in said[2]
    assert "broke off the connection" in said[3] and "reports: no GPU" in said[4]


def test_the_longest_wait_without_a_word_is_a_minute(server: Server) -> None:
    assert max(ask(server, *[error(502, "x")] * 9, says(CAPTION), retries=9)[1]) == 60


def test_after_the_last_try_the_photo_has_no_caption(server: Server) -> None:
    with pytest.raises(NoCaption, match=r"answers 500 \(oops\) \(tries: 3\)"):
        ask(server, error(500, "oops"), retries=2)
    assert len(server.requests) == 3
    with pytest.raises(NoCaption, match=r"\(tries: 1\)$"):
        ask(server, error(500, "oops"), retries=0)


def test_a_timeout_is_tried_again(server: Server) -> None:
    answer, waits, said = ask(server, be_silent, says(CAPTION), timeout=0.1)
    assert answer == CAPTION and waits == [1] and "has not answered within 0.1 s" in said[0]


def test_retry_after_is_waited_for(server: Server) -> None:
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    waits = ask(
        server,
        error(429, "slow down", Retry_After="7"),
        error(429, "slow down", Retry_After=later),
        error(503, "busy", Retry_After=past),
        error(429, "slow down", Retry_After="soon"),
        says(CAPTION),
    )[1]
    assert waits[0] == 7 and 27 < waits[1] <= 30 and waits[2:] == [0, 8]


def test_who_is_asked_to_wait_for_hours_is_told_so(server: Server) -> None:
    with pytest.raises(AptError, match=r"429 \(quota\), and asks to wait 7200 s") as caught:
        ask(server, error(429, "quota", Retry_After="7200"))
    assert not isinstance(caught.value, NoCaption) and len(server.requests) == 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (says(""), "empty"),
        (says(None), "empty"),
        (says(None, refusal="I will not."), "refuses: I will not"),
        (says("half a", "length"), "cut off"),
        (says("a", "content_filter"), "content filter"),
        (says("I'm sorry, I can't help."), "refuses"),
        (says("<think>half a", None), "no caption is in"),
        (reply(200, {"choices": []}), "without a message"),
        (reply(200, {}), "without a message"),
        (reply(200, {"choices": [{"message": None}]}), "without a message"),
    ],
)
def test_a_bad_answer_is_asked_for_again_less_strictly_and_then_told(server: Server, bad: Reply, said: str) -> None:
    assert ask(server, bad, says(CAPTION))[:2] == (CAPTION, [])
    assert [body["temperature"] for _, _, body in server.requests] == [0, 0.7]
    with pytest.raises(NoCaption, match=rf"{said}.*\(tries: 3\)$"):
        ask(server, bad, retries=2)


def test_an_answer_may_come_in_parts(server: Server) -> None:
    parts = [{"type": "text", "text": "a photo of sks dog"}, {"type": "text", "text": " on a red sofa"}]
    assert ask(server, says(parts))[0] == CAPTION


def test_options_that_a_model_refuses_are_left_out_from_then_on(server: Server) -> None:
    server.replies = [
        error(400, "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."),
        error(400, "Unsupported value: 'temperature' does not support 0 with this model."),
        says(""),
        says(CAPTION),
    ]
    end = Endpoint(server.address, "gpt", sleep=lambda _: None)
    for _ in range(2):
        end.describe(Image.new("RGB", (8, 8)), "?", lambda text: caption_of(text, "sks dog"))
    sent = [{key for key in body if key.startswith(("max", "temp"))} for _, _, body in server.requests]
    new = {"max_completion_tokens"}
    assert sent == [{"max_tokens", "temperature"}, {"temperature"} | new, new, new, new]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the key in OPENAI_API_KEY is not set"),
        (403, "the key in OPENAI_API_KEY is not set"),
        (402, r"402 \(no, \*\*no\*\*\)$"),
        (404, "is the model 'llava' there, and the address right"),
        (405, "is the model 'llava' there"),
    ],
)
def test_what_would_meet_every_photo_stops_the_run_at_once(server: Server, status: int, said: str) -> None:
    with pytest.raises(AptError, match=said) as caught:
        ask(server, error(status, "no,\n**no**"))
    assert not isinstance(caught.value, NoCaption) and len(server.requests) == 1
    assert "no, **no**" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_photo_that_the_server_refuses_is_not_tried_again(server: Server, status: int) -> None:
    with pytest.raises(NoCaption, match=rf"answers {status} \(too large\)$"):
        ask(server, error(status, "too large"))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"error": "plain"}, "(plain)"),
        ({"detail": "of FastAPI"}, "(of FastAPI)"),
        ({"detail": [{"loc": "body"}]}, '([{"loc": "body"}])'),
        ({"message": "other"}, "(other)"),
        ("a line of text", "(a line of text)"),
        ("<html><body>a page</body></html>", "(Unprocessable"),
        ("", "(Unprocessable"),
        (b"\xff\xfe\x1b[31m", "([31m)"),
        ({"error": {"message": "long " * 200}}, "lo..."),
    ],
)
def test_a_servers_message_is_found_in_any_form_and_shortened(server: Server, content: Any, said: str) -> None:
    with pytest.raises(NoCaption) as caught:
        ask(server, reply(422, content))
    text = str(caught.value).replace("\ufffd", "")
    assert said in text and len(text) < 300 and text.isprintable()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<html>Welcome</html>", "something else than JSON .*Welcome.* usually ends in /v1"),
        ('{"choices": [', "something else than JSON"),
        ("[" * 100_000, "something else than JSON"),
        ('["a"]', "something else than a chat completion"),
        (b"\xff\xff", "something else than JSON"),
        ('"' + "x" * (endpoint.ANSWER_LIMIT + 5) + '"', "more than 4 MiB"),
    ],
)
def test_what_is_no_chat_completion_is_one_clear_line(server: Server, content: Any, said: str) -> None:
    with pytest.raises(AptError, match=said) as caught:
        ask(server, reply(200, content))
    assert not isinstance(caught.value, NoCaption) and len(str(caught.value)) < 250


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(server: Server, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Server()
    try:
        with pytest.raises(AptError, match=f"a redirect to {other.address}, which is not followed"):
            ask(server, reply(status, "", Location=f"{other.address}?token=secret"), key=KEY)
        assert other.requests == [] and len(server.requests) == 1
    finally:
        other.close()


def test_a_redirect_to_nowhere_is_told_too(server: Server) -> None:
    with pytest.raises(AptError, match="a redirect to nowhere"):
        ask(server, reply(302, ""))
    with pytest.raises(AptError, match=r"a redirect to http://\[, which"):
        ask(server, reply(302, "", Location="http://["))


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 302, 200])
def test_a_key_is_in_no_line_even_if_the_server_echoes_it(
    folder: Path, server: Server, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.replies = [error(status, f"bad {KEY}", Location=f"http://127.0.0.1:1/{KEY}")]
    said: list[str] = []
    with pytest.raises(AptError) as caught:
        run_caption(
            folder, subject="sks dog", endpoint=server.address, model="llava", key_name="MY_KEY", retries=0,
            say=said.append,
        )  # fmt: skip
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert "***" in str(caught.value)
    chain: BaseException | None = caught.value
    while chain is not None:
        assert KEY not in f"{said}{chain}{chain!r}{chain.args}"
        chain = chain.__cause__ or chain.__context__
    assert "with the key in MY_KEY" in said[0]


def test_a_server_that_is_not_there_is_told_at_once(server: Server) -> None:
    server.close()
    with pytest.raises(AptError, match=r"127.0.0.1:\d+/v1: cannot be reached .*is the server running") as caught:
        ask(server, says(CAPTION))
    assert not isinstance(caught.value, NoCaption)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("localhost:11434/v1", "must be like http://"),
        ("file:///etc/passwd", "must be like http://"),
        ("http:///v1", "must be like http://"),
        ("", "must be like http://"),
        ("http://localhost:port/v1", "is no address"),
        ("http://[::1/v1", "is no address"),
        ("http://localhost/v 1", "without spaces"),
        ("http://höst/v1", "in ASCII"),
        ("http://me:hunter2@host/v1", "a user and a password"),
        ("http://me:hunter2@host:port/v1", "a user and a password"),
        ("me:hunter2@host", "a user and a password"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, said: str) -> None:
    with pytest.raises(AptError, match=said) as caught:
        Endpoint(address, "llava")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("http://example.com/v1", True),
        ("http://192.168.0.7:8080/v1", True),
        ("https://example.com/v1", False),
        ("http://localhost:11434/v1", False),
        ("http://127.0.0.2/v1", False),
        ("http://[::1]:8080/v1", False),
        ("http://localhost.example.com/v1", True),
    ],
)
def test_a_key_that_would_be_sent_unencrypted_is_warned_of(address: str, warned: bool) -> None:
    said: list[str] = []
    Endpoint(address, "llava", key=KEY, key_name="MY_KEY", say=said.append)
    assert bool(said) == warned and KEY not in str(said)
    assert not warned or said[0].startswith("warning: MY_KEY is sent to")
    said.clear()
    Endpoint(address, "llava", say=said.append)
    assert said == []


def test_an_environments_proxy_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address.removesuffix("/v1"))
    server.address = "http://captions.invalid/v1"
    assert ask(server, says(CAPTION))[0] == CAPTION
    assert server.requests[0][0] == "http://captions.invalid/v1/chat/completions"


# -- the run -----------------------------------------------------------------------------------------------------------


def test_a_run_writes_a_line_beside_each_photo(folder: Path, server: Server) -> None:
    server.replies = [says(CAPTION), says("Caption: a café"), says(CAPTION)]
    written, said = caption(folder, server)
    assert written == [folder / "a.txt", folder / "b.txt", folder / "c.txt"]
    assert written[0].read_bytes() == f"{CAPTION}\n".encode()
    assert written[1].read_text(encoding="utf-8") == "a photo of sks dog, a café\n"
    assert said == [
        f"asking llava at {server.address[7:-3]}, without a key in OPENAI_API_KEY",
        f"[1/3] a.png: {CAPTION}",
        "[2/3] b.JPG: a photo of sks dog, a café",
        f"[3/3] c.webp: {CAPTION}",
        "captions written: 3",
        'sd-scripts reads them with caption_extension = ".txt", which is not its default',
    ]
    prompts = {body["messages"][0]["content"][1]["text"] for _, _, body in server.requests}
    assert prompts == {read_prompt(None, "sks dog")}
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "a.txt", "b.JPG", "b.txt", "c.txt", "c.webp"]


def test_captions_that_are_there_stay_even_empty_ones(folder: Path, server: Server) -> None:
    (folder / "a.txt").write_text("mine")
    (folder / "b.txt").touch()
    written, said = caption(folder, server)
    assert written == [folder / "c.txt"] and len(server.requests) == 1
    assert (folder / "a.txt").read_text() == "mine" and (folder / "b.txt").read_text() == ""
    assert "captions written: 1; left as they were: 2" in said
    assert "warning: empty, at which sd-scripts stops: b.txt; delete them and run again" in said
    written, said = caption(folder, server, overwrite=True)
    assert len(written) == 3 and (folder / "a.txt").read_text() == f"{CAPTION}\n"


def test_a_caption_written_while_the_model_was_asked_stays(folder: Path, server: Server) -> None:
    def late(handler: BaseHTTPRequestHandler) -> None:
        (folder / "a.txt").write_text("mine")
        says(CAPTION)(handler)

    server.replies = [late, says(CAPTION)]
    assert len(caption(folder, server)[0]) == 2 and (folder / "a.txt").read_text() == "mine"


def test_where_every_photo_has_a_caption_nothing_is_asked_or_loaded(folder: Path, server: Server) -> None:
    caption(folder, server)
    server.requests.clear()
    assert caption(folder, server)[0] == [] and server.requests == []
    written, said = caption(folder, local="nowhere/such-a-model")
    assert written == [] and said[0] == "captions written: 0; left as they were: 3"


def test_a_stopped_run_goes_on_where_it_stopped(folder: Path, server: Server) -> None:
    server.replies = [says(CAPTION), error(401, "expired")]
    with pytest.raises(AptError, match="expired"):
        caption(folder, server)
    assert (folder / "a.txt").exists() and not (folder / "b.txt").exists()
    server.replies = [says(CAPTION)]
    assert caption(folder, server)[0] == [folder / "b.txt", folder / "c.txt"]


def test_photos_that_fail_are_named_and_the_others_done(folder: Path, server: Server) -> None:
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "c.txt").write_text("old")
    server.replies = [says(CAPTION), says("half", "length")]
    said: list[str] = []
    with pytest.raises(AptError, match=r"^2 of 3 photos have no caption, for the reasons above: a\.png, c\.webp$"):
        run_caption(
            folder, subject="sks dog", endpoint=server.address, model="llava", overwrite=True, retries=1,
            say=said.append,
        )  # fmt: skip
    assert (folder / "b.txt").exists() and not (folder / "a.txt").exists()
    assert (folder / "c.txt").read_text() == "old"
    assert said[1].startswith("[1/3] a.png: cannot be read as a picture") and "c.webp: no caption: " in said[3]


def test_after_three_photos_in_a_row_the_others_are_not_tried(folder: Path, server: Server) -> None:
    for name in ("d.png", "e.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    server.replies = [says(CAPTION), error(400, "it takes no pictures")]
    with pytest.raises(AptError, match=r"d\.png: .*takes no pictures.* 3 photos in a row.*captions written: 1;"):
        caption(folder, server)
    assert len(server.requests) == 4


def test_captions_too_long_for_clip_are_told(folder: Path, server: Server) -> None:
    server.replies = [says("word " * 70), says(CAPTION)]
    said = caption(folder, server)[1]
    assert "warning: a.txt has some 98 tokens (an estimate); CLIP reads 75" in said
    assert any(
        line.startswith("warning: captions that may be longer than the 75 tokens that CLIP reads: 1;") for line in said
    )
    assert len((folder / "a.txt").read_text().split()) == 75


def test_a_dry_run_shows_what_would_be_and_does_nothing(folder: Path, server: Server) -> None:
    (folder / "a.txt").write_text("mine")
    before = sorted(folder.iterdir())
    written, said = caption(folder, dry_run=True, max_side=64)
    assert written == [folder / "b.txt", folder / "c.txt"]
    assert read_prompt(None, "sks dog") in said[0]
    assert said[1:] == [
        "a.png: a.txt is there and stays as it is",
        "b.JPG: shown as 40x30 pixels, 1 kB; caption into b.txt",
        "c.webp: shown as 40x30 pixels, 1 kB; caption into c.txt",
        "nothing asked, nothing written; captions to be written: 2",
    ]
    assert "caption into a.txt, replacing it" in caption(folder, server, dry_run=True, overwrite=True)[1][1]
    (folder / "b.JPG").write_bytes(b"")
    with pytest.raises(AptError, match="1 of 3 photos cannot be read"):
        caption(folder, dry_run=True)
    assert sorted(folder.iterdir()) == before and server.requests == []


def test_folders_of_photos_that_are_left_out_are_named(folder: Path) -> None:
    (folder / "more").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "more" / "x.png")
    assert caption(folder, dry_run=True)[1][0].startswith("not looked into: more (of folders in")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "name what writes the captions"),
        ({"endpoint": "http://localhost/v1"}, "--endpoint needs --model"),
        ({"model": "llava"}, "--model is a model's name at --endpoint"),
        ({"endpoint": "http://localhost/v1", "model": "x", "local": "y"}, "leave one of them out"),
        ({"dry_run": True, "retries": -1}, "--retries must be 0 or more; found -1"),
        ({"dry_run": True, "timeout": 0.0}, "--timeout must be .* above 0; found 0"),
        ({"dry_run": True, "timeout": float("nan")}, "--timeout must be"),
        ({"dry_run": True, "max_side": 8}, "--max-side must be 64 pixels or more; found 8"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(AptError, match=said):
        caption(folder, **options)


def test_a_subject_without_words_is_refused(folder: Path) -> None:
    with pytest.raises(AptError, match="--subject must hold the words"):
        run_caption(folder, subject=" \n", dry_run=True, say=print)


def test_a_file_name_that_is_no_unicode_can_be_shown(tmp_path: Path) -> None:
    try:
        Image.new("RGB", (8, 8)).save(tmp_path / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system has no such names")
    assert caption(tmp_path, dry_run=True)[1][1].startswith("?.png: shown as 8x8")


def test_a_run_needs_no_rich_and_has_a_bar_where_it_is(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    caption(folder, server)
    assert capsys.readouterr().out == ""  # no terminal, no bar
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    caption(folder, server, overwrite=True)
    assert "100%" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert len(caption(folder, server, overwrite=True)[0]) == 3
    assert capsys.readouterr().out == ""


# -- a model on this machine -------------------------------------------------------------------------------------------

ANSWERS = {"red": "sks dog on a red floor </s>", "blue": "a blue wall </s>", "white": "wall " * 9}
QUESTION = "what is it ?"


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of 37,000 numbers that was taught, in two seconds, an answer for each of three colors."""
    pytest.importorskip("transformers", minversion="5")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    used = {word for text in (QUESTION, *ANSWERS.values()) for word in text.split()} - {"</s>"}
    words = ["<pad>", "</s>", "<unk>", "<image>", *sorted(used)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = (
        "{% for part in messages[0]['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
        "{% endfor %}"
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8),
        text_config=LlamaConfig(**text, max_position_embeddings=1024),
        image_token_id=words.index("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        for color, answer in ANSWERS.items():
            picture = Image.new("RGB", (20, 16), color)
            batch = processor(text=[f"<image> {QUESTION} {answer}"], images=[picture], return_tensors="pt")
            labels = batch["input_ids"].clone()
            labels[:, : -len(answer.split())] = -100
            model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = 1
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_local_model_sees_the_photo_and_the_question(
    folder: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.iterdir():
        path.unlink()
    for color in ANSWERS:
        Image.new("RGB", (200, 160), color).save(folder / f"{color}.png")
    (folder / "white.png").rename(folder / "z.png")
    prompt = folder / "prompt"
    prompt.write_text(QUESTION)
    said: list[str] = []
    monkeypatch.setattr("apt_hooks.integrations.captioning.local.MAX_TOKENS", 20)
    with pytest.raises(AptError, match=r"1 of 3 photos have no caption, for the reasons above: z\.png"):
        run_caption(folder, subject="sks dog", local=str(tiny_llava), prompt_file=prompt, say=said.append)
    assert (folder / "red.txt").read_text() == "sks dog on a red floor\n"
    assert (folder / "blue.txt").read_text() == "a photo of sks dog, a blue wall\n"
    assert "z.png: no caption: the answer does not end within 20 tokens" in said[2]


def test_transformers_that_know_the_older_name_only_will_do(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from apt_hooks.integrations.captioning.local import LocalModel

    old: Any = types.ModuleType("transformers")
    old.AutoProcessor, old.utils = transformers.AutoProcessor, transformers.utils
    old.AutoModelForVision2Seq = transformers.AutoModelForImageTextToText
    monkeypatch.setitem(sys.modules, "transformers", old)
    model = LocalModel(str(tiny_llava))
    assert model.describe(Image.new("RGB", (16, 16), "red"), QUESTION, str.strip) == "sks dog on a red floor"


def test_the_token_of_the_begin_is_not_written_twice(tiny_llava: Path) -> None:
    from apt_hooks.integrations.captioning.local import LocalModel

    model: Any = LocalModel(str(tiny_llava))
    asked: list[dict[str, Any]] = []
    processor = model._processor

    class Watched:
        tokenizer = types.SimpleNamespace(bos_token="<s>")

        def apply_chat_template(self, *_args: Any, **_options: Any) -> str:
            return "<s><image> what"

        def __call__(self, **given: Any) -> Any:
            asked.append(given)
            return processor(text=["<image> what"], images=given["images"], return_tensors="pt")

    model._processor = Watched()
    model._inputs(Image.new("RGB", (16, 16)), QUESTION)
    model._processor.tokenizer.bos_token = None
    model._inputs(Image.new("RGB", (16, 16)), QUESTION)
    assert [given.get("add_special_tokens") for given in asked] == [False, None]


def _raising(failure: Exception) -> Callable[..., Any]:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise failure

    return fail


def test_a_model_that_fails_or_is_too_large_stops_the_run(
    folder: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    for failure, said in (
        (torch.cuda.OutOfMemoryError("8 GiB"), "GPU's memory is too small; take a smaller model or a lower --max-side"),
        (ValueError("`model_kwargs` are\nnot used"), r"fails at a photo \(`model_kwargs` are not used\)$"),
    ):
        monkeypatch.setattr(LlavaForConditionalGeneration, "generate", _raising(failure))
        with pytest.raises(AptError, match=said):
            caption(folder, local=str(tiny_llava))


def test_a_model_that_cannot_be_loaded_or_takes_no_question_is_one_line(
    folder: Path, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    empty = tmp_path / "empty"
    empty.mkdir()
    mute = shutil.copytree(tiny_llava, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    broken = shutil.copytree(tiny_llava, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    for model, said in (
        (empty, r"--local .*empty: cannot be loaded; name a folder that holds .*config\.json"),
        (broken, "--local .*broken: cannot be loaded"),
        (mute, "--local .*mute: takes no instruction about a picture"),
    ):
        with pytest.raises(AptError, match=said) as caught:
            caption(folder, local=str(model))
        assert "\n" not in str(caught.value) and not isinstance(caught.value, NoCaption)
    import torch
    import transformers

    for failure, said in (
        (ImportError("it requires num2words,\nrun pip"), "needs a package that is missing .it requires num2words, run"),
        (torch.cuda.OutOfMemoryError("8 GiB"), "the GPU's memory is too small"),
    ):
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", _raising(failure))
        with pytest.raises(AptError, match=f"--local x/y: {said}"):
            caption(folder, local="x/y")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AptError, match=r'--local needs transformers.*pip install "apt-hooks\[diffusers\]"'):
        caption(folder, local="x/y")
