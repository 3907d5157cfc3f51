"""Class-conditional GANs of ours: one network, one step."""

import numpy as np

from engine.errors import ArtifactError
from engine.families.components import Components
from engine.families.parts import Parts, tensor
from engine.manifest import ImageSpec, ModelSpec, NetworkSpec
from engine.noise import noise
from engine.request import Resolved
from engine.row import Row

COMPONENTS: dict[str, tuple[str | None, ...]] = {"generator": ("Generator",)}


def describe(parts: Parts) -> ModelSpec:
    """The model that a checkpoint's `generator/config.json` describes. Raises ArtifactError."""
    classes = parts.whole("generator", "num_class_embeds")
    if not parts.labels:
        raise ArtifactError("a GAN has its class names in labels.json; there is none")
    if classes != len(parts.labels):
        raise ArtifactError(
            f"generator/config.json has num_class_embeds {classes}, but labels.json names "
            f"{len(parts.labels)} labels; it must have as many"
        )
    size = 4 * 2 ** (parts.length("generator", "block_out_channels") - 1)
    channels = parts.whole("generator", "out_channels")
    network = NetworkSpec(
        inputs=(
            tensor("latent", parts.whole("generator", "latent_size")),
            tensor("label", dtype="int64"),
        ),
        outputs=(tensor("image", channels, size, size),),
    )
    return ModelSpec(
        family="gan",
        labels=parts.labels,
        image=ImageSpec.model_validate({"height": size, "width": size, "channels": channels}),
        networks={"generator": network},
    )


def prepare(components: Components, request: Resolved) -> Row:
    """The latent of the request's seed and its label index."""
    model = components.model
    (_, width) = model.networks["generator"].input("latent").shape
    label = np.array(model.labels.index(request.label), np.int64)
    return Row(noise(request.seed, (int(width),)), ({"label": label},))
