"""The layers against torch's, and against float64 where float32 could cancel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models.convolution import (
    conv2d,
    direct,
    doubled_conv2d,
    patched,
    upsample_nearest,
    winograd,
)
from sdjax.models.layers import Conv, Dense, Embed, GroupNorm, LayerNorm


def normal(*shape, seed=0, mean=0.0, std=1.0):
    values = mean + std * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def filled(module, x):
    """Initialise a module, with every parameter random."""
    params = module.init(jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [normal(*p.shape, seed=i) for i, p in enumerate(leaves)])


def torch_image(x):
    import torch

    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def close(got, want, limit=1e-6):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= limit * np.abs(want).max()


def group_norm64(x, groups, scale, bias, epsilon):
    x = np.asarray(x, np.float64)
    y = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, var = y.mean((1, 3), keepdims=True), y.var((1, 3), keepdims=True)
    return ((y - mean) / np.sqrt(var + epsilon)).reshape(x.shape) * scale + bias


def test_dense_is_a_linear_map_with_its_kernel_transposed():
    import torch

    x = normal(2, 5, 12)
    params = filled(Dense(7), x)
    kernel, bias = (np.array(params["params"][n]) for n in ("kernel", "bias"))
    want = torch.nn.functional.linear(torch.tensor(np.array(x)), torch.tensor(kernel.T.copy()))
    close(Dense(7).apply(params, x), want.numpy() + bias)


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(3, 1, 1), (3, 2, 1), (3, 2, ((0, 1), (0, 1))), (1, 1, 0), (1, 1, 1), (1, 2, 0), (5, 1, 2)],
)
def test_conv_equals_torch(size, stride, padding):
    import torch

    x = normal(2, 9, 10, 24)
    module = Conv(20, size, stride, padding)
    params = filled(module, x)
    kernel, bias = (np.array(params["params"][n]) for n in ("kernel", "bias"))
    image, pad = torch_image(x), padding
    if not isinstance(padding, int):
        (top, bottom), (left, right) = padding
        image, pad = torch.nn.functional.pad(image, (left, right, top, bottom)), 0
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
    want = torch.nn.functional.conv2d(image, weight, torch.tensor(bias), stride, pad)
    close(module.apply(params, x), want.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("algorithm", [winograd, lambda x, k: patched(x, k, ((1, 1), (1, 1)))])
def test_the_cpu_algorithms_are_as_exact_as_the_direct_sum(algorithm):
    x, kernel = normal(2, 6, 10, 48), normal(3, 3, 48, 40, seed=1)
    with jax.enable_x64(True):
        wide = direct(x.astype("float64"), kernel.astype("float64"), 1, ((1, 1), (1, 1)))
    close(jax.jit(algorithm)(x, kernel), wide, 1.5e-6)


@pytest.mark.parametrize("side", [8, 32])
def test_conv_takes_every_path_with_derivatives_in_both_modes(side):
    x, kernel = normal(1, side, side, 128), normal(3, 3, 128, 128, seed=1)
    pads = ((1, 1), (1, 1))

    def both(f):
        def g(x, k):
            y, tangent = jax.jvp(lambda x: f(x, k, 1, pads), (x,), (x * x,))
            return y, tangent, jax.grad(lambda k: jnp.sum(jnp.sin(0.01 * f(x, k, 1, pads))))(k)

        return jax.jit(g)(x, kernel)

    for got, want in zip(both(conv2d), both(direct), strict=True):
        close(got, want, 5e-6)


@pytest.mark.parametrize("size", [(5, 7), (32, 33)])
def test_a_doubling_convolution_is_the_convolution_of_the_doubled(size):
    x, kernel = normal(2, *size, 12), normal(3, 3, 12, 10, seed=1)
    pads = ((1, 1), (1, 1))

    def both(f):
        def g(x, k):
            y, tangent = jax.jvp(lambda x: f(x, k), (x,), (x * x,))
            return y, tangent, *jax.grad(lambda *a: jnp.sum(jnp.sin(0.1 * f(*a))), (0, 1))(x, k)

        return jax.jit(g)(x, kernel)

    want = both(lambda x, k: direct(upsample_nearest(x), k, 1, pads))
    for got, one in zip(both(doubled_conv2d), want, strict=True):
        close(got, one, 5e-6)


@pytest.mark.parametrize("act", [None, "silu"])
@pytest.mark.parametrize("shape", [(2, 7, 9, 24), (2, 33, 24)])
def test_group_norm_equals_torch(act, shape):
    import torch

    x = normal(*shape, mean=0.5, std=2.0)
    module = GroupNorm(6, 1e-6, act=act)
    params = filled(module, x)
    scale, bias = (np.array(params["params"][n]) for n in ("scale", "bias"))
    channels_first = torch.tensor(np.moveaxis(np.array(x), -1, 1).copy())
    want = torch.nn.functional.group_norm(
        channels_first, 6, torch.tensor(scale), torch.tensor(bias), 1e-6
    )
    want = torch.nn.functional.silu(want) if act else want
    close(module.apply(params, x), np.moveaxis(want.numpy(), 1, -1))


@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_group_norm_does_not_cancel_when_the_mean_is_large(mean):
    x = normal(2, 64, 64, 8, mean=mean)
    y = GroupNorm(2, 1e-5).apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x)
    np.testing.assert_allclose(y, group_norm64(x, 2, 1, 0, 1e-5), atol=2e-7 * abs(mean))
    assert abs(float(y.std()) - 1) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mean", [0.3, 30.0, -100.0])
@pytest.mark.parametrize("kind", ["group", "layer"])
def test_half_precision_norms_are_exact_to_the_rounding_of_their_result(kind, mean, dtype):
    x = normal(2, 48, 64, 32, mean=mean, std=3.0).astype(dtype)
    module = GroupNorm(4, 1e-5) if kind == "group" else LayerNorm(1e-5)
    got = module.apply({"params": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}, x)
    assert got.dtype == x.dtype
    rows = np.asarray(x if kind == "group" else x.reshape(-1, 1, 32), np.float64)
    want = group_norm64(rows, 4 if kind == "group" else 1, 1, 0, 1e-5).reshape(x.shape)
    half_a_unit = 2**-8 if dtype == "bfloat16" else 2**-11
    np.testing.assert_allclose(np.float64(got), want, rtol=1.1 * half_a_unit, atol=1e-4)


def test_group_norm_survives_channels_that_differ_and_constant_input():
    x = normal(1, 16, 16, 4) + jnp.asarray([0.0, 1e3, -50.0, 2.0])
    params = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    close(GroupNorm(1, 1e-5).apply(params, x), group_norm64(x, 1, 1, 0, 1e-5), 1e-6)
    flat = GroupNorm(1, 1e-6).apply(params, jnp.full((1, 8, 8, 4), 3.3))
    assert np.abs(flat).max() < 1e-3


def test_group_norm_gradient_equals_torch():
    import torch

    x = normal(2, 8, 8, 12, mean=3.0)
    module = GroupNorm(4, 1e-5, act="silu")
    params = filled(module, x)
    grads = jax.grad(lambda p, x: jnp.sum(jnp.sin(module.apply(p, x))), (0, 1))(params, x)
    image = torch_image(x).requires_grad_()
    scale, bias = (torch.tensor(np.array(params["params"][n])) for n in ("scale", "bias"))
    scale.requires_grad_()
    y = torch.nn.functional.silu(torch.nn.functional.group_norm(image, 4, scale, bias, 1e-5))
    y.sin().sum().backward()
    close(grads[1], image.grad.numpy().transpose(0, 2, 3, 1), 1e-5)
    close(grads[0]["params"]["scale"], scale.grad.numpy(), 1e-5)


def test_layer_norm_equals_torch():
    import torch

    x = normal(2, 5, 12, mean=10.0)
    params = filled(LayerNorm(1e-5), x)
    scale, bias = (torch.tensor(np.array(params["params"][n])) for n in ("scale", "bias"))
    want = torch.nn.functional.layer_norm(torch.tensor(np.array(x)), (12,), scale, bias, 1e-5)
    close(LayerNorm(1e-5).apply(params, x), want.numpy(), 5e-6)


def test_embed_looks_rows_up():
    ids = jnp.asarray([[0, 2], [1, 1]])
    table = normal(3, 4)
    got = Embed(3, 4).apply({"params": {"embedding": table}}, ids)
    np.testing.assert_array_equal(got, table[ids])


def test_upsampling_repeats_pixels():
    x = normal(2, 3, 5, 4)
    np.testing.assert_array_equal(upsample_nearest(x), x.repeat(2, axis=1).repeat(2, axis=2))


def test_layers_compute_in_the_dtype_of_their_input():
    x = normal(1, 8, 8, 16).astype(jnp.bfloat16)
    for module in (Dense(4), Conv(4), GroupNorm(4, 1e-5, act="silu"), LayerNorm(1e-5)):
        assert module.apply(filled(module, x), x).dtype == jnp.bfloat16
