"""Tiny models without torch: random params of the peers' configs, in folders that sdjax wrote."""

import jax
import jax.numpy as jnp
import numpy as np
from peers import CLIP_L, SD1, SD_VAE

from sdjax.checkpoints import naming, save
from sdjax.diffusion.schedules import Schedule
from sdjax.model import FrozenConfig, Model
from sdjax.models.clip import CLIPTextModel
from sdjax.models.clip_config import TextModelConfig
from sdjax.models.lpips import LPIPS
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.text import Tokenizer

UNET = SD1 | {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}
VAE = SD_VAE | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def random_params(module, seed=0, scale=0.1):
    """A module's params as numpy arrays of noise."""
    draw = np.random.default_rng(seed)
    params = {}
    for leaf in naming.leaves(module).values():
        node = params
        for name in leaf.path[:-1]:
            node = node.setdefault(name, {})
        shape = naming.to_flax_shape(leaf.path[-1], leaf.shape)
        node[leaf.path[-1]] = draw.standard_normal(shape, np.float32) * np.float32(scale)
    return params


def init(module):
    """A module's params from inputs that reach all of them, as Linen initialises it."""
    key, ids = jax.random.key(0), jnp.zeros((1,), jnp.int32)
    if isinstance(module, TextModelConfig):
        return module.init(key, ids[None])["params"]
    if isinstance(module, LPIPS):
        return module.init(key, *[jnp.zeros((1, 16, 16, 3))] * 2)["params"]
    side = 2 ** len(module.block_out_channels)
    x = jnp.zeros((1, side, side, module.in_channels))
    if not isinstance(module, UNet):
        return module.init(key, x)["params"]
    more = {}
    if module.addition_embed_type is not None:
        sizes, wave = 5, module.addition_time_embed_dim
        width = module.projection_class_embeddings_input_dim - sizes * wave
        more |= {"added_text": jnp.zeros((1, width)), "added_time_ids": jnp.zeros((1, sizes))}
    if module.num_class_embeds is not None:
        more["class_labels"] = ids
    if module.time_cond_proj_dim is not None:
        more["timestep_cond"] = jnp.zeros((1, module.time_cond_proj_dim))
    return module.init(key, x, ids, jnp.zeros((1, 1, module.cross_attention_dim)), **more)["params"]


def sd1():
    """A model of the tiny SD1 and its params."""
    model = Model(
        unet=UNet.from_config(UNET),
        vae=AutoencoderKL.from_config(VAE),
        text_encoder=CLIPTextModel.from_config(CLIP_L | {"num_hidden_layers": 1}),
        text_encoder_2=None,
        tokenizer=Tokenizer.clip(),
        tokenizer_2=None,
        schedule=Schedule.from_config(SCHEDULER),
        scheduler=FrozenConfig.of(SCHEDULER),
        family="sd1",
    )
    names = ("unet", "vae", "text_encoder")
    return model, {n: random_params(getattr(model, n), i) for i, n in enumerate(names)}


def save_sd1(path):
    """Write the tiny SD1 as a folder; returns the model and its params."""
    model, params = sd1()
    save(path, model, params)
    return model, params


def equal(one, other):
    """Whether two trees have the same structure, dtypes and bits."""
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(leaves, others, strict=True)
    )
