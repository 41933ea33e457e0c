"""The second stage in torch: tiny networks, and the loss as diffusers' training scripts compute it.

Both sides get the draws that the stage makes from an image's key.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peers

from sdjax.diffusion import noise
from sdjax.diffusion.schedules import Schedule
from sdjax.model import FrozenConfig, Model
from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.text import Tokenizer
from sdjax.training import losses
from sdjax.training.encoding import latent_noise

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

LITTLE_VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
}
ENCODERS = {"sd1": "clip-l", "sd2": "openclip-h", "sdxl": "clip-l"}
SHALLOW, TWO_LAYERS = {"num_hidden_layers": 1}, {"num_hidden_layers": 2}
PROMPTS = ["a red house", "a tree by the sea, at night", "", "two boats"]


@functools.cache
def networks(family="sd1"):
    """Torch's networks of a family by name, and ours as a model with params."""
    torch_networks = {
        "unet": peers.tiny_unet(family, peers.LITTLE)[0],
        "vae": peers.tiny_vae(family, LITTLE_VAE)[0],
        "text_encoder": peers.tiny_clip(ENCODERS[family], SHALLOW)[0],
    }
    if family == "sdxl":
        torch_networks["text_encoder_2"] = peers.tiny_clip("openclip-bigg", TWO_LAYERS, seed=3)[0]
    classes = {
        "unet": UNet,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    configs = {name: network.config for name, network in torch_networks.items()}
    configs = {n: c if isinstance(c, dict) else c.to_dict() for n, c in configs.items()}
    modules = {name: classes[name].from_config(config) for name, config in configs.items()}
    model = Model(
        **{"text_encoder_2": None} | modules,
        tokenizer=Tokenizer.clip("!" if family == "sd2" else "<|endoftext|>"),
        tokenizer_2=Tokenizer.clip("!") if family == "sdxl" else None,
        schedule=Schedule(**BETAS),
        scheduler=FrozenConfig.of({"_class_name": "DDPMScheduler"} | BETAS),
        zero_negative=family == "sdxl",
        family=family,
    )
    if family == "sd2":
        model = with_schedule(model, prediction="v_prediction")
    return torch_networks, model, {n: peers.flax_params(m) for n, m in torch_networks.items()}


def pipeline(family="sd1"):
    """A pipeline of diffusers around copies of these networks; our model, and its params."""
    _, model, params = networks(family)
    pipe = peers.tiny_pipeline(family, peers.LITTLE, LITTLE_VAE)
    pipe.text_encoder = peers.tiny_clip("clip-l", SHALLOW)[0]
    if family == "sdxl":
        pipe.text_encoder_2 = peers.tiny_clip("openclip-bigg", TWO_LAYERS, seed=3)[0]
    return pipe, model, params


def with_schedule(model, **changes):
    schedule = dataclasses.replace(model.schedule, **changes)
    config = FrozenConfig.of(model.scheduler.dict() | schedule.config())
    return dataclasses.replace(model, schedule=schedule, scheduler=config)


def scheduler(schedule):
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        **BETAS, prediction_type=schedule.prediction, rescale_betas_zero_snr=schedule.zero_snr
    )


def some_batch(model, size=16, seed=0):
    rng = np.random.default_rng(seed)
    batch = {"pixels": rng.integers(0, 256, (4, size, size, 3)).astype(np.uint8)}
    batch["ids"] = model.tokenizer(PROMPTS).ids
    if model.tokenizer_2 is not None:
        batch["ids_2"] = model.tokenizer_2(PROMPTS).ids
        batch["time_ids"] = rng.integers(0, 64, (4, 6)).astype(np.float32)
    return batch


