"""`vitrine demo`."""

import typer

app = typer.Typer()
