"""One small diffusers pipeline of every family, with random weights; made in code."""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import sentencepiece
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

CORPUS = ("a red shoe on a white table", "green coat with buttons", "blue bag, leather, small")
WIDTH = 32  # of the text encoders
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def save_clip_tokenizer(folder: Path) -> None:
    """In the layout of the first Stable Diffusion checkpoints: vocab.json and merges.txt."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "sh", "sho", "shoe</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    end = "<|endoftext|>"
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\ns h\nsh o\nsho e</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_t5_tokenizer(folder: Path) -> None:
    """In the layout of the first T5 checkpoints: spiece.model."""
    folder.mkdir(parents=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=32,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "spiece.vocab").unlink()
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def clip(folder: Path, projected: bool = False):
    save_clip_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3,
        vocab_size=len(tokenizer), projection_dim=WIDTH, max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    projecting = transformers.CLIPTextModelWithProjection
    model = projecting(config) if projected else transformers.CLIPTextModel(config)
    return model.eval(), tokenizer


def t5(folder: Path, width: int = WIDTH):
    save_t5_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.T5Config(
        d_model=width, d_kv=8, num_heads=4, num_layers=2, d_ff=37, vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval(), tokenizer


def vae(channels: int = 4, **config: object) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, layers_per_block=1, sample_size=32, **config,
    ).eval()  # fmt: skip


def tiny_vae() -> diffusers.AutoencoderTiny:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip


def unet(**config: object) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH, "attention_head_dim": 4, "norm_num_groups": 4,
            "in_channels": 4, "out_channels": 4,
            **config,
        }
    ).eval()  # fmt: skip


def ddpm(folder: Path):
    network = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    return diffusers.DDIMPipeline(network.eval(), diffusers.DDIMScheduler(clip_sample=True))


def stable_diffusion(folder: Path, pipeline=diffusers.StableDiffusionPipeline, **config: object):
    text_encoder, tokenizer = clip(folder / "clip")
    scheduler = diffusers.PNDMScheduler(
        **SCALED_LINEAR, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    return pipeline(
        vae(), text_encoder, tokenizer, unet(**config), scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def one_level_stable_diffusion(folder: Path) -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion whose U-Net has one level: quick to export."""
    torch.manual_seed(0)
    return stable_diffusion(
        folder,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )


def stable_diffusion_2(folder: Path):
    """Version 2: v-prediction, zero terminal SNR, another padding token, a tiny VAE."""
    made = stable_diffusion(folder, use_linear_projection=True, attention_head_dim=(2, 4))
    made.tokenizer.pad_token = "!"
    made.scheduler = diffusers.DDIMScheduler(
        **SCALED_LINEAR, prediction_type="v_prediction", steps_offset=1, clip_sample=False,
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    made.vae = tiny_vae()
    return made


def inpainting(folder: Path):
    return stable_diffusion(folder, diffusers.StableDiffusionInpaintPipeline, in_channels=9)


def lcm(folder: Path):
    made = stable_diffusion(folder, time_cond_proj_dim=16)
    scheduler = diffusers.LCMScheduler(**SCALED_LINEAR, steps_offset=1, set_alpha_to_one=False)
    components = {**made.components, "scheduler": scheduler}
    return diffusers.LatentConsistencyModelPipeline(**components, requires_safety_checker=False)


def stable_diffusion_xl(folder: Path):
    first, tokenizer = clip(folder / "clip")
    second, tokenizer_2 = clip(folder / "clip_2", projected=True)
    network = unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4),
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        **SCALED_LINEAR, steps_offset=1, timestep_spacing="leading"
    )
    return diffusers.StableDiffusionXLPipeline(
        vae(scaling_factor=0.13025, force_upcast=True), first, second, tokenizer, tokenizer_2,
        network, scheduler, add_watermarker=False,
    )  # fmt: skip


def pixart(folder: Path, pipeline=diffusers.PixArtSigmaPipeline, **config: object):
    text_encoder, tokenizer = t5(folder / "t5")
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        **{"sample_size": 16, "patch_size": 2, "cross_attention_dim": 24, **config},
        caption_channels=WIDTH,
    ).eval()  # fmt: skip
    with torch.no_grad():  # zero at first: then the picture would not depend on the transformer
        transformer.proj_out.weight.normal_(std=0.1)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return pipeline(tokenizer, text_encoder, vae(), transformer, scheduler)


def pixart_alpha(folder: Path):
    """Alpha of 1024 pixels: size and aspect ratio are conditions."""
    return pixart(folder, diffusers.PixArtAlphaPipeline, sample_size=128)


def stable_diffusion_3(folder: Path):
    first, tokenizer = clip(folder / "clip", projected=True)
    second, tokenizer_2 = clip(folder / "clip_2", projected=True)
    third, tokenizer_3 = t5(folder / "t5", 2 * WIDTH)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, out_channels=4, pos_embed_max_size=24,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(
        transformer, scheduler, vae(shift_factor=0.0609, scaling_factor=1.5305), first, tokenizer,
        second, tokenizer_2, third, tokenizer_3,
    )  # fmt: skip


def stable_diffusion_3_without_t5(folder: Path):
    made = stable_diffusion_3(folder)
    made.register_modules(text_encoder_3=None, tokenizer_3=None)
    return made


def flux(folder: Path, guided: bool = True):
    first, tokenizer = clip(folder / "clip")
    second, tokenizer_2 = t5(folder / "t5")
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        guidance_embeds=guided, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        **({"shift": 3.0, "use_dynamic_shifting": True} if guided else {})
    )
    return diffusers.FluxPipeline(
        scheduler, vae(shift_factor=0.1159, scaling_factor=0.3611), first, tokenizer, second,
        tokenizer_2, transformer,
    )  # fmt: skip


def flux_schnell(folder: Path):
    return flux(folder, guided=False)


BUILDERS: dict[str, Callable[[Path], diffusers.DiffusionPipeline]] = {
    "ddpm": ddpm,
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-2": stable_diffusion_2,
    "inpainting": inpainting,
    "lcm": lcm,
    "stable-diffusion-xl": stable_diffusion_xl,
    "pixart-alpha": pixart_alpha,
    "pixart-sigma": pixart,
    "stable-diffusion-3": stable_diffusion_3,
    "stable-diffusion-3-without-t5": stable_diffusion_3_without_t5,
    "flux": flux,
    "flux-schnell": flux_schnell,
}


def save(name: str, folder: Path) -> Path:
    """Build and save the pipeline of that name; its folder in the diffusers layout."""
    torch.manual_seed(0)
    pipeline = BUILDERS[name](folder / "tokenizers")
    pipeline.save_pretrained(folder / name, safe_serialization=True)
    return folder / name
