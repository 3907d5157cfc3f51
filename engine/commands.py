"""`vitrine train` and `vitrine generate`."""

from pathlib import Path
from typing import Annotated

import typer

from engine.console import AsJson, console, emit

app = typer.Typer()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="a TOML file; checkpoints/*/train.toml are two")],
    output: Annotated[Path, typer.Option(help="the checkpoint to write, or to go on with")],
    data: Annotated[str | None, typer.Option(help="replaces data.path of the config")] = None,
    steps: Annotated[int | None, typer.Option(help="replaces steps of the config")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a GAN or a diffusion model; the same command goes on after a stop."""
    from engine.training.config import read_config

    resolved = read_config(config, data_path=data, steps=steps)
    from engine.training.loop import train as run_training

    done = run_training(resolved, output, console)
    finished = done >= resolved.steps
    state = "trained" if finished else f"stopped at step {done}; the same command goes on"
    console.print(f"{output}: {state}")
    emit({"checkpoint": str(output), "steps": done, "finished": finished}, as_json)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="a checkpoint (runs on torch) or an artifact")],
    label: Annotated[str, typer.Option(help="class name")],
    output: Annotated[Path, typer.Option(help="folder for <seed>.png")],
    seed: Annotated[int, typer.Option(help="of the first picture")] = 0,
    count: Annotated[int, typer.Option(help="pictures, of seeds seed..seed+count-1", min=1)] = 1,
    steps: Annotated[int | None, typer.Option(help="num_inference_steps, 1..1000")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is off")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, flow_euler")] = None,
    variant: Annotated[
        str | None, typer.Option(help="default: the artifact's selected one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make pictures; the same seed is the same picture, however many are made."""
    from engine.errors import OptionError
    from engine.images import save_png
    from engine.pipeline import open_pipeline
    from engine.request import Request

    options = {
        "num_inference_steps": steps, "guidance_scale": guidance_scale, "sampler": sampler,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    seeds = range(seed, seed + count)
    requests = [Request.of(label, {**given, "seed": number}) for number in seeds]
    if output.exists() and not output.is_dir():
        raise OptionError(f"output must be a folder, got the file '{output}'")
    pipeline = open_pipeline(model, variant)
    files = []
    for number, picture in zip(seeds, pipeline.generate(requests), strict=True):
        files.append(output / f"{number}.png")
        save_png(files[-1], picture)
    console.print(f"{count} of {label} in {output}")
    emit({"files": [str(file) for file in files]}, as_json)
