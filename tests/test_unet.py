"""The UNet against diffusers, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

from sdjax.errors import InputError
from sdjax.models.unet import UNet
from sdjax.models.unet_time import sinusoids

LIMIT = 5e-5
TIMES = (0, 1, 250, 601, 999)
SMALL = {
    "block_out_channels": [16, 24],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}


def inputs(config, size=(8, 8), batch=5, seed=0):
    """Latents, text and the extra conditions that the config asks for."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, *size, config["in_channels"]), np.float32)
    context = rng.standard_normal((batch, 7, config["cross_attention_dim"]), np.float32)
    extra = {}
    if config["addition_embed_type"] is not None:
        width = config["projection_class_embeddings_input_dim"] - 40
        count = width // config["addition_time_embed_dim"]
        extra["added_text"] = rng.standard_normal((batch, 40), np.float32)
        extra["added_time_ids"] = rng.integers(0, 1024, (batch, count)).astype(np.float32)
    if config["num_class_embeds"] is not None:
        extra["class_labels"] = rng.integers(0, config["num_class_embeds"], batch)
    if config["time_cond_proj_dim"] is not None:
        shape = (batch, config["time_cond_proj_dim"])
        extra["timestep_cond"] = rng.standard_normal(shape, np.float32)
    return x, context, extra


def torch_output(model, x, times, context, extra):
    import torch

    extra = {name: torch.tensor(value) for name, value in extra.items()}
    if "added_text" in extra:
        text, ids = extra.pop("added_text"), extra.pop("added_time_ids")
        extra["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    with torch.no_grad():
        times = torch.as_tensor(times)
        y = model(peers.nchw(x), times, torch.tensor(context), **extra).sample
    return peers.nhwc(y)


def run(unet, params, x, times, context, extra):
    def apply(params, x, times, context, extra):
        return unet.apply({"params": params}, x, times, context, **extra)

    arrays = jax.tree.map(jnp.asarray, (x, times, context, extra))
    return peers.quick_jit(apply)(params, *arrays)


def shapes(tree):
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("sd1", 2),
        ("sd1-inpaint", 1),
        ("sd2", 1),
        ("sdxl", 1),
        ("sdxl-refiner", 1),
        ("x4-upscaler", 1),
    ],
)
def test_unet_agrees_with_diffusers_at_five_timesteps(family, layers):
    model, config = peers.tiny_unet(family, {"layers_per_block": layers})
    unet, params = UNet.from_config(config), peers.flax_params(model)
    x, context, extra = inputs(config)
    ours = run(unet, params, x, np.array(TIMES), context, extra)
    theirs = torch_output(model, x, TIMES, context, extra)
    for mine, its in zip(np.asarray(ours), theirs, strict=True):
        assert peers.relative_error(mine, its) <= LIMIT


@pytest.mark.parametrize("family", peers.FAMILIES)
def test_parameters_have_the_names_and_shapes_of_the_checkpoint(family):
    model, config = peers.tiny_unet(family, {"layers_per_block": 1})
    unet = UNet.from_config(config)
    x, context, extra = jax.tree.map(jnp.asarray, inputs(config, batch=1))
    made = jax.eval_shape(lambda: unet.init(jax.random.key(0), x, 1, context, **extra))["params"]
    assert shapes(made) == shapes(peers.flax_params(model))
    assert UNet.from_config(unet.config()) == unet
    assert hash(UNet.from_config(config)) == hash(unet)
    theirs = type(model)(**{k: v for k, v in unet.config().items() if k != "_class_name"}).config
    assert all(theirs[key] == value for key, value in config.items() if not key.startswith("_"))


