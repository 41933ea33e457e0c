"""Small torch peers with random weights and every quirk of the real architectures.

`tiny_unet`, `tiny_vae` and `tiny_clip` build networks of diffusers and transformers;
`save_tiny_pipeline` writes a complete diffusers folder of them. Families are named as in configs/:
sd1, sd1-inpaint, sd2-base, sd2, sd2-inpaint, sdxl, sdxl-inpaint, sdxl-refiner, x4-upscaler.

What is small: widths, heads, layers, groups. What is real: block types, head rules, projections,
epsilons, activations, vocabulary, schedules. Norms and biases are random too: nothing is 0 or 1.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np

FAMILIES = (
    "sd1",
    "sd1-inpaint",
    "sd2-base",
    "sd2",
    "sd2-inpaint",
    "sdxl",
    "sdxl-inpaint",
    "sdxl-refiner",
    "x4-upscaler",
)

CROSS = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
CROSS_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3

SD1 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32, 48, 48],
    "down_block_types": CROSS,
    "up_block_types": CROSS_UP,
    "norm_num_groups": 8,
    "attention_head_dim": 8,  # diffusers' quirk: the number of heads
    "cross_attention_dim": 32,
}
SD2 = SD1 | {
    "attention_head_dim": [2, 4, 6, 6],
    "cross_attention_dim": 48,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 3],
    "cross_attention_dim": 80,  # both encoders side by side: 32 + 48
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
}
REFINER = SDXL | {
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "attention_head_dim": [2, 4, 8, 8],
    "transformer_layers_per_block": 2,
    "cross_attention_dim": 48,
    "projection_class_embeddings_input_dim": 40 + 5 * 8,
}
UPSCALER = {
    "sample_size": 16,
    "in_channels": 7,
    "out_channels": 4,
    "block_out_channels": [16, 32, 32, 64],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 48,
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
UNETS = {
    "sd1": SD1,
    "sd1-inpaint": SD1 | {"in_channels": 9},
    "sd2-base": SD2 | {"upcast_attention": False},
    "sd2": SD2,
    "sd2-inpaint": SD2 | {"in_channels": 9},
    "sdxl": SDXL,
    "sdxl-inpaint": SDXL | {"in_channels": 9},
    "sdxl-refiner": REFINER,
    "x4-upscaler": UPSCALER,
}

SD_VAE = {
    "sample_size": 64,
    "block_out_channels": [8, 16, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
}
SDXL_VAE = SD_VAE | {"scaling_factor": 0.13025}
UPSCALER_VAE = SD_VAE | {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "scaling_factor": 0.08333,
}

CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 32,
    "intermediate_size": 128,
    "projection_dim": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,  # the wrong numbers that every published config carries
    "eos_token_id": 2,
    "pad_token_id": 1,
}
OPENCLIP_H = CLIP_L | {
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,  # the published 23 of 24: the penultimate layer is already last
    "hidden_act": "gelu",
}
OPENCLIP_BIGG = OPENCLIP_H | {"num_hidden_layers": 4, "projection_dim": 40}
CLIPS = {"clip-l": CLIP_L, "openclip-h": OPENCLIP_H, "openclip-bigg": OPENCLIP_BIGG}


# One residual block each way around an attention that reads the text: compiled in a second or two.
LITTLE = {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": None,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
}


def few_layers(family="sd1"):
    """Changes that leave a family two levels of one layer, compiled in a fraction of the time.

    For what a family does around its networks: their own layouts are held in test_unet.py.
    """
    whole = UNETS[family]
    downs, ups = whole["down_block_types"], whole["up_block_types"]
    lowest = downs[-1] == "DownBlock2D" and not family.startswith("sdxl")
    unet = {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": downs[-2:] if lowest else downs[:2],
        "up_block_types": ups[:2] if lowest else ups[-2:],
    }
    for name in ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention"):
        if isinstance(whole.get(name), list):
            unet[name] = whole[name][:2]
    return {"unet": unet, "vae": {"layers_per_block": 1}}


def randomize(module, seed=0, gain=0.8):
    """Draw every weight anew: kernels with std gain/sqrt(fan in), norms and biases off 1 and 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif p.ndim == 1:
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("embedding.weight"):
                p.copy_(0.5 * noise)
            else:
                p.copy_(gain * noise / p[0].numel() ** 0.5)
    return module.eval()


def tiny_unet(family="sd1", changes=None, seed=0):
    """A UNet2DConditionModel of the family, and its config."""
    from diffusers import UNet2DConditionModel

    config = UNETS[family] | (changes or {})
    model = randomize(UNet2DConditionModel(**config), seed)
    return model, _written(model)


def tiny_vae(family="sd1", changes=None, seed=1):
    """An AutoencoderKL of the family, and its config."""
    from diffusers import AutoencoderKL

    config = UPSCALER_VAE if family == "x4-upscaler" else SD_VAE
    config = (SDXL_VAE if family.startswith("sdxl") else config) | (changes or {})
    model = randomize(AutoencoderKL(**config), seed)
    return model, _written(model)


