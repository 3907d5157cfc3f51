"""Where commands speak: people on stderr, one JSON document for programs on stdout."""

import json
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)  # lines can be copied whole

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")
]


def emit(result: Mapping[str, object], as_json: bool) -> None:
    """Print a command's result as one line of JSON where the user asked for it."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False), flush=True)
