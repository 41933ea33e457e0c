"""DPM-Solver++ for the reverse SDE: exponential integrators that add noise as they go.

All three take `eta`, how much of the SDE's noise there is (0: the ODE, 1: the reverse-time SDE of
Song et al., 2011.13456), and `s_noise`, a factor on what is added. As in k-diffusion their noise
is that of one Brownian path an image unless another is given: `brownian` tells `sample` and tasks.
`DPMSolverPPSDE` needs it; the multistep two, which draw once a step, have the same distribution
with white noise, but on a path the picture stays as steps are refined.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdjax.diffusion.samplers.dpmpp import Memory
from sdjax.diffusion.stochastic import ancestral, renoise, root
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree, static


@pytree
class DPMSolverPPSDE:
    """Both stages of a singlestep DPM-Solver++ as ancestral steps. Order 2 at `eta` 0, two
    evaluations and two draws a step, one evaluation where it ends at 0.

    k-diffusion's `sample_dpmpp_sde`: Lu et al. (2211.01095), algorithm 1, with noise. The middle
    stands a part `r` of the step down in log sigma; the noise on the way there is the path's from
    sigma to the middle (draw 0), the step's own the path's from sigma to sigma_next (draw 1). Both
    belong to one `BrownianTree`: where they are independent, as white noise is, a Gaussian's
    variance comes out 10 % short after 60 steps.
    """

    eta: ArrayLike = 1.0
    s_noise: ArrayLike = 1.0
    r: ArrayLike = 0.5
    brownian: ClassVar[bool] = True

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        more = at.sigma_next > 0
        middle = at.sigma * jnp.where(more, at.sigma_next / at.sigma, 0.5) ** self.r

        def correct(x0: Latents) -> Latents:
            down, up = ancestral(at.sigma, middle, self.eta)
            half = x0 + down / at.sigma * (x - x0)
            half = renoise(half, up * self.s_noise, lambda: noise(at.sigma, middle, 0))
            change = denoise(half, middle) - x0
            return jnp.where(more, x0 + change / (2 * self.r), x0)

        x0 = jax.lax.cond(jnp.any(more), correct, lambda x0: x0, x0)
        down, up = ancestral(at.sigma, at.sigma_next, self.eta)
        x = x0 + down / at.sigma * (x - x0)
        return renoise(x, up * self.s_noise, lambda: noise(at.sigma, at.sigma_next, 1)), state


@pytree
class DPMSolverPP2MSDE:
    """The two-step multistep solver with noise. Order 2 at `eta` 0, one evaluation and one draw a
    step; first order on the first step and into 0.

    Lu et al. (2211.01095), section 5 and algorithm 2, as in k-diffusion's `sample_dpmpp_2m_sde`:
    with h = log(s / s') and g = (1 + eta) h, x0 + e^-g (x - x0) plus the difference of estimates,
    weighed by (1 - e^-g) / 2 ("midpoint") or 1 - (1 - e^-g) / g ("heun"), plus noise of variance
    s'^2 (1 - e^(-2 eta h)).
    """

    solver: str = static(default="midpoint")
    eta: ArrayLike = 1.0
    s_noise: ArrayLike = 1.0
    brownian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.solver not in ("midpoint", "heun"):
            raise InputError(f"solver must be one of midpoint, heun, got {self.solver!r}")

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return Memory(jnp.zeros_like(x), jnp.ones((x.shape[0], 1, 1, 1), x.dtype))

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        h, ends = length(at)
        g = (1 + jnp.asarray(self.eta)) * h
        change = (x0 - state.x0) * (h / state.h)
        weight = -jnp.expm1(-g) / 2 if self.solver == "midpoint" else phi2(g)
        followed = x0 + jnp.exp(-g) * (x - x0) + jnp.where(at.index == 0, 0.0, weight * change)
        x = jnp.where(ends, x0, followed)
        x = renoise(
            x, self.s_noise * added(at, h, self.eta), lambda: noise(at.sigma, at.sigma_next)
        )
        return x, Memory(x0, jnp.broadcast_to(h, state.h.shape))


class Memory3(NamedTuple):
    """The two steps before, the latest first."""

    x0: Latents
    x0_before: Latents
    h: Sigma  # lengths in log sigma, [b, 1, 1, 1]
    h_before: Sigma


@pytree
class DPMSolverPP3MSDE:
    """The three-step multistep solver with noise. One evaluation and one draw a step; lower orders
    on the first two steps, first order into 0.

    k-diffusion's `sample_dpmpp_3m_sde`: Lu et al.'s expansion (2211.01095, section 4) with the
    first and second divided differences of the estimates in log sigma, weighed by the exponential
    integrator's phi_2 and phi_3 of g = (1 + eta) h. Noise as in `DPMSolverPP2MSDE`.

    k-diffusion adds the second difference once, as DPM-Solver's authors and diffusers do. Being
    half of a second derivative it is due twice: as it stands the method has order 2 at `eta` 0,
    with a small constant. `taylor` adds it twice, which has order 3.
    """

    taylor: bool = static(default=False)
    eta: ArrayLike = 1.0
    s_noise: ArrayLike = 1.0
    brownian: ClassVar[bool] = True

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        unit = jnp.ones((x.shape[0], 1, 1, 1), x.dtype)
        return Memory3(jnp.zeros_like(x), jnp.zeros_like(x), unit, unit)

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        x0 = denoise(x, at.sigma)
        h, ends = length(at)
        g = (1 + jnp.asarray(self.eta)) * h
        r, r_before = state.h / h, state.h_before / h
        slope, slope_before = (x0 - state.x0) / r, (state.x0 - state.x0_before) / r_before
        bend = jnp.where(at.index >= 2, (slope - slope_before) / (r + r_before), 0.0)
        slope = jnp.where(at.index >= 1, slope + r * bend, 0.0)
        phi3 = (phi2(g) / g - 0.5) * (2 if self.taylor else 1)
        followed = x0 + jnp.exp(-g) * (x - x0) + phi2(g) * slope - phi3 * bend
        x = jnp.where(ends, x0, followed)
        x = renoise(
            x, self.s_noise * added(at, h, self.eta), lambda: noise(at.sigma, at.sigma_next)
        )
        return x, Memory3(x0, state.x0, jnp.broadcast_to(h, state.h.shape), state.h)


def length(at: Step) -> tuple[Sigma, jax.Array]:
    """The step's length in log sigma (any, where it ends at 0), and where it ends at 0."""
    ends = at.sigma_next == 0
    return -jnp.log(jnp.where(ends, 0.5, at.sigma_next / at.sigma)), ends


def added(at: Step, h: Sigma, eta: ArrayLike) -> jax.Array:
    """The noise of a step of the SDE: sigma_next sqrt(1 - e^(-2 eta h))."""
    return at.sigma_next * root(-jnp.expm1(-2 * jnp.asarray(eta) * h))


def phi2(g: jax.Array) -> jax.Array:
    """1 - (1 - e^-g) / g."""
    return 1 + jnp.expm1(-g) / g