def tiny_clip(kind="clip-l", changes=None, seed=2, projection=None):
    """A text encoder and its config; with a projection if `projection` (by default bigG only)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**(CLIPS[kind] | (changes or {})))
    projection = kind == "openclip-bigg" if projection is None else projection
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    model = randomize(cls(config), seed)
    model.config.architectures = [cls.__name__]
    return model, model.config.to_dict()


def _written(model):
    """The config as config.json holds it."""
    return json.loads(model.to_json_string())


def flax_params(model):
    """The torch model's weights under sdjax's names, written apart from sdjax.checkpoints."""
    params = {}
    for key, value in model.state_dict().items():
        array = value.float().numpy()
        *path, leaf = re.sub(r"\.(\d+)(?=\.)", r"_\1", key).split(".")
        if leaf == "weight" and array.ndim == 1:
            leaf = "scale"
        elif leaf == "weight" and path[-1] in (
            "token_embedding",
            "position_embedding",
            "class_embedding",
        ):
            leaf = "embedding"
        elif leaf == "weight":
            leaf = "kernel"
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        node = params
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = np.ascontiguousarray(array)
    return params


# For `jax.jit`: compiled in half the time, for programs that run once and must only be right.
QUICK = {"xla_backend_optimization_level": 0}


def quick_jit(function):
    """`jax.jit` with these options."""
    import jax

    return lambda *args: jax.jit(function).lower(*args).compile(compiler_options=QUICK)(*args)


def relative_error(ours, theirs):
    """Largest absolute difference over the largest absolute value of the reference."""
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def nhwc(tensor):
    """A torch [b, c, h, w] as numpy [b, h, w, c]."""
    return tensor.detach().float().permute(0, 2, 3, 1).numpy()


def nchw(array):
    """An array [b, h, w, c] as a torch [b, c, h, w]."""
    import torch

    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).contiguous()


def unit_noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same_pictures(ours, theirs):
    """Equal uint8 but for one level in at most 0.1% of places."""
    gap = np.abs(ours.astype(int) - theirs.astype(int))
    assert gap.max() <= 1
    assert (gap > 0).mean() <= 1e-3


def torch_pictures(pipeline, latents):
    import torch

    with torch.no_grad():
        scaled = nchw(latents) / pipeline.vae.config.scaling_factor
        pixels = nhwc(pipeline.vae.decode(scaled).sample)
    return (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)


def tokenizer_files():
    """The folder holding CLIP's real vocab.json and merges.txt."""
    root = Path(__file__).resolve().parents[1]
    places = [root / "sdjax/assets/clip_tokenizer", root.parent / "shared/clip_tokenizer"]
    return next(place for place in places if (place / "vocab.json").exists())


def tiny_tokenizer(pad="<|endoftext|>"):
    """Transformers' CLIP tokenizer with the real vocabulary."""
    from transformers import CLIPTokenizer

    files = tokenizer_files()
    return CLIPTokenizer(
        vocab=str(files / "vocab.json"),
        merges=str(files / "merges.txt"),
        pad_token=pad,
        model_max_length=77,
    )


def scheduler(family):
    """The scheduler that the family's published folder names."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if family.startswith("sdxl"):
        return EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    quirks = {"steps_offset": 1, "set_alpha_to_one": False}
    if family == "x4-upscaler":
        betas |= {"beta_start": 0.0001, "beta_end": 0.02}
    if family in ("sd2", "x4-upscaler"):
        return DDIMScheduler(**betas, **quirks, clip_sample=False, prediction_type="v_prediction")
    return PNDMScheduler(**betas, **quirks, skip_prk_steps=True)


def tiny_pipeline(family="sd1", unet=None, vae=None):
    """A complete diffusers pipeline of tiny random networks; `unet`, `vae` change their configs."""
    import diffusers

    parts = {"unet": tiny_unet(family, unet)[0], "vae": tiny_vae(family, vae)[0]}
    parts["scheduler"] = scheduler(family)
    if family.startswith("sdxl"):
        refiner = family == "sdxl-refiner"
        parts["text_encoder"] = None if refiner else tiny_clip("clip-l")[0]
        parts["tokenizer"] = None if refiner else tiny_tokenizer()
        parts["text_encoder_2"] = tiny_clip("openclip-bigg", seed=3)[0]
        parts["tokenizer_2"] = tiny_tokenizer("!")
        if refiner:
            return diffusers.StableDiffusionXLImg2ImgPipeline(
                **parts,
                requires_aesthetics_score=True,
                force_zeros_for_empty_prompt=False,
                add_watermarker=False,
            )
        inpaint = family == "sdxl-inpaint"
        cls = "StableDiffusionXLInpaintPipeline" if inpaint else "StableDiffusionXLPipeline"
        return getattr(diffusers, cls)(**parts, add_watermarker=False)
    sd1 = family.startswith("sd1")
    parts["text_encoder"] = tiny_clip("clip-l" if sd1 else "openclip-h")[0]
    parts["tokenizer"] = tiny_tokenizer("<|endoftext|>" if sd1 else "!")
    if family == "x4-upscaler":
        low = diffusers.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02, clip_sample=True
        )
        return diffusers.StableDiffusionUpscalePipeline(
            **parts, low_res_scheduler=low, max_noise_level=350
        )
    inpaint = family.endswith("inpaint")
    cls = "StableDiffusionInpaintPipeline" if inpaint else "StableDiffusionPipeline"
    return getattr(diffusers, cls)(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def save_tiny_pipeline(
    folder,
    family="sd1",
    dtype=None,
    variant=None,
    safe_serialization=True,
    max_shard_size="10GB",
    unet=None,
    vae=None,
):
    """Write a complete diffusers folder, by diffusers itself, and return the torch pipeline.

    `dtype` is a torch dtype or its name ("float16"); `variant` "fp16" names files accordingly. The
    tokenizer folders also hold vocab.json and merges.txt, as every published one does.
    """
    import torch

    folder = Path(folder)
    pipeline = tiny_pipeline(family, unet, vae)
    pipeline.set_progress_bar_config(disable=True)
    if dtype is not None:
        pipeline = pipeline.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    pipeline.save_pretrained(
        folder,
        variant=variant,
        safe_serialization=safe_serialization,
        max_shard_size=max_shard_size,
    )
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).exists():
            for file in ("vocab.json", "merges.txt"):
                shutil.copyfile(tokenizer_files() / file, folder / name / file)
    return pipeline
