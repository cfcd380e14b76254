"""Captions from a server that speaks OpenAI's chat completions: OpenAI's own, llama.cpp's, Ollama, vLLM and others.

By urllib: what is long here is what a status, a message or an answer means for the photo and for the run, and that is
the same over any client. Over httpx 0.28 this file was 13 lines shorter, for six packages more in a trainer's
environment. The package `openai` (3.57) follows redirects with the photo, waits without a word, and sends
OPENAI_ORG_ID and OPENAI_PROJECT_ID of the environment to whatever server is named.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from apt_hooks.errors import AptError

from .answers import BadAnswer, NoCaption, shorten
from .photos import data_uri

KEY_NAME = "OPENAI_API_KEY"
"""Environment variable that holds a server's key, unless another one is named."""

ANSWER_LIMIT = 4 * 2**20
"""Bytes; a caption with its reasoning has some thousands."""

MAX_TOKENS = 2000  # room for the reasoning of models that reason; without a limit a small one may never stop
LONGEST_WAIT = 600.0  # seconds; who is asked to wait longer comes back later
_LONGEST_BACKOFF = 60.0
_TEMPERATURE_AGAIN = 0.7  # at 0, the same question would get the same bad answer
# OpenAI's newer models refuse these with a 400 that names them; None: to be left out.
_ALTERNATIVES = {"max_tokens": "max_completion_tokens", "temperature": None}


