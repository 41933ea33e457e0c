"""Few-step sampling of distilled models: LCM, TCD and consistency models."""

from typing import ClassVar

import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.sampling import pick
from sdjax.diffusion.stochastic import renoise, root
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree


@pytree
class LCM:
    """To the estimate, then fresh noise. One evaluation and one draw a step; order 0: no ODE is
    followed, the model must have been distilled.

    Luo et al., latent consistency models (2310.04378), algorithm 3. `skips`, [n] or
    [n, b, 1, 1, 1], is the share c_skip of the latents in the consistency function at each step
    (c_out = sqrt(1 - c_skip)), which diffusers computes from the timestep: 7e-6 at most for models
    that exist, and None is 0.
    """

    skips: ArrayLike | None = None

    planned: ClassVar[tuple[str, ...]] = ("skips",)

    @property
    def stochastic(self) -> bool:
        return True

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        if self.skips is not None:
            skip = pick(jnp.asarray(self.skips, x.dtype), at.index)
            x0 = root(1 - skip) * x0 + skip * x / jnp.sqrt(1 + at.sigma**2)
        return x0 + at.sigma_next * noise(at.sigma, at.sigma_next), state


@pytree
class TCD:
    """Down to a level below the next, then fresh noise up to it. Order 1 at `gamma` 0, where it is
    Euler, else 0, as `LCM`; one evaluation a step, one draw.

    Zheng et al., trajectory consistency distillation (2402.19159), algorithm 4. `gamma` 1 goes to
    the estimate: `LCM`. The lower level is (1 - gamma) sigma_next, or `levels`, [n] or
    [n, b, 1, 1, 1]: diffusers (where gamma is called eta) takes the timestep floor((1 - eta) t).
    """

    gamma: ArrayLike = 0.3
    levels: ArrayLike | None = None

    planned: ClassVar[tuple[str, ...]] = ("levels",)

    @property
    def stochastic(self) -> ArrayLike:
        return self.gamma

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        if self.levels is None:
            down = jnp.maximum(1 - jnp.asarray(self.gamma), 0) * at.sigma_next
        else:
            down = pick(jnp.asarray(self.levels, x.dtype), at.index)
        up = root(at.sigma_next**2 - down**2)
        x = x0 + down / at.sigma * (x - x0)
        return renoise(x, up, lambda: noise(at.sigma, at.sigma_next)), state


@pytree
class ConsistencyModel:
    """To the estimate, then fresh noise; the model knows the image down to `sigma_min` only. One
    evaluation and one draw a step; order 0, as `LCM`.

    Song et al. (2303.01469), algorithm 1: x' = f(x) + s_noise sqrt(sigma'^2 - sigma_min^2) z, and f
    is the denoiser bent to give x back at sigma_min (eq. 5 and appendix C, for data of variance 1).
    `clip` keeps f within -clip .. clip.
    """

    sigma_min: ArrayLike = 0.0
    s_noise: ArrayLike = 1.0
    clip: ArrayLike | None = None

    @property
    def stochastic(self) -> bool:
        return True

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        away = at.sigma - self.sigma_min
        network = denoise(x, at.sigma) - x / (1 + at.sigma**2)
        x0 = x / (1 + away**2) + away / at.sigma * network
        if self.clip is not None:
            x0 = jnp.clip(x0, -jnp.asarray(self.clip), self.clip)
        std = self.s_noise * root(at.sigma_next**2 - jnp.square(self.sigma_min))
        return x0 + std * noise(at.sigma, at.sigma_next), state
