"""Class-conditional GANs of ours: one network, one step."""

from collections.abc import Mapping

import numpy as np

from engine.errors import ArtifactError
from engine.manifest import ImageSpec, ModelSpec, NetworkSpec, TensorSpec
from engine.noise import noise
from engine.request import Request
from engine.row import Row

NETWORK = "generator"


def describe(configs: Mapping[str, dict[str, object]], labels: tuple[str, ...]) -> ModelSpec:
    """The model that a checkpoint's `generator/config.json` describes. Raises ArtifactError."""
    config = configs[NETWORK]
    if config["num_class_embeds"] != len(labels):
        raise ArtifactError(
            f"generator/config.json has num_class_embeds {config['num_class_embeds']}, but "
            f"labels.json names {len(labels)} labels; it must have as many"
        )
    size = 4 * 2 ** (len(config["block_out_channels"]) - 1)  # type: ignore[arg-type]
    channels, latent_size = int(config["out_channels"]), int(config["latent_size"])  # type: ignore[call-overload]
    network = NetworkSpec(
        inputs=(
            TensorSpec(name="latent", dtype="float32", shape=("batch", latent_size)),
            TensorSpec(name="label", dtype="int64", shape=("batch",)),
        ),
        outputs=(TensorSpec(name="image", dtype="float32", shape=("batch", channels, size, size)),),
    )
    return ModelSpec(
        family="gan",
        labels=labels,
        image=ImageSpec(height=size, width=size, channels=channels),
        networks={NETWORK: network},
    )


def prepare(model: ModelSpec, request: Request) -> Row:
    """The latent of the request's seed and its label index."""
    (latent, _) = model.networks[NETWORK].inputs
    label = np.array(model.labels.index(request.label), np.int64)
    return Row(noise(request.seed, (int(latent.shape[1]),)), ({"label": label},))
