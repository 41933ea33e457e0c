"""The layers that every network is built from: NHWC, computing in the dtype of their input."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jax import lax
from jaxtyping import Array, Float, Int

from sdjax.models.convolution import conv2d, doubled_conv2d

_kernel_init = nn.initializers.lecun_normal()
Padding = int | tuple[tuple[int, int], tuple[int, int]]


def parameter(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...]
) -> Any:
    """`module.param`, without a trace of `init` where the value is there already.

    Flax traces it for its shape, in every layer of every program: a quarter of what it takes to
    start where compiled programs are kept.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value: Any = module.get_variable("params", name)
    if value.shape != shape:
        path = "/".join(module.path)
        raise ScopeParamShapeError(name, path, value.shape, shape)
    return value


class Dense(nn.Module):
    """x @ kernel + bias on the last axis; kernel is [in, out]."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch features"]:
        """Map the last axis to `features`."""
        kernel = parameter(self, "kernel", _kernel_init, (x.shape[-1], self.features))
        y = jnp.dot(x, kernel.astype(x.dtype))
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(x.dtype)
        return y


class Conv(nn.Module):
    """A square 2-d convolution; kernel is HWIO.

    `padding` is one number for all sides, or ((top, bottom), (left, right)). With `double`, a 3x3
    kernel convolves x after doubling its height and width by repeating pixels.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding = 1
    use_bias: bool = True
    double: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W features"]:
        """Convolve x with the kernel."""
        size = self.kernel_size
        kernel = parameter(self, "kernel", _kernel_init, (size, size, x.shape[-1], self.features))
        kernel = kernel.astype(x.dtype)
        pad = self.padding
        pads = ((pad, pad), (pad, pad)) if isinstance(pad, int) else pad
        if self.double:
            y = doubled_conv2d(x, kernel)
        elif size == 1 and self.stride == 1 and not any(map(any, pads)):
            y = jnp.dot(x, kernel[0, 0])
        else:
            y = conv2d(x, kernel, self.stride, pads)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(x.dtype)
        return y


_ACTIVATIONS = {"silu": jax.nn.silu}


class GroupNorm(nn.Module):
    """Normalise groups of channels over space, then scale, shift and, with `act`, activate.

    Wu and He 2018 (arXiv 1803.08494). Statistics are float32: sums over space for every channel,
    then over each group's channels. Unless the input is `_coarse`, each channel is shifted by the
    mean of a few of its values before it is squared, so that a mean far larger than the deviation
    does not cancel. `act` is None or "silu".
    """

    groups: int
    epsilon: float
    act: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        """Normalise x over space and the channels of each group."""
        b, c = x.shape[0], x.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones, (c,)).astype(jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, (c,)).astype(jnp.float32)
        y = x.astype(jnp.float32).reshape(b, -1, c)
        mean, var = _group_moments(y, self.groups, shifted=not _coarse(x.dtype))
        gain = lax.rsqrt(var + self.epsilon) * scale
        y = (y - mean) * gain + bias
        if self.act is not None:
            y = _ACTIVATIONS[self.act](y)
        return y.astype(x.dtype).reshape(x.shape)


def _group_moments(
    x: Float[Array, "b n c"], groups: int, shifted: bool
) -> tuple[Float[Array, "b 1 c"], Float[Array, "b 1 c"]]:
    """Return each group's mean and variance, repeated for its channels."""
    b, n, c = x.shape
    shift = lax.stop_gradient(x[:, :: max(1, n // 8)].mean(1, keepdims=True)) if shifted else 0.0
    moved = x - shift
    first = moved.mean(1, keepdims=True)
    second = jnp.square(moved).mean(1, keepdims=True) - jnp.square(first)

    def average(a: Float[Array, "b 1 c"]) -> Float[Array, "b 1 c"]:
        means = a.reshape(b, 1, groups, -1).mean(-1, keepdims=True)
        return jnp.broadcast_to(means, (b, 1, groups, c // groups)).reshape(b, 1, c)

    channel_mean = shift + first
    mean = average(channel_mean)
    between = jnp.square(channel_mean - mean)
    return mean, average(jnp.maximum(second, 0.0) + between)


def _coarse(dtype: jnp.dtype) -> bool:
    """Whether E[x^2] - E[x]^2 in float32 loses less than the dtype's own rounding has lost already.

    At a mean of m deviations the input is off by m/2^8 deviations (bfloat16; float16: m/2^11), the
    variance by about m^2/2^24 of itself. A TPU then takes both sums where x is computed, instead of
    reading x again.
    """
    return dtype.itemsize == 2


class LayerNorm(nn.Module):
    """Normalise the last axis, then scale and shift (Ba et al. 2016, arXiv 1607.06450)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        """Normalise x over its last axis; statistics are float32."""
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        if _coarse(x.dtype):
            var = jnp.maximum(jnp.square(y).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
        else:
            var = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * lax.rsqrt(var + self.epsilon)
        y = y * scale.astype(jnp.float32) + bias.astype(jnp.float32)
        return y.astype(x.dtype)


class Embed(nn.Module):
    """A table of `num` vectors of `features` numbers."""

    num: int
    features: int

    @nn.compact
    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """Look the rows up; the result has the table's dtype."""
        init = nn.initializers.normal(1 / math.sqrt(self.features))
        table = parameter(self, "embedding", init, (self.num, self.features))
        return jnp.take(table, ids, axis=0)
