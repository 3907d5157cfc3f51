"""The manifest: what an artifact says about itself, as one validated schema."""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from engine.backends.target import PlanTarget
from engine.machine import Machine
from engine.options import Options

FORMAT = 2  # of the manifest; readers refuse another

Dtype = Literal["float32", "float16", "bfloat16", "int64", "uint8"]
Runtime = Literal["torch", "onnxruntime", "openvino", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
TypedPrecision = Literal["fp32", "fp16", "bf16"]  # of a graph, as its own types
Goal = Literal["latency", "throughput", "size"]
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]  # names files and folders
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside_the_artifact(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise ValueError("a path must be relative and may not leave the artifact")
    return path


ArtifactPath = Annotated[str, AfterValidator(_inside_the_artifact)]


class TensorSpec(Options):
    """One input or output of a network.

    An axis is a size, a symbolic name (`height`) or a multiple of one (`8*height`).
    """

    name: str
    dtype: Dtype
    shape: tuple[int | Annotated[str, Field(pattern=r"^([1-9]\d*\*)?[a-z]+$")], ...]

    def axes(self) -> set[str]:
        """The symbolic names in its shape."""
        return {split_axis(axis)[1] for axis in self.shape if isinstance(axis, str)}


def split_axis(axis: str) -> tuple[int, str]:
    """`8*height` is 8 and `height`; `batch` is 1 and `batch`."""
    factor, _, name = axis.rpartition("*")
    return int(factor or 1), name


class NetworkSpec(Options):
    """What a network takes and returns, in the order of its call."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    def input(self, name: str) -> TensorSpec:
        """The input of that name. Raises KeyError."""
        return {tensor.name: tensor for tensor in self.inputs}[name]


class ImageSpec(Options):
    """The picture that a model makes; height and width are defaults where `multiple` is given."""

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    channels: Literal[1, 3]
    multiple: int | None = Field(
        None, ge=1, description="a request's height and width are multiples of it; none: fixed"
    )
    largest: int | None = Field(None, ge=1, description="of height and width; none: no limit")


class LatentSpec(Options):
    """The space between a VAE's encoder and decoder: x = (latents - shift_factor) * scaling."""

    channels: int = Field(ge=1)
    downscale: int = Field(ge=1, description="pixels a latent, along each axis")
    scaling_factor: float
    shift_factor: float = 0.0


class Defaults(Options):
    """What a diffusion request gets where it does not say."""

    num_inference_steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=1, le=100)
    sampler: str
    strength: float | None = Field(None, description="none where a model takes no image")


Family = Literal[
    "pixel_unet", "gan", "stable_diffusion", "stable_diffusion_xl", "pixart", "stable_diffusion_3",
    "flux",
]  # fmt: skip


