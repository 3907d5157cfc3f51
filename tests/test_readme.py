"""The README's commands run as they stand, and its table is made from the committed result."""

import gzip
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import save

from benchmarks.readme import demo_table, selection_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_tables_are_made_from_the_committed_results() -> None:
    assert f"demo.json -->\n{demo_table()}\n<!-- end" in README
    assert f"selection.json -->\n{selection_table()}\n<!-- end" in README


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"\]\(([^)]+)\)|`((?:engine|benchmarks|checkpoints)/[\w./-]+)`", README)
    for path in [a or b for a, b in named]:
        assert (ROOT / path).exists(), path


def test_both_make_targets_of_the_readme_exist() -> None:
    for target, command in (("demo", "vitrine demo"), ("test", "pytest")):
        assert f"    make {target} " in README
        dry_run = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert command in dry_run.stdout


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with the shipped checkpoints and ten classes of made-up photos."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    data = tmp_path / "data" / "fashion-mnist"
    data.mkdir(parents=True)
    (tmp_path / "models").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (80, 28, 28), np.uint8)
    labels = (np.arange(80) % 10).astype(np.uint8)
    for name, magic, array in (
        ("train-images-idx3-ubyte.gz", 0x0803, pixels),
        ("train-labels-idx1-ubyte.gz", 0x0801, labels),
    ):
        header = struct.pack(f">I{array.ndim}I", magic, *array.shape)
        (data / name).write_bytes(gzip.compress(header + array.tobytes()))
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_of_the_readme_run_in_order(workspace: Path) -> None:
    train, generate, auto, baseline, diffusers, serve, curl = blocks("sh")
    run(train.replace("my-gan", "my-gan --steps 2"), workspace)
    run(generate, workspace)
    pictures = sorted(path.name for path in (workspace / "runs" / "sneakers").iterdir())
    assert pictures == ["10.png", "7.png", "8.png", "9.png"]
    assert Image.open(workspace / "runs" / "sneakers" / "7.png").size == (32, 32)
    run(auto.replace("diffusion", "gan").replace("--auto", "--auto --pictures 4"), workspace)
    assert (workspace / "artifacts" / "fashion-gan" / "quality" / "report.html").is_file()
    shutil.rmtree(workspace / "artifacts" / "fashion-gan")
    run(baseline, workspace)
    save("stable-diffusion", workspace / "tiny").rename(workspace / "models/stable-diffusion-v1-5")
    run(diffusers, workspace)
    for picture in ("shoe/7.png", "green-shoe/7.png"):
        assert Image.open(workspace / "runs" / picture).mode == "RGB"
    export, command = serve.strip().splitlines()
    run(export, workspace)
    with serving(command, workspace) as (http, grpc):
        for code in blocks("python"):
            python = [sys.executable, "-c", code.replace("8001", grpc) + "\nprint(image.shape)"]
            answer = subprocess.run(
                python, cwd=workspace, capture_output=True, text=True, check=False
            )
            assert answer.stdout == "(32, 32, 1)\n", answer.stderr
        assert '"datatype":"UINT8"' in run(curl.replace("8000", http), workspace)


def run(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@contextmanager
def serving(command: str, folder: Path) -> Iterator[tuple[str, str]]:
    """The README's server on free ports instead of 8000, 8001 and 8002."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    http, grpc, metrics = (str(listener.getsockname()[1]) for listener in sockets)
    for listener in sockets:
        listener.close()
    ports = f" --http-port {http} --grpc-port {grpc} --metrics-port {metrics}"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}{ports} --json"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith('{"models"')
        yield http, grpc
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