QUIRKS = {
    "input, padding, epsilon and scale": {
        "center_input_sample": True,
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "mid_block_scale_factor": 1.5,
        "norm_eps": 0.01,
        "layers_per_block": [1, 2],
        "time_embedding_dim": 20,
    },
    "no middle, lists of depths, guidance embedding": {
        "mid_block_type": None,
        "transformer_layers_per_block": [[2], 1],
        "reverse_transformer_layers_per_block": [1, [0, 2]],
        "time_cond_proj_dim": 6,
    },
    "a middle without attention, attention at the bottom, odd waves": {
        "mid_block_type": "UNetMidBlock2D",
        "block_out_channels": [15, 30],
        "norm_num_groups": 5,
        "attention_head_dim": [3, 5],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_quirks_of_the_config_are_kept(quirk):
    model, config = peers.tiny_unet("sd1", SMALL | QUIRKS[quirk])
    unet, params = UNet.from_config(config), peers.flax_params(model)
    x, context, extra = inputs(config, size=(9, 7), batch=2)
    ours = run(unet, params, x, 37, context, extra)
    theirs = torch_output(model, x, 37, context, extra)
    assert peers.relative_error(ours, theirs) <= LIMIT
    assert UNet.from_config(unet.config()) == unet


def test_sizes_that_do_not_halve_evenly_agree_with_diffusers():
    changes = SMALL | {
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
        "mid_block_type": "UNetMidBlock2D",
    }
    model, config = peers.tiny_unet("sd1", changes)
    unet, params = UNet.from_config(config), peers.flax_params(model)
    x, context, extra = inputs(config, size=(7, 13), batch=1)
    ours = run(unet, params, x, 500, context, extra)
    assert peers.relative_error(ours, torch_output(model, x, 500, context, extra)) <= LIMIT


def test_projecting_the_text_ahead_changes_nothing():
    model, config = peers.tiny_unet("sd1", SMALL | {"only_cross_attention": [True, False]})
    unet, params = UNet.from_config(config), peers.flax_params(model)
    x, context, _ = jax.tree.map(jnp.asarray, inputs(config, batch=2))
    variables = {"params": params}

    def both(variables, x, context):
        tree = unet.apply(variables, context, method="project_context")
        ahead = jax.lax.optimization_barrier(tree)
        return unet.apply(variables, x, 3, context), unet.apply(variables, x, 3, ahead), tree

    raw, ahead, tree = peers.quick_jit(both)(variables, x, context)
    assert jnp.abs(raw - ahead).max() <= 1e-6 * jnp.abs(raw).max()
    block = tree["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]
    assert set(block) == {"attn1", "attn2"}
    assert set(tree["mid_block"]["attentions_0"]["transformer_blocks_0"]) == {"attn2"}
    assert block["attn2"]["k"].shape == (2, 7, 8, 2)
    assert type(tree) is dict and tree["down_blocks_1"] == {}
    theirs = torch_output(model, np.asarray(x), 3, np.asarray(context), {})
    assert peers.relative_error(raw, theirs) <= LIMIT


def test_bfloat16_and_a_fractional_time_stay_close_to_float32_in_torch():
    model, config = peers.tiny_unet("sd1", SMALL)
    unet, params = UNet.from_config(config), peers.flax_params(model)
    x, context, extra = inputs(config, batch=2)
    theirs = torch_output(model, x, 411.5, context, extra)
    half = run(unet, params, jnp.asarray(x, jnp.bfloat16), np.float32(411.5), context, extra)
    assert half.dtype == jnp.bfloat16 and bool(jnp.isfinite(half).all())
    assert np.abs(theirs - np.asarray(half, np.float32)).mean() / theirs.std() < 0.02
    full = run(unet, params, x, np.float32(411.5), context, extra)
    assert peers.relative_error(full, theirs) <= LIMIT


@pytest.mark.parametrize(("features", "cos_first", "shift"), [(320, True, 0.0), (33, False, 1.0)])
def test_sinusoids_are_those_of_the_reference(features, cos_first, shift):
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    times = np.arange(0, 1000, 7).astype(np.float32)
    theirs = get_timestep_embedding(
        torch.from_numpy(times), features, flip_sin_to_cos=cos_first, downscale_freq_shift=shift
    )
    ours = sinusoids(jnp.asarray(times), features, cos_first=cos_first, shift=shift)
    error = np.abs(np.asarray(ours) - theirs.numpy())
    assert error.max() <= 6.2e-5  # torch's exp misses the rounding of some frequencies
    assert (error.max(0) <= 2e-7).mean() >= 0.98


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dual_cross_attention": True}, "'dual_cross_attention' must be null"),
        ({"act_fn": "mish"}, "'act_fn' must be 'silu' or 'swish'"),
        ({"encoder_hid_dim_type": "image_proj"}, "'encoder_hid_dim_type'"),
        ({"class_embed_type": "timestep"}, "'class_embed_type'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "got 'scale_shift'"),
        ({"attention_type": "gated"}, "'attention_type'"),
        ({"addition_embed_type": "text"}, "'addition_embed_type'"),
        ({"addition_embed_type": "text_time"}, "'addition_time_embed_dim' must be an integer"),
        ({"num_attention_heads": 8}, "'num_attention_heads'"),
        ({"down_block_types": ["KDownBlock2D"]}, "'down_block_types' must be a list"),
        ({"down_block_types": [["DownBlock2D"]]}, "'down_block_types' must be a list"),
        ({"up_block_types": ["UpBlock2D"]}, "as long as 'down_block_types' (4)"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "'mid_block_type'"),
        ({"block_out_channels": [320, 640]}, "a list of 4"),
        ({"block_out_channels": 320}, "a list of 4 integers, got 320"),
        ({"block_out_channels": [32, 32, 32, 33]}, "multiples of 'norm_num_groups' (8)"),
        ({"block_out_channels": [32, 32, 32, -32]}, "got -32"),
        ({"block_out_channels": [32, 32, 32, 10**15]}, "got 1000000000000000"),
        ({"block_out_channels": [65536] * 4}, "parameters in all"),
        ({"layers_per_block": 256}, "at most 512 layers"),
        ({"layers_per_block": True}, "got True"),
        ({"layers_per_block": 2.0}, "got 2.0"),
        ({"attention_head_dim": 7}, "a number of heads that divides"),
        ({"attention_head_dim": 0}, "got 0"),
        ({"transformer_layers_per_block": [1, [1], 1, 1]}, "'transformer_layers_per_block'"),
        ({"transformer_layers_per_block": [1, [1, 1], 1, 1]}, "'reverse_transformer_layers"),
        ({"norm_num_groups": None}, "'norm_num_groups' must be an integer"),
        ({"norm_eps": float("nan")}, "got nan"),
        ({"norm_eps": "1e-5"}, "got '1e-5'"),
        ({"cross_attention_dim": [32, 32, 32, 64]}, "the same for all blocks"),
        ({"only_cross_attention": "yes"}, "true or false, got 'yes'"),
        ({"sample_size": {"a": 1}}, "'sample_size'"),
        ({"in_channels": [4]}, "'in_channels'"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_sentence(changes, words):
    with pytest.raises(InputError) as error:
        UNet.from_config(peers.SD1 | changes)
    text = str(error.value)
    assert text.startswith("UNet2DConditionModel config: ") and words in text
    assert "\n" not in text and len(text) < 300


@pytest.mark.parametrize("family", ["sdxl", "x4-upscaler"])
def test_missing_conditions_are_named(family):
    model, config = peers.tiny_unet(family)
    x, context, _ = jax.tree.map(jnp.asarray, inputs(config, batch=1))
    unet = UNet.from_config(config)
    with pytest.raises(InputError, match="added_text|class_labels"):
        jax.eval_shape(lambda: unet.init(jax.random.key(0), x, 1, context))
