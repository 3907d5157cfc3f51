"""Where commands speak: people on stderr, one JSON document for programs on stdout."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

console = Console(stderr=True, highlight=False, soft_wrap=True)  # lines can be copied whole

Progress = Callable[[str], None]  # says what a long command does now
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")
]


def emit(result: Mapping[str, object], as_json: bool) -> None:
    """Print a command's result as one line of JSON where the user asked for it."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False), flush=True)


@contextmanager
def progress(first: str) -> Iterator[Progress]:
    """What a long command does now: one line that changes, or in a log a line each."""
    if not console.is_terminal:
        console.print(first, markup=False)
        yield lambda text: console.print(text, markup=False)
        return
    with console.status(escape(first)) as status:
        yield lambda text: status.update(escape(text))
