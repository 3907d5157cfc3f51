"""`vitrine train` and `vitrine generate`."""

from pathlib import Path
from typing import Annotated

import typer

from engine.backends.spec import Provider
from engine.console import AsJson, console, emit
from engine.samplers import SAMPLERS

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
    output: Annotated[Path, typer.Option(help="folder for <seed>.png")],
    label: Annotated[str | None, typer.Option(help="class name, for a model with classes")] = None,
    prompt: Annotated[str | None, typer.Option(help="text, for a model that takes one")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="what guidance leads away from")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the first picture")] = 0,
    count: Annotated[int, typer.Option(help="pictures, of seeds seed..seed+count-1", min=1)] = 1,
    steps: Annotated[int | None, typer.Option(help="num_inference_steps, 1..1000")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is off")] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLERS)}")] = None,
    height: Annotated[int | None, typer.Option(help="default: the model's, or the image's")] = None,
    width: Annotated[int | None, typer.Option(help="default: the model's, or the image's")] = None,
    image: Annotated[Path | None, typer.Option(help="picture to start from")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="white is painted anew; inpainting models")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="how much of --image changes, up to 1")
    ] = None,
    postprocess: Annotated[
        str | None, typer.Option(help="of the finished picture: sharpen=0.5,contrast=1.1")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="default: the artifact's selected one")
    ] = None,
    provider: Annotated[
        Provider, typer.Option(help="of ONNX Runtime; auto: cuda where it is installed, else cpu")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Make pictures; the same seed is the same picture, however many are made."""
    from engine.errors import OptionError
    from engine.images import read_picture, save_png
    from engine.pipeline import open_pipeline
    from engine.request import Request

    options = {
        "label": label, "prompt": prompt, "negative_prompt": negative_prompt,
        "num_inference_steps": steps, "guidance_scale": guidance_scale, "sampler": sampler,
        "height": height, "width": width, "strength": strength,
        "image": None if image is None else read_picture(image, 3),
        "mask": None if mask is None else read_picture(mask, 1),
        "postprocess": postprocess,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    seeds = range(seed, seed + count)
    requests = [Request.of({**given, "seed": number}) for number in seeds]
    if output.exists() and not output.is_dir():
        raise OptionError(f"output must be a folder, got the file '{output}'")
    with console.status(f"opening {model}"):
        pipeline = open_pipeline(model, variant, provider)
    files = []
    for number, picture in zip(seeds, pipeline.generate(requests), strict=True):
        files.append(output / f"{number}.png")
        save_png(files[-1], picture)
    pipeline.close()
    console.print(f"{count} picture{'s' * (count > 1)} in {output}", markup=False)
    emit({"files": [str(file) for file in files]}, as_json)
