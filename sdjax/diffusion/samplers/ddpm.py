"""DDPM: ancestral sampling, one evaluation a step."""

import jax.numpy as jnp

from sdjax.diffusion.stochastic import root
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree, static

VARIANCES = ("fixed_small", "fixed_large")


@pytree
class DDPM:
    """Denoising diffusion probabilistic models. Order 1, one evaluation a step, one draw.

    Ho et al. (2006.11239), algorithm 2: the posterior's mean x0 + (s'/s)^2 (x - x0) and its
    variance s'^2 (s^2 - s'^2) / s^2 ("fixed_small"), or the forward step's beta, (s^2 - s'^2)(1 +
    s'^2) / (1 + s^2) in sigma space ("fixed_large"). No noise is added where the step ends at 0,
    unless `noisy_end`: diffusers' fixed_large leaves it out at timestep 0 alone.
    """

    variance: str = static(default="fixed_small")
    noisy_end: bool = static(default=False)

    def __post_init__(self) -> None:
        if self.variance not in VARIANCES:
            raise InputError(
                f"variance must be one of {', '.join(VARIANCES)}, got {self.variance!r}"
            )

    @property
    def stochastic(self) -> bool:
        return True

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        ratio = at.sigma_next / at.sigma
        if self.variance == "fixed_small":
            std = at.sigma_next * root(1 - ratio**2)
        else:
            grown = (1 + at.sigma_next**2) / (1 + at.sigma**2)
            std = at.sigma * root(1 - ratio**2) * jnp.sqrt(grown)
            if not self.noisy_end:
                std = jnp.where(at.sigma_next > 0, std, 0.0)
        return x0 + ratio**2 * (x - x0) + std * noise(at.sigma, at.sigma_next), state
