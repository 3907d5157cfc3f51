"""The command `vitrine`: joins the commands of engine, export, serving and benchmarks."""

import signal
import sys
from typing import NoReturn

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


# The extra that brings a module; a module that is not here is a bug of ours, not of the user's.
EXTRAS = {
    "torch": "train",
    "diffusers": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "jinja2": "export",
    "ml_dtypes": "export",
    "nncf": "export",
    "onnx": "export",
    "onnxscript": "export",
    "skimage": "export",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "peft": "export",
    "sentencepiece": "export",
    "tensorrt": "tensorrt",
    "transformers": "train",
    "tritonclient": "triton",
}


def main() -> None:
    """Run the command line; exit 0 good, 1 a check fell short, 2 wrong use."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        app()
    except SystemExit as leaving:  # typer has said on stderr what is wrong
        if leaving.code == 2:
            emit({"error": "wrong use of the command; stderr says how"}, as_json=_wants_json())
        raise
    except VitrineError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in EXTRAS:
            raise
        _fail(f"{module} is not installed; pip install 'vitrine[{EXTRAS[module]}]'", 2)
    except OSError as error:
        _fail(f"{error.strerror or error}: '{error.filename}'" if error.filename else str(error), 2)


def _fail(message: str, code: int) -> NoReturn:
    console.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    emit({"error": message}, as_json=_wants_json())
    sys.exit(code)


def _wants_json() -> bool:
    return "--json" in sys.argv


if __name__ == "__main__":
    main()
