"""Rows through networks: a picture does not depend on what it was batched with."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ArtifactError
from engine.noise import noise
from engine.pipeline import Pipeline, open_pipeline
from engine.request import Request
from export.requests import gate_requests


@pytest.mark.parametrize("max_rows", [2, 3, 7, 24])
def test_a_picture_has_the_same_bytes_alone_and_in_any_batch(
    diffusion: Pipeline, gan: Pipeline, max_rows: int
) -> None:
    for pipeline in (diffusion, gan):
        requests = gate_requests(pipeline.model, 24)
        together = pipeline.generate(requests, max_rows)
        for request, picture in zip(requests, together, strict=True):
            alone = next(pipeline.generate([request]))
            assert picture.tobytes() == alone.tobytes(), request


def test_a_row_joining_mid_flight_matches_running_alone(diffusion: Pipeline) -> None:
    early, late = gate_requests(diffusion.model, 12)[10:]
    first, second = diffusion.admit(early), diffusion.admit(late)
    for _ in range(5):
        diffusion.tick([first])
    while rows := [row for row in (second, first) if not row.done]:
        diffusion.tick(rows)
    for request, row in ((early, first), (late, second)):
        assert np.array_equal(diffusion.finish(row), next(diffusion.generate([request])))


def test_pictures_of_different_seeds_and_labels_differ(diffusion: Pipeline) -> None:
    requests = [Request(label=label, seed=seed) for label in ("bag", "boot") for seed in (0, 1)]
    assert len({picture.tobytes() for picture in diffusion.generate(requests)}) == 4


def test_a_row_starts_with_the_noise_of_its_seed(diffusion: Pipeline) -> None:
    row = diffusion.admit(Request(label="bag", seed=3, sampler="ddim"))
    assert np.array_equal(row.x, noise(3, (1, 16, 16)))


def test_guidance_of_one_makes_one_evaluation_and_more_makes_two(diffusion: Pipeline) -> None:
    one, two = (diffusion.admit(Request(label="bag", guidance_scale=scale)) for scale in (1.0, 1.5))
    assert len(one.conditioning) == 1
    assert [int(feed["label"]) for feed in two.conditioning] == [0, 3]


def test_a_gan_is_one_step(gan: Pipeline) -> None:
    row = gan.admit(Request(label="bag", seed=1))
    assert row.steps == 1
    gan.tick([row])
    assert row.done
    assert gan.finish(row).shape == (16, 16, 1)


def run_python(code: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_running_an_artifact_imports_neither_torch_nor_diffusers(diffusion_artifact: Path) -> None:
    loaded = run_python(
        "import sys; from pathlib import Path\n"
        "from engine.pipeline import open_pipeline; from engine.request import Request\n"
        "next(open_pipeline(Path(sys.argv[1])).generate([Request(label='bag')]))\n"
        "print({'torch', 'diffusers', 'skimage'} & set(sys.modules))",
        diffusion_artifact,
    )
    assert loaded == "set()\n"


@pytest.mark.parametrize(
    ("module", "fixture", "extra"),
    [
        ("onnxruntime", "diffusion_artifact", "vitrine[cpu]"),
        ("torch", "diffusion_checkpoint", "vitrine[export]"),
        ("diffusers", "gan_checkpoint", "vitrine[export]"),
    ],
)
def test_a_missing_runtime_names_its_extra(
    module: str, fixture: str, extra: str, request: pytest.FixtureRequest
) -> None:
    message = run_python(
        f"import sys; sys.modules[{module!r}] = None\n"
        "from pathlib import Path; from engine.pipeline import open_pipeline\n"
        "from engine.errors import RuntimeUnavailableError\n"
        "try: open_pipeline(Path(sys.argv[1]))\n"
        "except RuntimeUnavailableError as error: print(error)",
        request.getfixturevalue(fixture),
    )
    assert f"{module} is not installed; pip install '{extra}'" in message


def test_a_folder_that_is_neither_artifact_nor_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is neither an artifact .* nor a checkpoint"):
        open_pipeline(tmp_path)