class _TryAgain(NoCaption):
    """A failure that may pass; `wait` in seconds, if the server named it."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Endpoint:
    """A server that captions one photo at a time.

    Failures that may pass (429, 5xx, timeouts, broken connections, answers that are no captions) are tried again:
    after 1, 2, 4, ... seconds or as long as `Retry-After` says, a bad answer at once. Redirects are not followed, so
    that neither key nor photo goes to a host that the user did not name.

    Args:
        address: up to and with `/v1`; `/chat/completions` is added where it is missing.
        model: its name on the server.
        key: sent as bearer token; None: no such header.
        key_name: what the user calls the key, for messages.
        retries: tries after the first.
        timeout: seconds without a sign of the server.
        say: takes each line of text for the user.
        sleep: waits for seconds.

    Raises:
        AptError: an address that is none.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        key: str | None = None,
        key_name: str = KEY_NAME,
        retries: int = 4,
        timeout: float = 120.0,
        say: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = _split(address)
        path = parts.path.rstrip("/")
        self._url = urlunsplit(parts._replace(path=path.removesuffix("/chat/completions") + "/chat/completions"))
        self.host = parts.netloc
        self._shown = urlunsplit(parts._replace(path=path, query=""))  # a query may hold a secret
        self._model, self._key, self._key_name = model, key, key_name
        self._retries, self._timeout, self._say, self._sleep = retries, timeout, say, sleep
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}
        self._headers = {"Content-Type": "application/json", "User-Agent": "apt-hooks"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
            if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
                say(f"warning: {key_name} is sent to {self.host} unencrypted; use https:// if the server has it")
        self._opener = _opener()

    def describe(self, picture: Any, prompt: str, read: Callable[[str], str]) -> str:
        """The caption of a picture.

        Args:
            picture: of `load_photo`.
            prompt: what is asked.
            read: from an answer to a caption; raises `BadAnswer` where it is none.

        Raises:
            NoCaption: this photo gets none, after as many tries as make sense.
            AptError: no photo would get one: key, model or address are wrong, or no server is there.
        """
        image = {"type": "image_url", "image_url": {"url": data_uri(picture)}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]
        body: dict[str, Any] = {"model": self._model, "messages": messages, "stream": False}
        failures = bad_answers = 0
        while True:
            try:
                return read(self._answer(body, again=bad_answers > 0))
            except (BadAnswer, _TryAgain) as error:
                if failures >= self._retries:
                    raise NoCaption(f"{error} (tries: {failures + 1})") from error
                if isinstance(error, BadAnswer):
                    bad_answers += 1
                else:
                    wait = min(_LONGEST_BACKOFF, 2.0**failures) if error.wait is None else error.wait
                    self._say(f"{error}; next try in {wait:.3g} s")
                    self._sleep(wait)
                failures += 1

    def _answer(self, body: dict[str, Any], *, again: bool) -> str:
        """What the model says."""
        while True:
            options = dict(self._options)
            if again and "temperature" in options:
                options["temperature"] = _TEMPERATURE_AGAIN
            try:
                found = self._post(body | options)
                break
            except _RefusedOption as error:
                value = self._options.pop(error.name)
                if (other := _ALTERNATIVES[error.name]) is not None:
                    self._options[other] = value
        if not isinstance(found, dict):
            raise AptError(f"{self._shown}: answers with something else than a chat completion; is the address right?")
        if found.get("error"):  # of gateways, with status 200
            raise _TryAgain(f"{self.host} reports: {self._clean(_message(found))}")
        try:
            choice = found["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            content, refusal = message.get("content"), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise BadAnswer(f"{self.host} answers without a message") from error
        if refusal:
            raise BadAnswer(f"the model refuses: {self._clean(str(refusal))}")
        if reason == "content_filter":
            raise BadAnswer("the answer was held back by the server's content filter")
        if reason == "length":
            raise BadAnswer(f"the answer was cut off: it is longer than {MAX_TOKENS} tokens or the model's context")
        if isinstance(content, list):  # of parts
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        return content if isinstance(content, str) else ""

    def _post(self, body: dict[str, Any]) -> Any:
        """The server's JSON."""
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = response.read(ANSWER_LIMIT + 1)
                if response.length and len(content) <= ANSWER_LIMIT:  # which read() with a limit does not tell
                    raise http.client.IncompleteRead(content, response.length)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        text = content.decode(errors="replace")
        if response.status >= 300:
            raise self._failure(response, self._clean(_message_in(text) or response.reason), body)
        if len(content) > ANSWER_LIMIT:
            raise AptError(f"{self._shown}: answers with more than {ANSWER_LIMIT // 2**20} MiB; is the address right?")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AptError(
                f"{self._shown}: answers with something else than JSON ({self._clean(text, 60)!r}); is the address "
                "right? It usually ends in /v1"
            ) from error

    def _broken(self, error: Exception) -> AptError:
        """What a failed connection means: worth another try, or not."""
        connected = not isinstance(error, urllib.error.URLError)
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return _TryAgain(f"{self.host} has not answered within {self._timeout:g} s")
        refused = isinstance(reason, ConnectionRefusedError)
        if connected or (isinstance(reason, ConnectionError) and not refused):
            return _TryAgain(f"{self.host} broke off the connection ({self._clean(str(reason), 80)})")
        why = self._clean(str(reason), 100)
        return AptError(f"{self._shown}: cannot be reached ({why}); is the server running, and the address right?")

    def _failure(self, response: http.client.HTTPResponse, message: str, sent: dict[str, Any]) -> AptError:
        """What a status of 300 or more means."""
        code = response.status
        said = f"{code} ({message})"
        if 300 <= code < 400:
            target = re.split(r"[?#]", response.headers.get("Location", ""))[0]  # a query may hold a secret
            return AptError(
                f"{self._shown}: answers with a redirect to {self._clean(target) or 'nowhere'}, which is not followed; "
                "name the server itself"
            )
        if code in (401, 403):
            was = "was not accepted" if self._key else "is not set"
            return AptError(f"{self._shown}: {said}; the key in {self._key_name} {was}")
        if code in (404, 405):
            return AptError(
                f"{self._shown}: {said}; is the model {self._model!r} there, and the address right? It usually ends "
                "in /v1"
            )
        if code == 402:
            return AptError(f"{self._shown}: {said}")
        if code == 400:
            for name in _ALTERNATIVES:
                if name in sent and re.search(rf"\b{name}\b", message):
                    return _RefusedOption(name)
        if code not in (408, 429) and code < 500:
            return NoCaption(f"{self.host} answers {said}")
        wait = _retry_after(response.headers.get("Retry-After"))
        if wait is not None and wait > LONGEST_WAIT:
            return AptError(f"{self._shown}: {said}, and asks to wait {wait:.0f} s; run the command again then")
        return _TryAgain(f"{self.host} answers {said}", wait)

    def _clean(self, text: str, length: int = 200) -> str:
        """Text of the server for the user: one short line, without the key that some echo."""
        return shorten(text.replace(self._key, "***") if self._key else text, length)


class _RefusedOption(AptError):
    def __init__(self, name: str) -> None:
        super().__init__(f"the server does not take {name}")
        self.name = name


def _opener() -> urllib.request.OpenerDirector:
    """urllib with the environment's proxies alone: no redirect is followed, every status is an answer like 200."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        opener.add_handler(handler)
    return opener


def _split(address: str) -> SplitResult:
    if "@" in address:  # first, as the other messages show it
        raise AptError("--endpoint must not have a user and a password in it; a key is read from the environment")
    try:
        parts = urlsplit(address.strip())
        parts.port  # noqa: B018  # raises where it is no number
    except ValueError as error:
        raise AptError(f"--endpoint {shorten(address, 80)}: is no address ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AptError(f"--endpoint must be like http://localhost:11434/v1; found {shorten(address, 80)}")
    if not address.isascii() or any(character.isspace() for character in address.strip()):
        raise AptError(f"--endpoint must be written without spaces and in ASCII; found {shorten(address, 80)}")
    return parts._replace(fragment="")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _message_in(text: str) -> str:
    """The message in a failure's body; none in a page of HTML."""
    try:
        return _message(json.loads(text))
    except (ValueError, RecursionError):
        return "" if not text.strip() or text.lstrip().startswith("<") else text


def _message(found: Any) -> str:
    """The message in an error of JSON, whose form differs by server."""
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), "")
    return found if isinstance(found, str) else json.dumps(found)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date; None where there is neither."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
