"""Stable Diffusion 1.5's U-Net and VAE decoder in their own size: export, memory, one call."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEMORY_LIMIT_GIB = 16

# The largest difference to torch's float32 answer, relative to its largest value. The issue asks
# for 1e-3 in float32; 1e-6 (U-Net) and 2e-5 (decoder) were measured. In float16, 11 bits, one
# rounding is 5e-4; 7e-4 and 1.4e-3 were measured for the whole networks.
BOUNDS = {"fp32": 1e-3, "fp16": 5e-3}
PARAMETERS = {"unet": 859_520_964, "vae_decoder": 83_653_863}  # the VAE with its encoder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_a_full_size_network_exports_within_memory_and_agrees_with_torch(
    name: str, tmp_path: Path
) -> None:
    run("save", name, "fp32", tmp_path)
    for precision, bound in BOUNDS.items():
        report = json.loads(run("export", name, precision, tmp_path))
        assert report["parameters"] == PARAMETERS[name]
        assert report["peak_gib"] <= MEMORY_LIMIT_GIB
        report |= json.loads(run("compare", name, precision, tmp_path))
        assert report["difference"] <= bound
        print(name, precision, report)


def run(action: str, name: str, precision: str, folder: Path) -> str:
    """The last line of a process of its own, whose peak memory is that of this action."""
    script = ROOT / "tests/full_size.py"
    command = [sys.executable, str(script), action, name, precision, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return (done.stdout.splitlines() or [""])[-1]
