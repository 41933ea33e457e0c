"""What samplers are tried on: problems of which the answer is known exactly."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from sdjax.diffusion import spacings
from sdjax.diffusion.analytic import Gaussian, GaussianMixture
from sdjax.diffusion.noise import keys
from sdjax.diffusion.plan import fitted
from sdjax.diffusion.samplers import Heun
from sdjax.diffusion.sampling import Carry, begin, scan
from sdjax.diffusion.schedules import Schedule
from sdjax.diffusion.trajectories import may_draw
from sdjax.lab import drawing
from sdjax.types import Denoiser, Sampler

ORDER_STEPS = (40, 80, 160)
"""Steps between which an order is measured."""
_ROOM = 256
"""Steps that a program has room for; more take the next power of two."""
_ROUNDING = 1e-11
"""Errors below say nothing of an order."""

Samples = Float[np.ndarray, "n ..."]


@runtime_checkable
class Problem(Protocol):
    """Something to sample, and what would have been right."""

    name: str
    about: str
    """One sentence for a reader: what it is, and what counts as right."""

    def sigmas(self, spacing: str, steps: int) -> np.ndarray:
        """The noise levels that `steps` steps of a spacing go through."""
        ...

    def solve(self, sampler: Sampler, spacing: str, steps: int, count: int) -> Samples:
        """What a sampler makes of `count` noises: always the same ones."""
        ...

    def reference(self, count: int) -> Samples:
        """What the probability-flow ODE makes of these noises."""
        ...

    def truth(self, count: int, seed: int = 0) -> Samples | None:
        """Draws from the data's own distribution; None where it is not known."""
        ...

    def picture(self, samples: Samples, right: Samples) -> UInt8[np.ndarray, "h w 3"]:
        """What one looks at, `right` being the reference of the same noises."""
        ...

    def attributes(self, samples: Samples) -> float | None:
        """The share of samples that are as asked, where that can be measured."""
        ...

    def order(self, sampler: Sampler, spacing: str) -> float | None:
        """How fast the error of a solver of the ODE falls with the steps, where that is known."""
        ...


class Analytic:
    """A distribution of points in the plane, whose denoiser is known in closed form.

    Noise levels and names of spacings are those of a training schedule, Stable Diffusion's by
    default. All is computed in float64, so that a solver's order is not hidden by rounding. The
    right answer is the flow followed exactly to the schedule's lowest level, and the estimate
    there: no model knows more of the last stretch than its estimate.

    `points` are [n, 1, 1, 2]. `draw(rng, n)` gives points of the data; `flow(x, sigma, sigma_next)`
    is the exact flow where there is one, and Heun's method with 4,000 steps is followed otherwise.
    """

    def __init__(
        self,
        name: str,
        about: str,
        denoise: Denoiser,
        draw: Callable[[np.random.Generator, int], Samples],
        flow: Callable | None = None,
        schedule: Schedule | None = None,
    ):
        self.name = name
        self.about = about
        self.denoise = denoise
        self.schedule = schedule or Schedule()
        self._draw = draw
        self._flow = flow
        self._references: dict[int, Samples] = {}

    def sigmas(self, spacing: str, steps: int) -> np.ndarray:
        """See `Problem.sigmas`."""
        return spacings.named(spacing, steps, self.schedule)[0]

    def solve(self, sampler: Sampler, spacing: str, steps: int, count: int) -> Samples:
        """See `Problem.solve`; float64."""
        sampler, levels = fitted(sampler, self.sigmas(spacing, steps))
        with jax.enable_x64(True):
            sampler = jax.tree.map(_leaf64, sampler)
            noise = keys(range(count)) if may_draw(sampler) else None
            start = jnp.asarray(_noise(count)) * levels[0]
            return np.asarray(_solved(sampler, self.denoise, start, levels, noise))

    def reference(self, count: int) -> Samples:
        """See `Problem.reference`."""
        if count not in self._references:
            low, high = self.schedule.sigma_min, self.schedule.sigma_max
            with jax.enable_x64(True):
                end = self._followed(jnp.asarray(_noise(count)) * high, high, low)
                self._references[count] = np.asarray(
                    self.denoise(jnp.asarray(end), jnp.asarray(low))
                )
        return self._references[count]

    def truth(self, count: int, seed: int = 0) -> Samples:
        """See `Problem.truth`."""
        return self._draw(np.random.default_rng([seed, 1]), count)

    def picture(self, samples: Samples, right: Samples) -> UInt8[np.ndarray, "h w 3"]:
        """The points, in the colours of the places where the exact flow takes their noises."""
        return drawing.points(samples[:, 0, 0], drawing.colours(right[:, 0, 0]))

    def attributes(self, samples: Samples) -> None:
        """Points have none."""

    def order(self, sampler: Sampler, spacing: str) -> float | None:
        """The slope of log error by log steps between 80 and 160, or 40 and 80, steps.

        Without the last step to 0, whose length no number of steps shortens; the error is the
        median over 64 points, as a few on the border between two Gaussians go their own way. None
        where the errors are not finite.
        """
        errors = []
        with jax.enable_x64(True):
            sampler = jax.tree.map(_leaf64, sampler)
            for steps in ORDER_STEPS:
                levels = self.sigmas(spacing, steps)
                run, levels = fitted(sampler, levels[: len(levels) - (levels[-1] == 0)])
                start = jnp.asarray(_noise(64)) * levels[0]
                found = _solved(run, self.denoise, start, levels, None)
                away = np.linalg.norm(found - self._followed(start, levels[0], levels[-1]), axis=-1)
                errors.append(float(np.median(away)))
        if not all(map(math.isfinite, errors)):
            return None
        slopes = [math.log2(max(a, 1e-300) / max(b, 1e-300)) for a, b in itertools.pairwise(errors)]
        return slopes[1] if errors[2] > _ROUNDING else slopes[0]

    def _followed(self, x: Any, sigma: float, sigma_next: float) -> np.ndarray:
        """Where the flow takes x, under float64."""
        if self._flow is not None:
            return np.asarray(self._flow(x, jnp.float64(sigma), jnp.float64(sigma_next)))
        levels = np.exp(np.linspace(np.log(sigma), np.log(sigma_next), 4001))
        return np.asarray(_solved(Heun(), self.denoise, x, levels, None))


