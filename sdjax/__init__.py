"""Latent diffusion in JAX: every network a pure function, every sampler a few lines."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdjax.checkpoints import inspect as inspect
    from sdjax.checkpoints import load as load
    from sdjax.checkpoints import save as save
    from sdjax.diffusion.brownian import BrownianTree as BrownianTree
    from sdjax.diffusion.guidance import cfg as cfg
    from sdjax.diffusion.noise import Tape as Tape
    from sdjax.diffusion.noise import White as White
    from sdjax.diffusion.noise import key as key
    from sdjax.diffusion.noise import keys as keys
    from sdjax.diffusion.samplers import DDIM as DDIM
    from sdjax.diffusion.samplers import DDPM as DDPM
    from sdjax.diffusion.samplers import DEIS as DEIS
    from sdjax.diffusion.samplers import DPM2 as DPM2
    from sdjax.diffusion.samplers import ERSDE as ERSDE
    from sdjax.diffusion.samplers import IPNDM as IPNDM
    from sdjax.diffusion.samplers import LCM as LCM
    from sdjax.diffusion.samplers import LMS as LMS
    from sdjax.diffusion.samplers import PNDM as PNDM
    from sdjax.diffusion.samplers import SEEDS2 as SEEDS2
    from sdjax.diffusion.samplers import SEEDS3 as SEEDS3
    from sdjax.diffusion.samplers import TCD as TCD
    from sdjax.diffusion.samplers import ConsistencyModel as ConsistencyModel
    from sdjax.diffusion.samplers import DDIMInverse as DDIMInverse
    from sdjax.diffusion.samplers import DPM2Ancestral as DPM2Ancestral
    from sdjax.diffusion.samplers import DPMAdaptive as DPMAdaptive
    from sdjax.diffusion.samplers import DPMFast as DPMFast
    from sdjax.diffusion.samplers import DPMSolver as DPMSolver
    from sdjax.diffusion.samplers import DPMSolverPP2M as DPMSolverPP2M
    from sdjax.diffusion.samplers import DPMSolverPP2MSDE as DPMSolverPP2MSDE
    from sdjax.diffusion.samplers import DPMSolverPP2SAncestral as DPMSolverPP2SAncestral
    from sdjax.diffusion.samplers import DPMSolverPP3MSDE as DPMSolverPP3MSDE
    from sdjax.diffusion.samplers import DPMSolverPPSDE as DPMSolverPPSDE
    from sdjax.diffusion.samplers import DPMSolverSingle as DPMSolverSingle
    from sdjax.diffusion.samplers import Euler as Euler
    from sdjax.diffusion.samplers import EulerAncestral as EulerAncestral
    from sdjax.diffusion.samplers import ExpHeun as ExpHeun
    from sdjax.diffusion.samplers import GradientEstimation as GradientEstimation
    from sdjax.diffusion.samplers import Heun as Heun
    from sdjax.diffusion.samplers import HeunPP2 as HeunPP2
    from sdjax.diffusion.samplers import RESMultistep as RESMultistep
    from sdjax.diffusion.samplers import Restart as Restart
    from sdjax.diffusion.samplers import SASolver as SASolver
    from sdjax.diffusion.samplers import UniPC as UniPC
    from sdjax.diffusion.sampling import sample as sample
    from sdjax.diffusion.schedules import Schedule as Schedule
    from sdjax.diffusion.spacings import exponential as exponential
    from sdjax.diffusion.spacings import karras as karras
    from sdjax.diffusion.spacings import leading as leading
    from sdjax.diffusion.spacings import linspace as linspace
    from sdjax.diffusion.spacings import trailing as trailing
    from sdjax.errors import InputError as InputError
    from sdjax.model import Model as Model
    from sdjax.model import decode as decode
    from sdjax.model import denoiser as denoiser
    from sdjax.model import encode_text as encode_text
    from sdjax.parallel import replicate as replicate
    from sdjax.tasks.text_to_image import text_to_image as text_to_image
    from sdjax.types import pytree as pytree
    from sdjax.types import static as static

# Names are imported when first used (PEP 562): the command line refuses bad input before jax loads.
_HOME = {
    "checkpoints": "inspect load save",
    "diffusion.brownian": "BrownianTree",
    "diffusion.guidance": "cfg",
    "diffusion.noise": "Tape White key keys",
    "diffusion.samplers": (
        "ConsistencyModel DDIM DDIMInverse DDPM DEIS DPM2 DPM2Ancestral DPMAdaptive "
        "DPMFast DPMSolver DPMSolverPP2M DPMSolverPP2MSDE DPMSolverPP2SAncestral "
        "DPMSolverPP3MSDE DPMSolverPPSDE DPMSolverSingle ERSDE Euler EulerAncestral "
        "ExpHeun GradientEstimation Heun HeunPP2 IPNDM LCM LMS PNDM RESMultistep "
        "Restart SASolver SEEDS2 SEEDS3 TCD UniPC"
    ),
    "diffusion.sampling": "sample",
    "diffusion.schedules": "Schedule",
    "diffusion.spacings": "exponential karras leading linspace trailing",
    "errors": "InputError",
    "model": "Model decode denoiser encode_text",
    "parallel": "replicate",
    "tasks.text_to_image": "text_to_image",
    "types": "pytree static",
}
_NAMES = {name: home for home, names in _HOME.items() for name in names.split()}
_MODULES = {home.split(".")[0] for home in _HOME} | {"images", "lab", "models", "text", "training"}

__all__ = [*sorted(_NAMES)]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"sdjax.{_NAMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"sdjax.{name}")
    else:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *sorted(_MODULES), "__version__"]
