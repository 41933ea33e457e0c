"""The diffusion loss: what is drawn for an image, what the network should say of it, its weight."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError
from sdjax.types import Array, Latents

DISTANCES = ("l2", "l1", "huber")
TIMESTEPS = ("uniform", "cubic", "logit_normal")

_TIMESTEP, _NOISE, _OFFSET, _PERTURBATION, _DROP, LATENT = range(6)
"""An image's key is split into one key a purpose; new purposes come last, and change no other."""

PURPOSES = 6


@dataclass(frozen=True)
class DiffusionLoss:
    """The hyper-parameters of the diffusion loss: hashable, static under jit.

    Ho et al. 2020 (arXiv 2006.11239), equation 14, with these choices:

    - `kind`: "l2", "l1", or "huber": 2c (sqrt(d^2 + c^2) - c), c = `huber_scale`.
    - `min_snr_gamma`: gamma of Hang et al. 2023 (arXiv 2303.09556), 5 there; None weighs all alike.
      Where no signal is left, as at the end under `zero_snr`, the weight is 1.
    - `offset_noise`: deviation of noise that is one number a channel, added to the noise (0.1).
    - `perturbation`: deviation of noise that is added to the network's input only (Ning et al.
      2023, arXiv 2301.11706; 0.1).
    - `caption_dropout`: share of images that lose their condition, for guidance (Ho and Salimans
      2022, arXiv 2207.12598; 0.1).
    - `timesteps`: "uniform", "cubic" (more of the noisy ones: 1 - u^3), or "logit_normal" (more of
      the middle: sigmoid of a unit normal; Esser et al. 2024, arXiv 2403.03206).
    """

    kind: str = "l2"
    huber_scale: float = 0.1
    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    perturbation: float = 0.0
    caption_dropout: float = 0.0
    timesteps: str = "uniform"

    def __post_init__(self) -> None:
        for name, known in (("kind", DISTANCES), ("timesteps", TIMESTEPS)):
            if getattr(self, name) not in known:
                got = getattr(self, name)
                raise InputError(f"{name} must be one of {', '.join(known)}, got {got!r:.60}")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise InputError(
                f"min_snr_gamma must be above 0, got {self.min_snr_gamma}: try 5, or leave it out"
            )
        if not self.huber_scale > 0:
            raise InputError(f"huber_scale must be above 0, got {self.huber_scale}: try 0.1")
        if not 0 <= self.caption_dropout <= 1:
            raise InputError(
                f"caption_dropout must be a share from 0 to 1, got {self.caption_dropout}: try 0.1"
            )
        for name in ("offset_noise", "perturbation"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"{name} must be from 0 to 1, got {getattr(self, name)}: try 0.1, or 0 for none"
                )


class Draws(NamedTuple):
    """What is random about one look at a batch."""

    timesteps: Int[Array, " b"]
    noise: Latents  # what is added to x0 and, for eps and v, asked back
    seen: Latents  # what the network sees of it: with the perturbation
    dropped: Bool[Array, " b"]


def draws(keys: Key[Array, " b"], shape: tuple[int, ...], loss: DiffusionLoss, count: int) -> Draws:
    """Draw timesteps below `count`, unit noise [b, h, w, c] and whose condition is dropped.

    `shape` is the noise's. Each image's share depends on its own key only.
    """

    def one(key: Key[Array, ""]) -> Draws:
        at = jax.random.split(key, PURPOSES)
        noise = jax.random.normal(at[_NOISE], shape[1:])
        if loss.offset_noise:
            channels = jax.random.normal(at[_OFFSET], (1, 1, shape[-1]))
            noise = noise + loss.offset_noise * channels
        seen = noise
        if loss.perturbation:
            seen = noise + loss.perturbation * jax.random.normal(at[_PERTURBATION], shape[1:])
        dropped = jax.random.uniform(at[_DROP]) < loss.caption_dropout
        return Draws(_timestep(at[_TIMESTEP], loss.timesteps, count), noise, seen, dropped)

    return jax.vmap(one)(keys)


