"""The page for raters, served to this machine alone.

A page of the web may lead a browser here, under a name that is that page's own (DNS rebinding) or with a form. So
requests under any name but this machine's are refused, as are votes that another page sends. Of the disk nothing is
sent but the page and the comparison's pictures, by their ids, without what else is in their files.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from apt_hooks.errors import AptError
from apt_hooks.images import bare_png

from .ballot import Ballot
from .booth import Booth, Refused, checked_rater
from .folders import read_comparison
from .intervals import student_t
from .result import count_votes, table

ADDRESS = "127.0.0.1"
LONGEST_SIDE = 1536  # of a picture as it is sent, in pixels
LARGEST_POST = 4096  # bytes

_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_PAGE = {
    "/": ("rater.html", "text/html; charset=utf-8"),
    "/rater.css": ("rater.css", "text/css; charset=utf-8"),
    "/rater.js": ("rater.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(
    folders: Sequence[Path],
    votes: Path,
    *,
    references: Path | None,
    port: int,
    methods: Sequence[str] | None,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Serve the page until Ctrl-C, then print the result.

    Args:
        folders, references, methods: as for `read_comparison`.
        votes: file that the votes are added to; one of the same comparison may be continued.
        port: of this machine; 0: any free one.
        seed: of the order in which raters see items and methods.
        say: takes each line of text for the user.

    Raises:
        AptError: as `read_comparison`, `Ballot` and `VoteFile`; votes of another comparison; a port that is in use.
    """
    ballot = Ballot(read_comparison(folders, references=references, methods=methods), seed)
    bare_png(ballot.comparison.references[0], LONGEST_SIDE)  # without Pillow no picture can be sent,
    student_t(1)  # without scipy there is no result of the votes: say so now
    with Booth(ballot, votes) as booth, _listen(port, booth, say) as server:
        number = server.server_address[1]
        try:
            say(f"{len(ballot.items)} pages of {len(ballot.methods)} methods; {len(booth.file.votes)} votes in {votes}")
            tunnel = f"ssh -L {number}:{ADDRESS}:{number} THIS-MACHINE"
            say(f"open http://{ADDRESS}:{number}/ (on another machine after {tunnel})")
            say("Ctrl-C ends it and prints the result")
            server.serve_forever()
        except KeyboardInterrupt:
            say("")  # the terminal has ^C in this line
        for line in table(count_votes(booth.file.votes)) if booth.file.votes else ["no votes yet"]:
            say(line)


def _listen(port: int, booth: Booth, tell: Callable[[str], None]) -> Server:
    try:
        return Server(port, booth, tell)
    except (OSError, OverflowError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "is in use" if in_use else f"cannot be had ({error})"
        raise AptError(f"port {port} {why}; choose another by --port") from error


class Server(ThreadingHTTPServer):
    """Serves a booth, here and to nobody else; `serve_forever`, and `server_close` in the end.

    Args:
        port: 0: any free one.
        tell: takes a line for the user where a request fails through no fault of the rater's.

    Raises:
        OSError: the port is in use, or may not be used.
    """

    allow_reuse_address = os.name != "nt"  # there it would let two servers have the same port

    def __init__(self, port: int, booth: Booth, tell: Callable[[str], None]) -> None:
        self.booth = booth
        self.tell = tell
        self.page = {
            path: (resources.files(__package__).joinpath(name).read_bytes(), kind)
            for path, (name, kind) in _PAGE.items()
        }
        super().__init__((ADDRESS, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone, or reloads, in the middle of an answer is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a connection may be silent

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, method: Callable[[], tuple[bytes, str]]) -> None:
        try:
            self._check_host()
            content, kind = method()
        except Refused as error:
            self.send_error(error.status, str(error))
        except AptError as error:
            self.server.tell(str(error))
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, "this could not be done; the terminal says why")
        else:
            self._send(HTTPStatus.OK, content, kind)

    def _check_host(self) -> None:
        if not _LOOPBACK.fullmatch(self.headers.get("Host", "")):
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, f"this is served as {ADDRESS} and localhost only")

    def _url(self) -> SplitResult:
        try:
            return urlsplit(self.path)
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "that is no address") from error

    def _get(self) -> tuple[bytes, str]:
        url = self._url()
        if url.path in self.server.page:
            return self.server.page[url.path]
        if url.path == "/form":
            rater = checked_rater(" ".join(parse_qs(url.query).get("rater", [])))
            return _json(self.server.booth.form(rater))
        path = self.server.booth.pictures.get(url.path.removeprefix("/picture/"))
        if path is None or not url.path.startswith("/picture/"):
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        return bare_png(path, LONGEST_SIDE), "image/png"

    def _post(self) -> tuple[bytes, str]:
        content = self._body()
        if self._url().path != "/vote":
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        if self.headers.get("Origin", f"http://{self.headers['Host']}") != f"http://{self.headers['Host']}":
            raise Refused(HTTPStatus.FORBIDDEN, "votes are taken from this page only")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a vote is application/json")
        try:
            posted = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "a vote is JSON") from error
        self.server.booth.vote(posted)
        return _json({"saved": True})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length, re.ASCII):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a vote has a Content-Length")
        if int(length) > LARGEST_POST:
            self.rfile.read(min(int(length), 2**20))  # else the answer would be lost on the way
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a vote has at most {LARGEST_POST} bytes")
        return self.rfile.read(int(length))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As plain text of one line; also what the base class answers, to a request that is none for example."""
        self.close_connection = True  # what is left of the request is not read
        status = HTTPStatus(code)
        self._send(status, f"{message or status.phrase}\n".encode(), "text/plain; charset=utf-8")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        # A picture stays what its id stands for; all else may have changed.
        self.send_header("Cache-Control", "private, max-age=86400" if kind == "image/png" else "no-store")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def version_string(self) -> str:
        return "apt-hooks"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for the user."""


def _json(value: object) -> tuple[bytes, str]:
    return json.dumps(value).encode(), "application/json"
