"""LoRA weights fused at export: the pictures are those of diffusers with the same weights fused."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_pipelines import one_level_stable_diffusion, save, tiny_vae

from engine.errors import ArtifactError, OptionError
from engine.manifest import Lora
from engine.networks.lora import fused
from engine.pipeline import open_pipeline
from engine.quality import psnr_db
from engine.request import Request
from export.build import export

Image = NDArray[np.float32]
Weights = dict[str, torch.Tensor]

SCALE = 0.7
STEPS, GUIDANCE, SEED, PROMPT = 4, 5.0, 3, "a red shoe"
FLOOR_DB = 50.0  # the issue's; 124 dB measured, float32 against float32 with other kernels
DIFFERENT_DB = 35.0  # with and without the weights: 24 dB measured

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion with a U-Net of one level and a tiny VAE: quick to export."""
    folder = tmp_path_factory.mktemp("pipelines")
    pipeline = one_level_stable_diffusion(folder / "tokenizers")
    pipeline.vae = tiny_vae()
    pipeline.save_pretrained(folder / "shoes")
    return folder / "shoes"


@pytest.fixture(scope="module")
def lora(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random LoRA weights of U-Net and text encoder, as diffusers' training scripts save them."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    torch.manual_seed(1)
    targets = {
        "unet": ["to_q", "to_k", "to_v", "to_out.0"],
        "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    }
    layers = {}
    for name, modules in targets.items():
        network = getattr(pipeline, name)
        network.add_adapter(
            LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=modules)
        )
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
    folder = tmp_path_factory.mktemp("lora")
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, **layers)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "shoes"
    return export(checkpoint, folder, loras=[(lora, SCALE)]).artifact.path


def picture(folder: Path) -> Image:
    pipeline = open_pipeline(folder)
    request = Request(
        prompt=PROMPT, seed=SEED, num_inference_steps=STEPS, guidance_scale=GUIDANCE, sampler="ddim"
    )
    (row,) = pipeline.run([request])
    return pipeline.decode(row)


def diffusers_picture(checkpoint: Path, *loras: tuple[Path, float]) -> Image:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False
    )
    for number, (path, scale) in enumerate(loras):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"l{number}")
        pipeline.fuse_lora(lora_scale=scale, adapter_names=[f"l{number}"])
        pipeline.unload_lora_weights()
    images = pipeline(
        PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images  # fmt: skip
    return np.asarray(images[0], np.float32)


def described(path: Path, scale: float = 1.0) -> Lora:
    return Lora(path=str(path), sha256="0" * 64, scale=scale)


def test_an_artifact_draws_what_diffusers_draws_with_the_weights_fused(
    checkpoint: Path, lora: Path, artifact: Path
) -> None:
    found = picture(artifact)
    assert psnr_db(diffusers_picture(checkpoint, (lora, SCALE)), found) >= FLOOR_DB
    assert psnr_db(diffusers_picture(checkpoint), found) < DIFFERENT_DB


@pytest.mark.parametrize("scales", [(1.0,), (-0.5,), (0.3, 0.4)])
def test_every_scale_and_several_weights_are_those_of_diffusers(
    checkpoint: Path, lora: Path, scales: tuple[float, ...]
) -> None:
    expected = diffusers_picture(checkpoint, *((lora, scale) for scale in scales))
    with fused(checkpoint, [described(lora, scale) for scale in scales]) as folder:
        assert psnr_db(expected, picture(folder)) >= FLOOR_DB
    assert not folder.exists()


def test_the_same_weights_are_no_work_and_another_scale_or_none_is(
    checkpoint: Path, lora: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(lora.read_bytes())
    assert export(checkpoint, artifact, loras=[(moved, SCALE)]).unchanged
    traced: list[str] = []

    def stop(_network: object, path: Path, _sizes: object) -> None:
        traced.append(path.name)
        raise ArtifactError("traced")

    monkeypatch.setattr("export.onnx.export_network", stop)
    for loras in ([(lora, 0.5)], [], [(lora, SCALE), (lora, SCALE)]):
        with pytest.raises(ArtifactError, match="traced"):
            export(checkpoint, artifact, loras=loras)
    assert traced == ["text_encoder.onnx"] * 3
    assert export(checkpoint, artifact, loras=[(lora, SCALE)]).unchanged


def test_fp16_files_are_fused_too(checkpoint: Path, lora: Path, tmp_path: Path) -> None:
    half = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    with fused(tmp_path / "half", [described(lora)]) as folder:
        # weights rounded to 11 bits: 75 dB measured
        assert psnr_db(diffusers_picture(checkpoint, (lora, 1.0)), picture(folder)) >= FLOOR_DB


# Weights that cannot be fused

FIRST = "text_encoder.encoder.layers.0.self_attn.k_proj.lora_A.weight"


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


CHANGES: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "another name": (renamed("unet.", "transformer."), "layers, and the checkpoint has only 12 of"),
    "an unknown layer": (
        lambda weights: {
            **weights,
            "unet.hat.to_q.lora_A.weight": torch.ones(4, 8),
            "unet.hat.to_q.lora_B.weight": torch.ones(8, 4),
        },
        "layers, and the checkpoint has only",
    ),
    "half a layer": (
        lambda weights: {name: value for name, value in weights.items() if name != FIRST},
        f"without {FIRST}",
    ),
    "another width": (
        lambda weights: {
            name: value.repeat(1, 2) if name.endswith("lora_A.weight") else value.repeat(2, 1)
            for name, value in weights.items()
        },
        "does not load as LoRA weights: ",
    ),
    "no LoRA": (lambda _: {"colour.bias": torch.ones(3)}, "does not load as LoRA weights: "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_for_another_architecture_are_refused(
    checkpoint: Path, lora: Path, tmp_path: Path, change: str
) -> None:
    alter, message = CHANGES[change]
    path = tmp_path / "bad.safetensors"
    save_file({name: x.contiguous() for name, x in alter(load_file(lora)).items()}, path)
    refused(checkpoint, path, message)


def refused(checkpoint: Path, path: Path, message: str) -> None:
    with pytest.raises(ArtifactError) as raised:
        export(checkpoint, path.parent / "new", loras=[(path, 1.0)])
    assert message in str(raised.value)
    assert f"'{path}'" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert [left.name for left in path.parent.iterdir() if "new" in left.name] == []


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_a_damaged_file_is_refused(checkpoint: Path, lora: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(lora.read_bytes()[:size])
    refused(checkpoint, path, "does not load as LoRA weights")


def test_a_pickle_is_refused_whatever_its_name(
    checkpoint: Path, lora: Path, tmp_path: Path
) -> None:
    for name, message in (
        ("lora.bin", "must be a .safetensors file"),
        ("lora.safetensors", "does not load as LoRA weights"),
    ):
        torch.save(load_file(lora), tmp_path / name)
        refused(checkpoint, tmp_path / name, message)


def test_a_missing_file_and_a_scale_that_is_no_number_are_named(
    checkpoint: Path, lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"LoRA weights '.*none.safetensors' do not exist"):
        export(checkpoint, tmp_path / "new", loras=[(tmp_path / "none.safetensors", 1.0)])
    with pytest.raises(OptionError, match="scale must be a finite number, got nan"):
        export(checkpoint, tmp_path / "new", loras=[(lora, float("nan"))])


def test_a_pipeline_that_takes_no_lora_says_so(lora: Path, tmp_path: Path) -> None:
    source = save("ddpm", tmp_path)
    with pytest.raises(ArtifactError, match="a DDIMPipeline takes no LoRA weights, got"):
        export(source, tmp_path / "new", loras=[(lora, 1.0)])
