"""The autoencoder against diffusers, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

from sdjax.errors import InputError
from sdjax.models.vae import AutoencoderKL, draw

LIMIT = 2e-5
SMALL = {
    "block_out_channels": [8, 12],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
}
BARE = SMALL | {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "latent_channels": 3,
}


def both_ways(vae, params, pixels):
    """Mean and log-variance of the pixels, and a decoding of other latents."""
    shape = (len(pixels), 3, 5, vae.latent_channels)
    z = 4 * np.random.default_rng(1).standard_normal(shape, np.float32)

    def apply(variables, pixels, z):
        mean, logvar = vae.apply(variables, pixels, method="encode")
        return mean, logvar, vae.apply(variables, z, method="decode")

    return z, peers.quick_jit(apply)({"params": params}, jnp.asarray(pixels), jnp.asarray(z))


@pytest.mark.parametrize(
    ("family", "changes", "factor"),
    [("sd1", {}, 8), ("sdxl", SMALL, 2), ("x4-upscaler", {}, 4), ("sd1", BARE, 2)],
)
def test_autoencoder_agrees_with_diffusers_both_ways(family, changes, factor):
    import torch

    model, config = peers.tiny_vae(family, changes)
    vae, params = AutoencoderKL.from_config(config), peers.flax_params(model)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 52, 36, 3)).astype(np.float32)
    z, (mean, logvar, decoded) = both_ways(vae, params, pixels)
    with torch.no_grad():
        encoded = model.encode(peers.nchw(pixels)).latent_dist
        theirs = model.decode(peers.nchw(z)).sample
    assert vae.factor == factor and decoded.shape == (2, 3 * factor, 5 * factor, 3)
    assert peers.relative_error(mean, peers.nhwc(encoded.mean)) <= LIMIT
    assert peers.relative_error(logvar, peers.nhwc(encoded.logvar)) <= LIMIT
    assert peers.relative_error(decoded, peers.nhwc(theirs)) <= LIMIT


@pytest.mark.parametrize(("family", "changes"), [("sd1", {}), ("x4-upscaler", {}), ("sd1", BARE)])
def test_parameters_have_the_names_and_shapes_of_the_checkpoint(family, changes):
    model, config = peers.tiny_vae(family, changes)
    vae = AutoencoderKL.from_config(config)
    made = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), (made, peers.flax_params(model)))
    assert shapes[0] == shapes[1]
    assert AutoencoderKL.from_config(vae.config()) == vae and hash(vae) == hash(vae)
    theirs = type(model).from_config(vae.config()).config
    assert {key: theirs[key] for key in vae.config() if key != "_class_name"} == {
        key: config[key] for key in vae.config() if key != "_class_name"
    }


def test_log_variance_is_clipped_and_a_draw_is_its_mean_plus_deviation():
    model, config = peers.tiny_vae("sd1", SMALL)
    params = peers.flax_params(model)
    params["quant_conv"]["bias"][4:6] += 100
    params["quant_conv"]["bias"][6:] -= 100
    pixels = np.zeros((1, 8, 8, 3), np.float32)
    _, (mean, logvar, _) = both_ways(AutoencoderKL.from_config(config), params, pixels)
    assert bool((logvar[..., :2] == 20).all()) and bool((logvar[..., 2:] == -30).all())
    drawn = draw(mean, logvar, jnp.full_like(mean, 2.0))
    np.testing.assert_allclose(drawn, mean + 2 * np.exp(np.asarray(logvar) / 2), rtol=1e-6)


def test_bfloat16_stays_close_to_float32():
    model, config = peers.tiny_vae("sd1", SMALL)
    vae, params = AutoencoderKL.from_config(config), peers.flax_params(model)
    z = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    decode = peers.quick_jit(lambda p, z: vae.apply({"params": p}, z, method="decode"))
    full, half = decode(params, z), decode(params, z.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and bool(jnp.isfinite(half).all())
    assert float(jnp.abs(full - half.astype(jnp.float32)).mean() / full.std()) < 0.02


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act_fn": "gelu"}, "'act_fn'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "'down_block_types'"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "as long as"),
        ({"block_out_channels": [8, 8]}, "a list of 4"),
        ({"block_out_channels": "8"}, "a list of 4 integers"),
        ({"block_out_channels": [8, 8, 8, 9]}, "multiples of 'norm_num_groups' (4)"),
        ({"block_out_channels": [65536] * 4, "layers_per_block": 30}, "parameters in all"),
        ({"layers_per_block": 200}, "at most 256 layers"),
        ({"latent_channels": 0}, "got 0"),
        ({"latents_mean": [0.1] * 4}, "'latents_mean' must be null"),
        ({"scaling_factor": float("inf")}, "got inf"),
        ({"scaling_factor": 0}, "got 0"),
        ({"use_quant_conv": None}, "true or false, got None"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_sentence(changes, words):
    with pytest.raises(InputError) as error:
        AutoencoderKL.from_config(peers.SD_VAE | changes)
    text = str(error.value)
    assert text.startswith("AutoencoderKL config: ") and words in text and "\n" not in text
