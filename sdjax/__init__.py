"""Latent diffusion in JAX: every network a pure function, every sampler a few lines."""

from sdjax.checkpoints import inspect, load, save
from sdjax.diffusion.guidance import cfg
from sdjax.diffusion.noise import Tape, White, key, keys
from sdjax.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, EulerAncestral, Heun
from sdjax.diffusion.sampling import sample
from sdjax.diffusion.schedules import Schedule
from sdjax.diffusion.spacings import exponential, karras, leading, linspace, trailing
from sdjax.errors import InputError
from sdjax.model import Model, decode, denoiser, encode_text
from sdjax.parallel import replicate
from sdjax.tasks.text_to_image import text_to_image
from sdjax.types import pytree, static

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DDPM",
    "DPMSolverPP2M",
    "Euler",
    "EulerAncestral",
    "Heun",
    "InputError",
    "Model",
    "Schedule",
    "Tape",
    "White",
    "cfg",
    "decode",
    "denoiser",
    "encode_text",
    "exponential",
    "inspect",
    "karras",
    "key",
    "keys",
    "leading",
    "linspace",
    "load",
    "pytree",
    "replicate",
    "sample",
    "save",
    "static",
    "text_to_image",
    "trailing",
]