def gaussian() -> Analytic:
    """One Gaussian, wide one way and narrow the other."""
    mean, std = np.array([0.3, -0.2]), np.array([1.0, 0.25])
    denoise = Gaussian(mean, std)

    def draw(rng: np.random.Generator, n: int) -> Samples:
        return mean + std * rng.standard_normal((n, 1, 1, 2))

    about = "One Gaussian in the plane, four times as wide as high; its flow is known exactly."
    return Analytic("gaussian", about, denoise, draw, denoise.flow)


def mixture() -> Analytic:
    """Seven Gaussians of unequal weight and width, six of them around one."""
    angle = np.arange(6) * np.pi / 3 + 0.3
    means = np.stack([np.cos(angle), np.sin(angle)], -1) * np.array([[1.15], [0.95]] * 3)
    means = np.concatenate([np.zeros((1, 2)), means])
    stds = np.array([0.22, 0.1, 0.16, 0.08, 0.16, 0.1, 0.12])
    weights = np.array([0.22, 0.16, 0.1, 0.16, 0.1, 0.14, 0.12])
    denoise = GaussianMixture(weights, means[:, None, None], stds)

    def draw(rng: np.random.Generator, n: int) -> Samples:
        which = rng.choice(7, n, p=weights)
        noise = rng.standard_normal((n, 2)) * stds[which, None]
        return (means[which] + noise)[:, None, None]

    about = "Seven Gaussians in the plane, of unequal weight and width; right is the exact flow."
    return Analytic("mixture", about, denoise, draw)


PROBLEMS: Mapping[str, Callable[[], Analytic]] = {"gaussian": gaussian, "mixture": mixture}
"""Those that need no model, by name."""


def _solved(sampler: Sampler, denoise: Denoiser, x: Any, sigmas: np.ndarray, noise: Any) -> Any:
    """`sample`, by one program for all step counts and spacings."""
    steps = len(sigmas) - 1
    room = max(_ROOM, 1 << (steps - 1).bit_length()) - steps
    padded = np.pad(sigmas, (0, room), mode="edge")  # as of an image that is finished
    return _run(sampler, denoise, x, jnp.asarray(padded), noise, jnp.int32(steps))


@jax.jit
def _run(sampler: Sampler, denoise: Denoiser, x: Any, sigmas: Any, noise: Any, steps: Any) -> Any:
    def step(i: Any, carry: Carry) -> Carry:
        return scan(sampler, denoise, carry, sigmas, noise, i, 1)

    return jax.lax.fori_loop(0, steps, step, begin(sampler, x)).x


def _noise(count: int) -> Samples:
    """Unit noise [count, 1, 1, 2]; the first points are the same for any count."""
    return np.random.default_rng(0).standard_normal((count, 1, 1, 2))


def _leaf64(leaf: Any) -> Any:
    return jnp.asarray(leaf, jnp.float64) if isinstance(leaf, int | float) else leaf