def _timestep(key: Key[Array, ""], kind: str, count: int) -> Int[Array, ""]:
    if kind == "logit_normal":
        place = jax.nn.sigmoid(jax.random.normal(key))
    else:
        place = jax.random.uniform(key)
        place = 1 - place**3 if kind == "cubic" else place
    return jnp.minimum((place * count).astype(jnp.int32), count - 1)


def add_noise(
    schedule: Schedule, x0: Latents, noise: Latents, timesteps: Int[Array, " b"]
) -> Latents:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise; under `zero_snr` the last a_t is exactly 0."""
    signal, rest = _roots(schedule, timesteps)
    return signal * x0 + rest * noise


def target(schedule: Schedule, x0: Latents, noise: Latents, timesteps: Int[Array, " b"]) -> Latents:
    """What the network should say: the noise, x0, or v = sqrt(a_t) noise - sqrt(1 - a_t) x0.

    The latter is of Salimans and Ho 2022 (arXiv 2202.00512); edm is its negative.
    """
    if schedule.prediction == "epsilon":
        return noise
    if schedule.prediction == "sample":
        return x0
    signal, rest = _roots(schedule, timesteps)
    v = signal * noise - rest * x0
    return -v if schedule.prediction == "edm" else v


def distances(loss: DiffusionLoss, out: Latents, wanted: Latents) -> Float[Array, " b"]:
    """The mean distance between what the network said and what it should say, for each image."""
    error = out - wanted
    if loss.kind == "l2":
        error = jnp.square(error)
    elif loss.kind == "l1":
        error = jnp.abs(error)
    else:
        c = loss.huber_scale
        error = 2 * c * (jnp.sqrt(jnp.square(error) + c**2) - c)
    return error.mean((1, 2, 3))


def weights(schedule: Schedule, gamma: float | None) -> np.ndarray:
    """The weight [T] of each timestep's loss, float32.

    Hang et al. 2023 (arXiv 2303.09556), section 3.4: min(SNR, gamma) for x0, divided by SNR for
    eps, by SNR + 1 for v. Where no signal is left the weight is 1: eps's limit, and a network that
    predicts v or x0 would otherwise never learn its first step of sampling.
    """
    a = _signal(schedule)
    if gamma is None:
        return np.ones(len(a), np.float32)
    snr = a / (1 - a)
    capped = np.minimum(snr, gamma)
    if schedule.prediction == "epsilon":
        weight = capped / np.where(snr > 0, snr, 1)
    else:
        weight = capped if schedule.prediction == "sample" else capped / (snr + 1)
    return np.where(snr > 0, weight, 1).astype(np.float32)


def quarters(
    values: Float[Array, " b"], timesteps: Int[Array, " b"], count: int
) -> dict[str, Float[Array, ""]]:
    """The mean of what falls in each quarter of the timesteps, times 4: `mse_q1` .. `mse_q4`.

    With uniform timesteps its average over batches is the quarter's own mean, and no quarter that
    is empty in a batch divides by 0.
    """
    quarter = timesteps * 4 // count
    return {f"mse_q{i + 1}": 4 * jnp.where(quarter == i, values, 0).mean() for i in range(4)}


def _signal(schedule: Schedule) -> np.ndarray:
    """alpha-bar [T] as networks are trained on it: 0 at the end under `zero_snr`."""
    a = np.array(schedule.alphas_cumprod)
    if schedule.zero_snr:
        a[-1] = 0.0
    return a


def _roots(
    schedule: Schedule, timesteps: Int[Array, " b"]
) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
    a = _signal(schedule)
    tables = (np.sqrt(a), np.sqrt(1 - a))
    signal, rest = (jnp.asarray(t, jnp.float32)[timesteps][:, None, None, None] for t in tables)
    return signal, rest
