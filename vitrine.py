"""The command `vitrine`: joins the commands of engine, export, serving and benchmarks."""

import sys

import typer

import benchmarks.commands
import engine.commands
import export.commands
import serving.commands
from engine.console import console, emit
from engine.errors import VitrineError

app = typer.Typer(
    name="vitrine",
    help="Inference engine for product images: train, export, prove, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (engine.commands, export.commands, serving.commands, benchmarks.commands):
    app.add_typer(commands.app)


def main() -> None:
    """Run the command line; exit 0 good, 1 a check fell short, 2 wrong use."""
    try:
        app()
    except VitrineError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        emit({"error": str(error)}, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
