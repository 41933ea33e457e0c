"""How a UNet is told the time, the size of the picture and other plain numbers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.models.layers import Dense


def sinusoids(
    values: Float[Array, "*batch"] | Int[Array, "*batch"],
    features: int,
    *,
    cos_first: bool,
    shift: float,
) -> Float[Array, "*batch features"]:
    """Waves of geometrically falling frequency, float32.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5; `cos_first` and `shift` are diffusers'
    `flip_sin_to_cos` and `freq_shift`. The frequencies are rounded to float32 where the reference
    rounds them: one unit in the last place is 6e-5 radians at timestep 999.
    """
    half = features // 2
    exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32)
    exponents = exponents / np.float32(half - shift)
    angles = values[..., None].astype(jnp.float32) * np.exp(exponents.astype(np.float64)).astype(
        np.float32
    )
    waves = [jnp.cos(angles), jnp.sin(angles)] if cos_first else [jnp.sin(angles), jnp.cos(angles)]
    padding = [jnp.zeros((*values.shape, 1), jnp.float32)] if features % 2 else []
    return jnp.concatenate(waves + padding, axis=-1)


class TimestepEmbedding(nn.Module):
    """Two linear maps with a SiLU between, float32.

    `condition` (LCM's guidance embedding, config `time_cond_proj_dim`) is mapped and added first.
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b c"], condition: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b features"]:
        """Return [b, features]."""
        if condition is not None:
            x = x + Dense(x.shape[-1], use_bias=False, name="cond_proj")(condition)
        x = jax.nn.silu(Dense(self.features, name="linear_1")(x))
        return Dense(self.features, name="linear_2")(x)
