"""DDIM and its inversion: first order, one evaluation a step."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.guidance import thresholded
from sdjax.diffusion.sampling import pick
from sdjax.diffusion.stochastic import ancestral
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, State, Step, StepNoise, pytree, static


@pytree
class DDIM:
    """Denoising diffusion implicit models. Order 1, one evaluation a step, one draw where `eta` >
    0.

    Song et al. (2010.02502), eq. 12 and 16, in sigma space: `eta` 0 is Euler, 1 is DDPM. Rising
    sigmas invert it (section 4.3), at `eta` 0.

    Quirks of diffusers. `landings`: its step always goes down by T // n timesteps, while the next
    evaluation stands where the spacing says, on the same variance-preserving latents. Sigmas [n] or
    [n, b, 1, 1, 1] where each step lands; None where the two agree. `clip` keeps the estimate
    within -clip .. clip but not the direction, which the unclipped one gives; `threshold` (ratio,
    limit and maximum of `guidance.threshold`) does the same by a quantile.
    """

    eta: ArrayLike = 0.0
    landings: ArrayLike | None = None
    clip: ArrayLike | None = None
    threshold: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None

    planned: ClassVar[tuple[str, ...]] = ("landings", "clip", "threshold")

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        landing = at.sigma_next
        if self.landings is not None:
            landing = pick(jnp.asarray(self.landings, x.dtype), at.index)
        x0 = denoise(x, at.sigma)
        away = x - x0
        if self.clip is not None:
            x0 = jnp.clip(x0, -jnp.asarray(self.clip), self.clip)
        if self.threshold is not None:
            x0 = thresholded(x0, *self.threshold)
        down, up = ancestral(at.sigma, landing, self.eta)
        x = x0 + down / at.sigma * away
        drawn = jnp.any(jnp.asarray(self.eta) != 0)
        x = jax.lax.cond(drawn, lambda x: x + up * noise(at.sigma, landing), lambda x: x, x)
        if self.landings is not None:
            x = x * jnp.sqrt((1 + at.sigma_next**2) / (1 + landing**2))
        return x, state


@pytree
class DDIMInverse:
    """DDIM from an image to its noise, as diffusers walks it: sigmas rise. Order 1, one evaluation
    a step.

    Song et al. (2010.02502), section 4.3. The network is told the timestep that a step goes to, at
    the level that it comes from: this is in the plan's timesteps. `landings` and `clip` are as in
    `DDIM`.

    `clean`: the first step leaves from the image itself, at level 0, where the direction cannot be
    told from x - x0. The network sees the same latents at sigmas[0], any level above 0, and
    `prediction` says what is the same there: its noise, or its v.
    """

    clean: bool = static(default=False)
    prediction: str = static(default="epsilon")
    landings: ArrayLike | None = None
    clip: ArrayLike | None = None

    planned: ClassVar[tuple[str, ...]] = ("landings", "clip")

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction"):
            raise InputError(
                f"prediction must be one of epsilon, v_prediction, got {self.prediction!r}"
            )

    @property
    def stochastic(self) -> bool:
        return False

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        landing = at.sigma_next
        if self.landings is not None:
            landing = pick(jnp.asarray(self.landings, x.dtype), at.index)
        x0 = denoise(x, at.sigma)
        slope = (x - x0) / at.sigma
        if self.clean:
            first, scale = at.index == 0, jnp.sqrt(1 + at.sigma**2)
            if self.prediction == "v_prediction":
                slope = jnp.where(first, (slope - at.sigma * x0) / scale, slope)
            x0 = jnp.where(first, x / scale, x0)
        if self.clip is not None:
            x0 = jnp.clip(x0, -jnp.asarray(self.clip), self.clip)
        x = x0 + landing * slope
        return x * jnp.sqrt((1 + at.sigma_next**2) / (1 + landing**2)), state
