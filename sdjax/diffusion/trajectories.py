"""What happens on the way: trajectories from inside the scan, and what a run costs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Float, Int

from sdjax.diffusion import sampling
from sdjax.diffusion.sampling import Sigmas
from sdjax.diffusion.stochastic import Around
from sdjax.errors import InputError
from sdjax.types import Denoiser, Latents, Sampler, Sigma, State, Step, StepNoise, pytree


class Trajectory(NamedTuple):
    """A run seen at every k-th step: m = ceil(n / k) times, and at its end."""

    x: Float[Array, "t b h w c"]  # [m+1]: the noisy image before the step; the last is the result
    x0: Float[Array, "m b h w c"]  # [m]: that step's first estimate
    sigma: Float[Array, "t ..."]  # [m+1] or [m+1, b, 1, 1, 1]: where x stands


def trajectory(
    sampler: Sampler,
    denoise: Denoiser,
    x: Latents,
    sigmas: Sigmas,
    noise: Any = None,
    every: int = 1,
) -> Trajectory:
    """What `sampling.sample` does, as arrays: `trajectory(...).x[-1]` is its result.

    No callbacks, and no evaluations more than `sample` makes: the estimate is taken where the
    sampler asks for it first in its step. One that asks only inside a loop or a condition of its
    own (PNDM, DPMAdaptive) costs an evaluation a step more. An image that is finished repeats its
    last entries. Not jitted: callers jit, with `every` static.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InputError(f"every must be a whole number of at least 1, got {every!r:.60}")
    steps = np.shape(sigmas)[0] - 1
    watched = _Watched(sampler)
    begun = sampling.begin(watched, x)

    def segment(carry: sampling.Carry, start: Int[Array, ""]) -> tuple[sampling.Carry, tuple]:
        def one(
            both: tuple[sampling.Carry, tuple], i: Int[Array, ""]
        ) -> tuple[tuple[sampling.Carry, tuple], None]:
            before, kept = both
            after = sampling.scan(watched, denoise, before, sigmas, noise, start + i, 1)
            seen = (before.x, after.state.x0)
            return (after, jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), seen, kept)), None

        (carry, kept), _ = jax.lax.scan(one, (carry, (carry.x, carry.x)), jnp.arange(every))
        return carry, kept

    starts = np.arange(0, steps, every)
    last, (xs, x0s) = jax.lax.scan(segment, begun, jnp.asarray(starts))
    levels = jnp.asarray(sigmas, last.x.dtype)[np.append(starts, steps)]
    return Trajectory(jnp.concatenate([xs, last.x[None]]), x0s, levels)


def evaluations(
    sampler: Sampler,
    sigmas: Sigmas,
    denoise: Denoiser | None = None,
    x: Latents | None = None,
) -> np.ndarray:
    """How often each image's network is asked, whole numbers [] or [b], on the host.

    Counted by running every schedule alone, step by step and untraced, on a single value; give
    `denoise` and the starting `x` for a sampler that looks at its image to choose its steps. In a
    batch of unequal images an evaluation runs for all where one needs it; this is what each needs.
    """
    table = np.asarray(sigmas, np.float32)
    rows = table.reshape(len(table), -1)
    counts = []
    for i in range(rows.shape[1]):
        start = jnp.zeros((1, 1, 1, 1)) if x is None else jnp.asarray(x)[i : i + 1]
        counts.append(_count(sampler, rows[:, i], denoise or _nothing, start))
    return np.asarray(counts).reshape(table.shape[1:2])


def draws(sampler: Sampler, shape: tuple[int, ...]) -> int:
    """How often a sampler draws noise within a step, for images of `shape` (h, w, c); 0 where it
    says that it will not.

    Found by tracing one step: draws that are counted inside the program are not seen.
    """
    return max(_drawn(sampler, shape), default=0) if may_draw(sampler) else 0


def _drawn(sampler: Sampler, shape: tuple[int, ...]) -> list[int]:
    """For each call for noise in one traced step the draws so far; 0 where the program counts."""
    calls = []

    def noise(sigma: Sigma, sigma_next: Sigma, draw: Any = 0) -> Latents:
        calls.append(draw + 1 if isinstance(draw, int) else 0)
        return jnp.zeros((1, *shape))

    def step(x: Latents) -> Latents:
        at = Step(jnp.int32(0), jnp.int32(2), jnp.float32(2), jnp.float32(1))
        return sampler.step(_nothing, x, at, sampler.init(x), noise)[0]

    jax.eval_shape(step, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return calls


class _Seen(NamedTuple):
    state: State
    x0: Latents


@pytree
class _Watched(Around):
    """A sampler whose state also holds the first estimate of its last step."""

    sampler: Any

    def init(self, x: Latents) -> State:
        return _Seen(self.sampler.init(x), jnp.zeros_like(x))

    def step(
        self, denoise: Denoiser, x: Latents, at: Step, state: State, noise: StepNoise
    ) -> tuple[Latents, State]:
        here = _trace()
        seen: list[Latents] = []

        def watched(x: Latents, sigma: Sigma) -> Latents:
            x0 = denoise(x, sigma)
            if not seen and _trace() == here:  # under a cond it belongs to another program
                seen.append(x0)
            return x0

        after, inner = self.sampler.step(watched, x, at, state.state, noise)
        return after, _Seen(inner, seen[0] if seen else denoise(x, at.sigma))


def _trace() -> Any:
    return get_opaque_trace_state()


def _count(sampler: Sampler, sigmas: np.ndarray, denoise: Denoiser, x: Latents) -> int:
    asked = 0

    def counted(x: Latents, sigma: Sigma) -> Latents:
        nonlocal asked
        asked += 1
        return denoise(x, sigma)

    def still(sigma: Sigma, sigma_next: Sigma, draw: Any = 0) -> Latents:
        return jnp.zeros_like(x)

    moves = np.cumprod(sigmas[1:] != sigmas[:-1])
    steps = int(moves.sum())
    with jax.disable_jit():  # a cond then runs the one branch that it takes
        state = sampler.init(x)
        for i in range(steps):
            at = Step(
                jnp.int32(i),
                jnp.int32(steps - i),
                jnp.float32(sigmas[i]),
                jnp.float32(sigmas[i + 1]),
            )
            x, state = sampler.step(counted, x, at, state, still)
    return asked


def may_draw(sampler: Sampler) -> bool:
    """Whether a sampler draws noise: as its `stochastic` says, else as a step of it does."""
    stochastic = getattr(sampler, "stochastic", None)
    if stochastic is None:
        return bool(_drawn(sampler, (8, 8, 4)))
    return isinstance(stochastic, jax.core.Tracer) or bool(np.any(stochastic))


_nothing: Callable[[Latents, Sigma], Latents] = lambda x, sigma: jnp.zeros_like(x)  # noqa: E731
