"""`apt-hooks caption`: asks a model about each photo of a folder and writes what it says beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from apt_hooks.errors import AptError
from apt_hooks.files import write_atomically

from .answers import CLIP_TOKENS, NoCaption, caption_of, estimated_tokens
from .endpoint import KEY_NAME, Endpoint
from .photos import caption_file, find_photos, jpeg, load_photo, unseen_folders

GIVE_UP_AFTER = 3
"""Photos in a row that the model gives nothing for: the next ones would hardly fare better."""

Say = Callable[[str], None]


class Captioner(Protocol):
    """`Endpoint` or `LocalModel`."""

    def describe(self, picture: Any, prompt: str, read: Callable[[str], str]) -> str:
        """The caption of a picture of `load_photo`; raises `NoCaption` where there is none."""


def run_caption(
    folder: Path,
    *,
    subject: str,
    class_word: str | None = None,
    endpoint: str | None = None,
    model: str | None = None,
    key_name: str = KEY_NAME,
    local: str | None = None,
    prompt_file: Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    retries: int = 4,
    timeout: float = 120.0,
    max_side: int = 1024,
    say: Say,
) -> list[Path]:
    """Write a caption beside each photo: `photo.txt` for `photo.jpg`, one line of UTF-8, as soon as it is there.

    A `.txt` that is there, even an empty one, is left alone, so a stopped run goes on where it stopped.

    Args:
        folder: holds the photos, or sd-scripts' folders of photos (`find_photos`).
        subject: what captions call the subject, as "sks dog".
        class_word: what the subject is, for the prompt; None: the last word of `subject`, if it has several.
        endpoint, model: address of an OpenAI-compatible server, up to `/v1`, and the model's name there.
        key_name: environment variable with the server's key; the default one may be missing.
        local: in place of both, a vision-language model of transformers: a folder, or a name on the hub.
        prompt_file: asked in place of `prompt.md`; `{subject}` and `{class_word}` in it are filled in.
        overwrite: replace captions that are there.
        dry_run: say what would be asked and written, ask and write nothing; needs neither endpoint nor local.
        retries: tries after the first, for what may pass.
        timeout: seconds without a sign of the server.
        max_side: pixels; longer photos are shown smaller.
        say: takes each line of text for the user.

    Returns:
        The files written, or with `dry_run` the files that would be.

    Raises:
        AptError: bad input, a server or a model that does not work, or, at the end, photos without a caption.
    """
    subject = " ".join(subject.split())
    _check_choice(endpoint, model, local, dry_run=dry_run)
    _check_numbers(retries, timeout, max_side)
    if not subject:
        raise AptError('--subject must hold the words that captions call the subject by, as "sks dog"; it is empty')
    prompt = read_prompt(prompt_file, subject, class_word)
    photos = find_photos(folder)
    if others := unseen_folders(folder):
        say(f"not looked into: {', '.join(others)} (of folders in {folder}, those named as 10_sks dog are)")
    run = _CaptioningRun(folder, subject, prompt, overwrite, max_side, say)
    if dry_run:
        return run.rehearse(photos)
    if not overwrite and all(caption_file(photo).exists() for photo in photos):
        run.kept = [caption_file(photo) for photo in photos]  # and no model is loaded
    else:
        captioner: Captioner
        if endpoint is not None and model is not None:
            key = read_key(key_name)
            captioner = Endpoint(endpoint, model, key=key, key_name=key_name, retries=retries, timeout=timeout, say=say)
            say(f"asking {model} at {captioner.host}, with{'out a' if key is None else ' the'} key in {key_name}")
        else:
            from .local import LocalModel

            captioner = LocalModel(str(local))
        with _bar(len(photos)) as advance:
            for number, photo in enumerate(photos, start=1):
                run.caption(photo, f"[{number}/{len(photos)}] {run.name(photo)}", captioner)
                advance()
    run.report()
    return run.written


def read_prompt(path: Path | None, subject: str, class_word: str | None = None) -> str:
    """The prompt, filled in.

    Args:
        path: the user's own; None: `prompt.md`.

    Raises:
        AptError: the file cannot be read, or is empty.
    """
    try:
        text = (path or resources.files(__package__) / "prompt.md").read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise AptError(f"--prompt {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text:
        raise AptError(f"--prompt {path}: is empty")
    words = subject.split()
    class_word = class_word or (words[-1] if len(words) > 1 else "subject")
    return text.replace("{subject}", subject).replace("{class_word}", class_word)


def read_key(name: str) -> str | None:
    """The key in an environment variable; None where there is none of the default name.

    Raises:
        AptError: a variable that was named is missing, or holds what cannot be a key; its value is not told.
    """
    key = os.environ.get(name, "").strip()
    if not key:
        if name != KEY_NAME:
            raise AptError(f"the environment has no {name}, which is to hold the key of --endpoint")
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise AptError(f"{name}: holds no key, which is one word of ASCII; is something else in it?")
    return key


@dataclasses.dataclass
class _CaptioningRun:
    folder: Path
    subject: str
    prompt: str
    overwrite: bool
    max_side: int
    say: Say
    written: list[Path] = dataclasses.field(default_factory=list)
    kept: list[Path] = dataclasses.field(default_factory=list)
    failed: list[Path] = dataclasses.field(default_factory=list)
    failed_in_a_row: int = 0
    long: int = 0

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.folder)).encode(errors="replace").decode()  # names may be no Unicode

    def caption(self, photo: Path, name: str, captioner: Captioner) -> None:
        """One photo, from looking whether it needs a caption to its file."""
        file = caption_file(photo)
        if self._keeps(file) or (picture := self._load(photo, name)) is None:
            return
        try:
            caption = captioner.describe(picture, self.prompt, lambda answer: caption_of(answer, self.subject))
        except NoCaption as error:
            self.failed.append(photo)
            self.failed_in_a_row += 1
            if self.failed_in_a_row == GIVE_UP_AFTER:
                raise AptError(
                    f"{photo}: {error}; that is {GIVE_UP_AFTER} photos in a row, so the others are not tried "
                    f"(captions written: {len(self.written)}; run again to go on)"
                ) from error
            self.say(f"{name}: no caption: {error}")
            return
        self.failed_in_a_row = 0
        if self._keeps(file):  # since the model was asked
            return
        write_atomically(file, f"{caption}\n".encode())
        self.written.append(file)
        self.say(f"{name}: {caption}")
        if (tokens := estimated_tokens(caption)) > CLIP_TOKENS:
            self.say(f"warning: {self.name(file)} has some {tokens} tokens (an estimate); CLIP reads {CLIP_TOKENS}")
            self.long += 1

    def report(self) -> None:
        """What came of it; raises AptError where photos have no caption."""
        say, kept = self.say, len(self.kept)
        say(f"captions written: {len(self.written)}" + (f"; left as they were: {kept}" if kept else ""))
        if empty := [self.name(file) for file in self.kept if not file.stat().st_size]:
            say(f"warning: empty, at which sd-scripts stops: {', '.join(empty)}; delete them and run again")
        if self.long:
            say(
                f"warning: captions that may be longer than the {CLIP_TOKENS} tokens that CLIP reads: {self.long}; "
                "trainers cut the rest off (sd-scripts: unless max_token_length = 150 or 225)"
            )
        if self.written or kept:
            say('sd-scripts reads them with caption_extension = ".txt", which is not its default')
        if self.failed:
            names = ", ".join(self.name(photo) for photo in self.failed)
            count = len(self.written) + kept + len(self.failed)
            raise AptError(f"{len(self.failed)} of {count} photos have no caption, for the reasons above: {names}")

    def rehearse(self, photos: list[Path]) -> list[Path]:
        """The files that would be written, and in lines how; nothing is asked, nothing written."""
        self.say(f"would be asked about each photo:\n\n{self.prompt}\n")
        files = []
        for photo in photos:
            name, file = self.name(photo), caption_file(photo)
            there = file.exists()
            if there and not self.overwrite:
                self.say(f"{name}: {file.name} is there and stays as it is")
            elif (picture := self._load(photo, name)) is not None:
                files.append(file)
                shown = f"{picture.width}x{picture.height} pixels, {math.ceil(len(jpeg(picture)) / 1000)} kB"
                self.say(f"{name}: shown as {shown}; caption into {file.name}" + (", replacing it" if there else ""))
        self.say(f"nothing asked, nothing written; captions to be written: {len(files)}")
        if self.failed:
            raise AptError(f"{len(self.failed)} of {len(photos)} photos cannot be read, as said above")
        return files

    def _keeps(self, file: Path) -> bool:
        kept = file.exists() and not self.overwrite
        self.kept += [file] if kept else []
        return kept

    def _load(self, photo: Path, name: str) -> Any:
        """The picture; None where it cannot be read, which is said."""
        try:
            return load_photo(photo, self.max_side)
        except NoCaption as error:
            self.failed.append(photo)
            self.say(f"{name}: {error}")
            return None


def _check_choice(endpoint: str | None, model: str | None, local: str | None, *, dry_run: bool) -> None:
    if endpoint is not None and local is not None:
        raise AptError("--endpoint asks a server, --local a model on this machine; leave one of them out")
    if endpoint is None and model is not None:
        raise AptError("--model is a model's name at --endpoint, which is missing; a model on this machine is --local")
    if endpoint is None and local is None and not dry_run:
        raise AptError("name what writes the captions: --endpoint ADDRESS --model NAME, or --local MODEL")
    if endpoint is not None and not model and not dry_run:
        raise AptError("--endpoint needs --model, a model's name there; llama.cpp's server takes any")


def _check_numbers(retries: int, timeout: float, max_side: int) -> None:
    if retries < 0:
        raise AptError(f"--retries must be 0 or more; found {retries}")
    if not 0 < timeout < math.inf:
        raise AptError(f"--timeout must be a number of seconds above 0; found {timeout:g}")
    if max_side < 64:
        raise AptError(f"--max-side must be 64 pixels or more; found {max_side}")


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar below the lines, where rich is installed and a terminal shows it; gives what moves it on."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        Progress = None  # type: ignore[assignment,misc]
    if Progress is None or not Console().is_terminal:
        yield lambda: None
        return
    with Progress(transient=True) as progress:
        task = progress.add_task("captions", total=total)
        yield lambda: progress.advance(task)
