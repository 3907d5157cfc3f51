"""The manifest: what an artifact says about itself, as one validated schema."""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from engine.options import Options

FORMAT = 1  # of the manifest; readers refuse another

Dtype = Literal["float32", "float16", "bfloat16", "int64", "uint8"]
Runtime = Literal["torch", "onnxruntime", "openvino", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside_the_artifact(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise ValueError("a path must be relative and may not leave the artifact")
    return path


ArtifactPath = Annotated[str, AfterValidator(_inside_the_artifact)]


class TensorSpec(Options):
    """One input or output of a network; an axis is a size or a symbolic name."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


class NetworkSpec(Options):
    """What a network takes and returns, in the order of its call."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class ImageSpec(Options):
    """The picture that a model makes."""

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    channels: Literal[1, 3]


class Defaults(Options):
    """What a diffusion request gets where it does not say."""

    num_inference_steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=1, le=100)
    sampler: str


class ModelSpec(Options):
    """What a model is, whatever runs it: derived from a checkpoint, carried by the manifest."""

    family: Literal["class_unet", "gan"]
    labels: tuple[str, ...] = Field(min_length=1)
    image: ImageSpec
    networks: dict[str, NetworkSpec]
    scheduler: dict[str, JsonValue] | None = Field(
        None, description="diffusers' scheduler_config.json; none for a GAN"
    )
    samplers: tuple[str, ...] = ()
    null_label: int | None = Field(None, description="the label index that means no label")
    defaults: Defaults | None = Field(None, description="none for a GAN")


class Quality(Options):
    """Pictures of a variant against the fp32 torch reference with the same start noise."""

    pictures: int = Field(ge=1)
    psnr_db_min: float
    psnr_db_mean: float
    ssim_min: float
    ssim_mean: float
    worst_seed: int
    worst_picture: ArtifactPath


class Variant(Options):
    """One (runtime, precision) build of all networks."""

    runtime: Runtime
    precision: Precision
    runtime_version: str
    device: str | None = Field(None, description="where a build is bound to one")
    networks: dict[str, ArtifactPath]
    quality: Quality | None = None
    latency_ms: float | None = None
    accepted: bool | None = Field(None, description="none until checked")
    reason: str = ""


class Source(Options):
    """The checkpoint that an artifact was exported from."""

    path: str = Field(description="as the user named it; informative")
    sha256: Sha256


class Manifest(Options):
    """`manifest.json`: everything that reading, checking and serving an artifact needs."""

    format: Literal[1] = 1
    vitrine_version: str
    source: Source
    model: ModelSpec
    variants: dict[str, Variant]
    selected: str
    files: dict[ArtifactPath, Sha256]
