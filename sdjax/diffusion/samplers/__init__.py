"""Solvers, one family a file: Karras et al.'s sigma space, `denoise(x, sigma) -> x0`, and nothing
else.
"""

from sdjax.diffusion.samplers.ddim import DDIM
from sdjax.diffusion.samplers.ddpm import DDPM
from sdjax.diffusion.samplers.dpmpp import DPMSolverPP2M
from sdjax.diffusion.samplers.euler import Euler, EulerAncestral
from sdjax.diffusion.samplers.heun import Heun

__all__ = ["DDIM", "DDPM", "DPMSolverPP2M", "Euler", "EulerAncestral", "Heun"]
