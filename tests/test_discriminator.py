"""The discriminator against the same layers of torch."""

import first_stage_peers
import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

from sdjax.models.discriminator import Discriminator


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_logits_and_gradients_agree_with_torch(norm):
    model = first_stage_peers.discriminator(n_layers=2, norm=norm).train()
    ours, params = Discriminator(8, 2, norm), peers.flax_params(model)
    x = np.random.default_rng(0).uniform(-1, 1, (3, 20, 24, 3)).astype(np.float32)

    def total(params, x):
        logits = ours.apply({"params": params}, x)
        return jnp.square(logits).sum(), logits

    call = peers.quick_jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, logits), grads = call(params, x)
    there = peers.nchw(x).requires_grad_()
    theirs = model(there)
    theirs.square().sum().backward()
    assert logits.shape == (3, 3, 4, 1)
    assert peers.relative_error(logits, peers.nhwc(theirs)) <= 2e-5
    assert first_stage_peers.distance(grads[0], first_stage_peers.gradients(model)) <= 1e-4
    assert peers.relative_error(grads[1], peers.nhwc(there.grad)) <= 1e-4


def test_parameters_have_the_names_and_shapes_of_the_reference():
    pixels = jnp.zeros((1, 64, 64, 3))
    ours = jax.eval_shape(Discriminator().init, jax.random.key(0), pixels)["params"]
    theirs = peers.flax_params(first_stage_peers.discriminator(64, 3))
    assert jax.tree.map(lambda leaf: leaf.shape, ours) == jax.tree.map(
        lambda leaf: leaf.shape, theirs
    )


def test_parameters_are_drawn_as_the_references():
    init = Discriminator(32, 1).init
    drawn = peers.quick_jit(init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    kernel, scale = drawn["main_2"]["kernel"], drawn["main_3"]["scale"]
    assert abs(float(kernel.std()) / 0.02 - 1) < 0.02 and abs(float(kernel.mean())) < 1e-3
    assert abs(float(scale.std()) / 0.02 - 1) < 0.3 and abs(float(scale.mean()) - 1) < 1e-2