def latents_batch(seed=0, width=32):
    rng = np.random.default_rng(seed)
    shapes = {"latents": (4, 8, 8, 4), "context": (4, 5, width)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def gradients(stage, params, frozen, batch, keys):
    return stage.gradients(params, (), frozen, batch, keys, jnp.int32(0))


def look(stage, params, frozen, batch, keys):
    return peers.quick_jit(functools.partial(gradients, stage))(params, frozen, batch, keys)


def split(params, trained):
    return {n: params[n] for n in trained}, {n: p for n, p in params.items() if n not in trained}


@functools.cache
def draws(loss, shape):
    """What the stage draws of [b] keys, compiled once."""
    return quick(lambda keys: losses.draws(keys, shape, loss, 1000), shape[0])


@functools.cache
def latents_noise(shape):
    """The same for the noise of the latents."""
    return quick(lambda keys: latent_noise(keys, shape), shape[0])


def quick(function, count):
    keys = noise.keys(range(count))
    return jax.jit(function).lower(keys).compile(compiler_options=peers.QUICK)


def torch_loss(networks, stage, batch, keys, states=None):
    """The loss as diffusers' train_text_to_image.py computes it, from what the stage draws."""
    import torch
    import torch.nn.functional as F
    from diffusers.training_utils import compute_snr

    loss, ddpm = stage.loss, scheduler(stage.model.schedule)
    if "latents" in batch:
        x0 = peers.nchw(batch["latents"])
    else:
        pixels = peers.nchw(batch["pixels"]).float() / 127.5 - 1
        moments = networks["vae"].encode(pixels).latent_dist
        own = latents_noise(peers.nhwc(moments.mean).shape)(keys)
        x0 = moments.mean + moments.std * peers.nchw(own)
        x0 = x0.detach() * networks["vae"].config.scaling_factor
    shape = peers.nhwc(x0).shape
    drawn = draws(loss, shape)(keys)
    times = torch.tensor(np.array(drawn.timesteps), dtype=torch.int64)
    eps, seen = peers.nchw(drawn.noise), peers.nchw(drawn.seen)
    noisy = ddpm.add_noise(x0, seen, times)
    states = states or torch_states
    context, more = states(networks, stage, batch, np.array(drawn.dropped))
    out = networks["unet"](noisy, times, context, **more).sample
    kind = stage.model.schedule.prediction
    wanted = {"epsilon": eps, "sample": x0}.get(kind)
    wanted = ddpm.get_velocity(x0, eps, times) if wanted is None else wanted
    distance = {"l2": F.mse_loss, "l1": F.l1_loss}[loss.kind]
    each = distance(out, wanted, reduction="none").mean((1, 2, 3))
    if loss.min_snr_gamma is not None:
        snr = compute_snr(ddpm, times)
        weight = torch.stack([snr, loss.min_snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        weight = weight / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
        weight[snr == 0] = 1
        each = each * weight
    return each.mean()


def torch_states(networks, stage, batch, dropped):
    """Text states, with the empty prompt for the images that are dropped."""
    import torch

    if "context" in batch:
        return torch.tensor(batch["context"]), {}
    ids = np.where(dropped[:, None], stage.model.tokenizer([""]).ids, batch["ids"])
    return networks["text_encoder"](torch.tensor(ids, dtype=torch.int64)).last_hidden_state, {}


def torch_states_xl(networks, stage, batch, dropped):
    """SDXL's: penultimate states side by side and the pooled ones, zeros where dropped."""
    import torch

    states, kept = [], torch.tensor(~dropped).float()
    for name, key in (("text_encoder", "ids"), ("text_encoder_2", "ids_2")):
        ids = torch.tensor(batch[key], dtype=torch.int64)
        out = networks[name](ids, output_hidden_states=True)
        states.append(out.hidden_states[-2])
    context = torch.cat(states, dim=-1) * kept[:, None, None]
    added = {"text_embeds": out.text_embeds * kept[:, None], "time_ids": batch["time_ids"]}
    added["time_ids"] = torch.tensor(added["time_ids"])
    return context, {"added_cond_kwargs": added}


def torch_gradients(modules):
    """The gradients of torch's networks under our names."""
    found = {}
    for name, module in modules.items():
        other = copy.deepcopy(module)
        for theirs, p in zip(other.parameters(), module.parameters(), strict=True):
            theirs.data = p.grad if p.grad is not None else p.data * 0
        found[name] = peers.flax_params(other)
    return found


def minus(ours, theirs):
    """The difference of two trees in float64, computed without jax, which compiles every shape."""
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), ours, theirs)


def norm(tree):
    return (
        sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree))
        ** 0.5
    )


def distance(ours, theirs):
    """The norm of the difference over the norm of the reference, over a whole tree."""
    return float(norm(minus(ours, theirs)) / norm(theirs))
