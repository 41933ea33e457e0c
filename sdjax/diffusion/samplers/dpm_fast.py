"""DPM-Solver within one step: exponential integrators in the noise estimate, orders 1 to 3."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sdjax.diffusion.stochastic import ancestral, renoise, root
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, Sigma, State, Step, StepNoise, pytree


@pytree
class DPMFast:
    """DPM-Solver-3 at every step, but for what is left of a budget at the end. Order 3 (2 where the
    last step has order 1), three evaluations a step, one draw where `eta` > 0.

    Lu et al. (2206.00927), algorithms 1 and 2, as k-diffusion's `sample_dpm_fast` spends n
    evaluations: n // 3 + 1 steps, of which the last ones are of lower order. `remainder` is n % 3:
    after 0 the last two steps have orders 2 and 1, after 1 and 2 the last has that order. It is a
    number, or one an image: budgets may differ within a program. `schedule` gives the sampler and
    the sigmas of a budget; sigmas may as well be one's own. A step to 0 is its denoised estimate.
    By name, for profiles and tasks, as many evaluations are spent as there are steps: `plan`.

    With `eta` a step goes down as in `EulerAncestral`, never below `sigma_min`, and the last one
    adds no noise: in k-diffusion all ends at sigma_min > 0. A step that would go down to 0 (`eta`
    above 1 without a `sigma_min`) is taken without noise.
    """

    remainder: ArrayLike = 2
    eta: ArrayLike = 0.0
    s_noise: ArrayLike = 1.0
    sigma_min: ArrayLike = 0.0

    @classmethod
    def schedule(
        cls,
        n: int,
        sigma_min: float,
        sigma_max: float,
        eta: ArrayLike = 0.0,
        s_noise: ArrayLike = 1.0,
    ) -> tuple["DPMFast", np.ndarray]:
        """The sampler, and its sigmas [n // 3 + 2] even in log sigma, that spend n evaluations."""
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise InputError(f"evaluations must be a whole number of at least 1, got {n!r}")
        if not (0 < sigma_min < np.inf and 0 < sigma_max < np.inf):
            raise InputError(
                "sigma_min and sigma_max must be above 0 and finite, "
                f"got {sigma_min} and {sigma_max}"
            )
        sigmas = np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), int(n) // 3 + 2))
        return cls(int(n) % 3, eta, s_noise, sigma_min), sigmas

    def plan(self, sigmas: Float[np.ndarray, "n"]) -> tuple["DPMFast", Float[np.ndarray, "m"]]:
        """This sampler for n evaluations, and its levels: of a run of n steps, if it ends at 0.

        n // 3 + 1 steps along the same spacing, the last of them to 0. Where n % 3 is 2 it takes
        n - 1: in k-diffusion, which ends above 0, the last step has order 2 then.
        """
        if sigmas[-1] != 0:
            return self, sigmas
        n = len(sigmas) - 1
        places = np.linspace(0, n - 1, n // 3 + 1)
        fewer = np.exp(np.interp(places, np.arange(n), np.log(sigmas[:-1])))
        fewer[0] = sigmas[0]
        return dataclasses.replace(self, remainder=n % 3), np.append(fewer, 0.0)

    @property
    def stochastic(self) -> ArrayLike:
        return self.eta

    def init(self, x: Latents) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        order = self._order(at)
        ends, sigma = at.sigma_next == 0, at.sigma
        safe = jnp.where(ends, sigma / 2, at.sigma_next)
        down = jnp.maximum(ancestral(sigma, safe, self.eta)[0], self.sigma_min)
        down = jnp.where((down > 0) & (down < safe) & (at.left > 1), down, safe)
        up = jnp.where(ends, 0.0, root((safe - down) * (safe + down)))

        eps = slope(denoise, x, sigma)
        r1 = jnp.where(order == 2, 1 / 2, 1 / 3)

        def second(eps: Latents) -> Latents:
            s1 = between(sigma, down, r1)
            return jnp.where(order >= 2, slope(denoise, straight(x, sigma, s1, eps), s1), eps)

        eps1 = jax.lax.cond(jnp.any(order >= 2), second, lambda eps: eps, eps)

        def third(eps: Latents) -> Latents:
            s2 = between(sigma, down, 2 / 3)
            return jnp.where(
                order == 3, slope(denoise, curved(x, sigma, s2, eps, eps1, 1 / 2), s2), eps
            )

        eps2 = jax.lax.cond(jnp.any(order == 3), third, lambda eps: eps, eps)
        low = straight(x, sigma, jnp.where(ends, 0.0, down), eps + (eps1 - eps) / (2 * r1))
        x = jnp.where(order == 3, curved(x, sigma, down, eps, eps2, 2 / 3), low)
        return renoise(x, up * self.s_noise, lambda: noise(sigma, at.sigma_next)), state

    def _order(self, at: Step) -> jax.Array:
        rest = jnp.asarray(self.remainder)
        even = jnp.where(at.left <= 2, at.left, 3)  # 3, ..., 3, 2, 1
        odd = jnp.where(at.left == 1, rest, 3)
        return jnp.where(at.sigma_next == 0, 1, jnp.where(rest == 0, even, odd))


def slope(denoise: Denoiser, x: Latents, sigma: Sigma) -> Latents:
    """dx/dsigma, which is the estimate of the noise."""
    return (x - denoise(x, sigma)) / sigma


def between(sigma: Sigma, sigma_next: Sigma, r: ArrayLike) -> Sigma:
    """The level a part r of the way, even in log sigma."""
    return sigma * (sigma_next / sigma) ** r


def straight(x: Latents, sigma: Sigma, sigma_next: Sigma, eps: Latents) -> Latents:
    """DPM-Solver-1: along one slope."""
    return x + (sigma_next - sigma) * eps


def curved(
    x: Latents, sigma: Sigma, sigma_next: Sigma, eps: Latents, eps_r: Latents, r: float
) -> Latents:
    """Along a slope that goes on changing in log sigma as from `eps` to `eps_r`, a part r of the
    way: algorithm 2's last line.
    """
    h = jnp.log(sigma / sigma_next)
    bend = (sigma - sigma_next) / h - sigma_next  # sigma_next ((e^h - 1) / h - 1)
    return straight(x, sigma, sigma_next, eps) - bend / r * (eps_r - eps)