class ModelSpec(Options):
    """What a model is, whatever runs it: derived from a checkpoint, carried by the manifest."""

    family: Family
    labels: tuple[str, ...] = ()
    image: ImageSpec
    networks: dict[str, NetworkSpec]
    tokenizers: dict[str, ArtifactPath] = Field(
        default_factory=dict, description="files of the tokenizers library, which pad and cut"
    )
    latents: LatentSpec | None = Field(None, description="none for a model of pixels")
    scheduler: dict[str, JsonValue] | None = Field(
        None, description="diffusers' scheduler_config.json; none for a GAN"
    )
    samplers: tuple[str, ...] = ()
    null_label: int | None = Field(None, description="the label index that means no label")
    zero_empty_prompt: bool = Field(
        False, description="no negative prompt is zeros, not the encoding of an empty text"
    )
    defaults: Defaults | None = Field(None, description="none for a GAN")

    @property
    def denoiser(self) -> str:
        """The network that every step calls: `unet`, `transformer` or `generator`."""
        return next(name for name in ("unet", "transformer", "generator") if name in self.networks)

    def tokens(self, tokenizer: str) -> int:
        """How many tokens a tokenizer pads and cuts to: its text encoder's input has so many."""
        encoder = self.networks[tokenizer.replace("tokenizer", "text_encoder")]
        return int(encoder.input("input_ids").shape[1])

    def axis_sizes(self, network: str, size: tuple[int, int] | None = None) -> dict[str, int]:
        """The axes beside the batch that a network has, for a picture of `size` or the default."""
        sizes = self.symbols(network, size or (self.image.height, self.image.width))
        axes = {axis for tensor in self.networks[network].inputs for axis in tensor.axes()}
        return {axis: value for axis, value in sizes.items() if axis in axes}

    def symbols(self, network: str, size: tuple[int, int]) -> dict[str, int]:
        """What `height` and `width` stand for in a network's axes, for a picture of `size`."""
        latents, multiple = self.latents, self.image.multiple or 1
        is_vae = latents is not None and network.startswith("vae_")
        unit = latents.downscale if latents and is_vae else multiple
        return {"height": size[0] // unit, "width": size[1] // unit}

    @property
    def subject(self) -> Literal["label", "prompt", "none"]:
        """What a request names: a class, a text, or nothing where the model has one subject."""
        return "prompt" if self.tokenizers else "label" if self.labels else "none"

    @property
    def guidance(self) -> Literal["none", "classifier_free", "embedded"]:
        """How `guidance_scale` acts: by a second evaluation of each step, or as a network input."""
        inputs = self.networks[self.denoiser].input_names
        if "guidance" in inputs or "timestep_cond" in inputs:
            return "embedded"
        return "classifier_free" if self.tokenizers or self.null_label is not None else "none"

    @property
    def takes_image(self) -> Literal["no", "optional", "with mask"]:
        """Whether a request may or must bring a picture to start from."""
        if "mask" in self.networks[self.denoiser].input_names:
            return "with mask"
        return "optional" if "vae_encoder" in self.networks else "no"


class Floors(Options):
    """The least that a variant must reach."""

    psnr_db: float = Field(35.0, ge=0, le=200, description="for the worst picture; 200: identical")
    ssim: float = Field(0.98, ge=-1, le=1, description="for the mean")


class Quality(Options):
    """Pictures of a variant against the fp32 torch reference with the same start noise."""

    pictures: int = Field(ge=1)
    psnr_db_min: float
    psnr_db_mean: float
    ssim_min: float
    ssim_mean: float
    isr_db_min: float
    isr_db_mean: float
    floors: Floors
    simulated: bool = Field(
        False, description="by its graphs in ONNX Runtime on a CPU, since its plans are not built"
    )
    worst_seed: int
    worst_picture: ArtifactPath = Field(
        description="of the worst seeds: reference, result, difference"
    )


class Speed(Options):
    """Whole pictures of a variant, timed in turns with the other candidates."""

    latency_ms: float = Field(gt=0, description="median of one request alone")
    images_per_s: float = Field(gt=0, description="median over batches of `batch` requests")
    spread: float = Field(ge=0, description="interquartile range of the batches over their median")
    batch: int = Field(ge=1)
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float
    machine: Machine


class KeptLayer(Options):
    """A layer that a quantized variant computes in a higher precision."""

    name: str
    reason: str


class Quantization(Options):
    """How the networks of an int8 or fp8 variant were quantized."""

    network: str = Field(description="the one that is quantized: the one that every step calls")
    calibration: ArtifactPath | None = Field(
        description="rows that its ranges were measured on; none where only weights are quantized"
    )
    weights_only: bool = Field(
        False, description="arithmetic in kept_precision: smaller, no faster"
    )
    kept_precision: TypedPrecision = Field(description="of everything that is not quantized")
    layers: tuple[str, ...] = Field(description="quantized, in the order of the graph")
    kept: tuple[KeptLayer, ...] = Field(description="not quantized, and why")


class Variant(Options):
    """One (runtime, precision) build of all networks."""

    runtime: Runtime
    precision: Precision
    runtime_version: str
    target: PlanTarget | None = Field(None, description="what TensorRT plans were built for")
    size: tuple[int, int] | None = Field(
        None, description="height and width of a build for one picture size; none: any"
    )
    networks: dict[str, ArtifactPath] = Field(description="empty until its plans are built")
    graphs: dict[str, ArtifactPath] = Field(
        default_factory=dict, description="the ONNX files that TensorRT plans are built from"
    )
    build: dict[str, JsonValue] | None = Field(None, description="how its plans are built")
    max_batch: int | None = Field(None, ge=1, description="rows of a call that its plans take")
    quantization: Quantization | None = None
    size_bytes: int | None = Field(None, description="of the files that its networks are in")
    quality: Quality | None = None
    speed: Speed | None = None
    no_gain: str = Field(
        "", description="why it is refused though its pictures hold; no check overrules it"
    )
    accepted: bool | None = Field(None, description="none until checked")
    reason: str = ""


class Lora(Options):
    """LoRA weights that were fused into the networks before export."""

    path: str = Field(description="as the user named it; informative")
    sha256: Sha256
    scale: float = 1.0


class Source(Options):
    """The checkpoint that an artifact was exported from."""

    path: str = Field(description="as the user named it; informative")
    sha256: Sha256
    loras: tuple[Lora, ...] = ()


class Selection(Options):
    """How the selected variant was chosen."""

    goal: Goal
    within_noise: tuple[str, ...] = Field(
        description="accepted variants that are as fast as the selected one, as far as was measured"
    )
    not_built: dict[str, str] = Field(description="candidates that could not be built, and why")


class Manifest(Options):
    """`manifest.json`: everything that reading, checking and serving an artifact needs."""

    format: Literal[2] = 2
    vitrine_version: str
    source: Source
    model: ModelSpec
    variants: dict[VariantName, Variant]
    selected: VariantName
    selection: Selection | None = Field(None, description="none where the user chose")
    files: dict[ArtifactPath, Sha256]
