"""Solvers, one family a file: Karras et al.'s sigma space, `denoise(x, sigma) -> x0`, and nothing
else.
"""

from sdjax.diffusion.samplers.consistency import LCM, TCD, ConsistencyModel
from sdjax.diffusion.samplers.ddim import DDIM, DDIMInverse
from sdjax.diffusion.samplers.ddpm import DDPM
from sdjax.diffusion.samplers.deis import DEIS
from sdjax.diffusion.samplers.dpm2 import DPM2, DPM2Ancestral
from sdjax.diffusion.samplers.dpm_adaptive import DPMAdaptive
from sdjax.diffusion.samplers.dpm_fast import DPMFast
from sdjax.diffusion.samplers.dpm_solver import DPMSolver, DPMSolverSingle
from sdjax.diffusion.samplers.dpmpp import DPMSolverPP2M
from sdjax.diffusion.samplers.dpmpp_sde import DPMSolverPP2MSDE, DPMSolverPP3MSDE, DPMSolverPPSDE
from sdjax.diffusion.samplers.dpmpp_single import DPMSolverPP2SAncestral
from sdjax.diffusion.samplers.er_sde import ERSDE
from sdjax.diffusion.samplers.euler import Euler, EulerAncestral
from sdjax.diffusion.samplers.gradient_estimation import GradientEstimation
from sdjax.diffusion.samplers.heun import Heun
from sdjax.diffusion.samplers.heunpp import HeunPP2
from sdjax.diffusion.samplers.lms import LMS
from sdjax.diffusion.samplers.pndm import IPNDM, PNDM
from sdjax.diffusion.samplers.res import RESMultistep
from sdjax.diffusion.samplers.restart import Restart
from sdjax.diffusion.samplers.sa_solver import SASolver
from sdjax.diffusion.samplers.seeds import SEEDS2, SEEDS3, ExpHeun
from sdjax.diffusion.samplers.unipc import UniPC

__all__ = [
    "ConsistencyModel",
    "DDIM",
    "DDIMInverse",
    "DDPM",
    "DEIS",
    "DPM2",
    "DPM2Ancestral",
    "DPMAdaptive",
    "DPMFast",
    "DPMSolver",
    "DPMSolverPP2M",
    "DPMSolverPP2MSDE",
    "DPMSolverPP2SAncestral",
    "DPMSolverPP3MSDE",
    "DPMSolverPPSDE",
    "DPMSolverSingle",
    "ERSDE",
    "Euler",
    "EulerAncestral",
    "ExpHeun",
    "GradientEstimation",
    "Heun",
    "HeunPP2",
    "IPNDM",
    "LCM",
    "LMS",
    "PNDM",
    "RESMultistep",
    "Restart",
    "SASolver",
    "SEEDS2",
    "SEEDS3",
    "TCD",
    "UniPC",
]
