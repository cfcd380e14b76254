"""The command that writes captions of training photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command(
    epilog="Examples: `apt-hooks caption photos/ --subject 'sks dog' --endpoint http://localhost:11434/v1 "
    "--model llava`, `apt-hooks caption photos/ --subject 'sks dog' --local MODEL`"
)
def caption(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Photos, or sd-scripts' folders such as `10_sks dog`.")],
    subject: Annotated[str, typer.Option(help="What captions call the subject: `sks dog`.")],
    class_word: Annotated[str | None, typer.Option(help="What it is; the subject's last word if not given.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server, up to /v1: llama.cpp, Ollama, OpenAI, ...")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --endpoint: the model's name there.")] = None,
    local: Annotated[
        str | None, typer.Option(help="In place of both: a vision-language model of transformers, folder or name.")
    ] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="File with a prompt of your own; {subject} and {class_word} are filled in.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace captions that are there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be asked and written; do neither.")
    ] = False,
    key_name: Annotated[
        str, typer.Option(help="Environment variable with the server's key, where it wants one.")
    ] = "OPENAI_API_KEY",
    retries: Annotated[int, typer.Option(min=0, help="Tries after the first.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the server.")] = 120.0,
    max_side: Annotated[int, typer.Option(help="Pixels; larger photos are shown smaller.")] = 1024,
) -> None:
    """Describe each photo's background in detail and its subject as plainly as possible, in a .txt beside it."""
    from apt_hooks.integrations.captioning.captions import run_caption

    run_caption(
        folder,
        subject=subject,
        class_word=class_word,
        endpoint=endpoint,
        model=model,
        key_name=key_name,
        local=local,
        prompt_file=prompt,
        overwrite=overwrite,
        dry_run=dry_run,
        retries=retries,
        timeout=timeout,
        max_side=max_side,
        say=typer.echo,
    )
