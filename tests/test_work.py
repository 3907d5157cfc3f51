"""The work of layers, against what torch's own counter says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.checkpoint import read_checkpoint
from engine.networks.load import load_network
from export.layers import weighted_nodes
from export.lint_graph import open_graph
from export.work import layer_macs

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class EveryOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.linear = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.up(self.conv(x)))


def torch_macs(network: nn.Module, *inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(*inputs)
    return counter.get_total_flops() / 2


def test_every_op_counts_what_torch_counts(tmp_path: Path) -> None:
    network, x = EveryOp().eval(), torch.randn(3, 4, 5, 5)
    torch.onnx.export(network, (x,), str(tmp_path / "o.onnx"), input_names=["x"], dynamo=True)
    macs = layer_macs(tmp_path / "o.onnx", {"x": x.numpy()})
    assert len(macs) == 3
    assert sum(macs.values()) == torch_macs(network, x)


def test_a_unet_counts_what_torch_counts(
    diffusion_artifact: Path, diffusion_checkpoint: Path
) -> None:
    spec = read_checkpoint(diffusion_checkpoint).model.networks["unet"]
    network = load_network(diffusion_checkpoint, "unet", spec)
    feed = {
        "sample": np.ones((2, 1, 16, 16), np.float32),
        "timestep": np.array([1, 500], np.float32),
        "label": np.array([0, 1]),
    }
    graph = diffusion_artifact / "graphs/fp32/unet.onnx"
    macs = layer_macs(graph, feed)
    # torch's counter knows no attention on a CPU: its two products have no weights
    layers = {node.name for node in weighted_nodes(open_graph(graph).main)}
    expected = torch_macs(network, *(torch.from_numpy(array) for array in feed.values()))
    assert sum(macs[name] for name in layers) == expected
    assert len(macs) > len(layers)
    assert macs["conv_in"] == 2 * 16 * 16 * 8 * 9
