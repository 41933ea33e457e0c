"""One renaming rule between torch's keys and Linen's paths, and its inverse."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import peers
import pytest
import tiny

from sdjax import config
from sdjax.checkpoints import naming, placing, safetensors
from sdjax.checkpoints.safetensors import Entry
from sdjax.errors import InputError
from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.lpips import LPIPS
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL
from sdjax.models.vq import VQModel

NAMES = {
    "down_blocks.0.resnets.1.conv1.weight": (4, "down_blocks_0/resnets_1/conv1/kernel"),
    "mid_block.attentions.0.transformer_blocks.2.ff.net.0.proj.weight": (
        2,
        "mid_block/attentions_0/transformer_blocks_2/ff/net_0/proj/kernel",
    ),
    "up_blocks.1.attentions.0.to_out.0.bias": (1, "up_blocks_1/attentions_0/to_out_0/bias"),
    "time_embedding.linear_1.weight": (2, "time_embedding/linear_1/kernel"),
    "add_embedding.linear_2.bias": (1, "add_embedding/linear_2/bias"),
    "class_embedding.weight": (2, "class_embedding/embedding"),
    "conv_norm_out.weight": (1, "conv_norm_out/scale"),
    "text_model.embeddings.token_embedding.weight": (
        2,
        "text_model/embeddings/token_embedding/embedding",
    ),
    "encoder.layers.11.self_attn.q_proj.weight": (2, "encoder/layers_11/self_attn/q_proj/kernel"),
    "text_projection.weight": (2, "text_projection/kernel"),
}


@pytest.mark.parametrize("key", NAMES)
def test_a_key_is_its_path_with_dots_for_slashes(key):
    ndim, path = NAMES[key]
    assert "/".join(naming.flax_path(key, ndim)) == path
    assert naming.torch_key(tuple(path.split("/"))) == key


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 2, 3, 5), (1, 1, 3, 5)])
def test_axes_come_back(shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    torch = naming.to_torch_axes("kernel", array) if len(shape) > 1 else array
    if len(shape) > 1:
        assert torch.shape == naming.to_torch_shape("kernel", shape)
        assert torch.shape[:2] == (5, 3)
        np.testing.assert_array_equal(naming.to_flax_axes("kernel", torch), array)


UNETS = {
    "sd1": peers.SD1,
    "sdxl": peers.SDXL,
    "refiner": peers.REFINER,
    "x4": peers.UPSCALER,
    "a depth for each layer": tiny.UNET
    | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": [1, 2],
        "transformer_layers_per_block": [[1], [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 3, 1], [1, 2]],
    },
    "lcm": tiny.UNET | {"time_cond_proj_dim": 6, "time_embedding_dim": 24},
    "no middle": tiny.UNET | {"mid_block_type": None, "conv_in_kernel": 1, "conv_out_kernel": 5},
    "plain middle": tiny.UNET | {"mid_block_type": "UNetMidBlock2D"},
}
BARE = {key: False for key in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")}
MODULES = {name: UNet.from_config(config) for name, config in UNETS.items()} | {
    "vae": AutoencoderKL.from_config(tiny.VAE),
    "bare vae": AutoencoderKL.from_config(tiny.VAE | BARE | {"layers_per_block": 2}),
    "vq": VQModel.from_config(tiny.VAE | {"vq_embed_dim": 5}),
    "clip": CLIPTextModel.from_config(peers.CLIP_L),
    "projected": CLIPTextModelWithProjection.from_config(peers.CLIP_L | {"projection_dim": 8}),
    "lpips": LPIPS((4, 6, 8, 10, 12)),
}


@pytest.mark.parametrize("name", MODULES)
def test_weights_written_down_are_those_that_linen_makes(name):
    made = dict(naming.flatten(jax.eval_shape(lambda: tiny.init(MODULES[name]))))
    leaves = naming.leaves(MODULES[name]).values()
    assert [leaf.path for leaf in leaves] == list(made)
    for leaf in leaves:
        assert naming.to_torch_shape(leaf.path[-1], made[leaf.path].shape) == leaf.shape
        assert naming.to_flax_shape(leaf.path[-1], leaf.shape) == made[leaf.path].shape


def vae():
    return AutoencoderKL.from_config(tiny.VAE | {"block_out_channels": [8, 8]})


def write(file, module, params, rename=lambda key: key, change=lambda key, array: array):
    """A module's params in a file, under any spelling."""
    entries = []
    for path, leaf in naming.flatten(params):
        key = naming.torch_key(path)
        array = np.ascontiguousarray(change(key, naming.to_torch_axes(path[-1], leaf)))
        entries.append(Entry(rename(key), array.shape, array.dtype, lambda a=array: a))
    safetensors.write(file, entries)
    return safetensors.open(file)


def test_params_come_back_bit_by_bit(tmp_path):
    params = tiny.random_params(vae())
    tensors = write(tmp_path / "x.safetensors", vae(), params)
    assert set(tensors) == set(vae().shapes())
    assert tiny.equal(placing.to_params(vae(), tensors), params)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wanted", [None, "float16", "bfloat16", "float32"])
def test_a_cast_on_the_way_rounds_once(stored, wanted, tmp_path):
    array = np.linspace(-3, 3, 24).reshape(6, 4).astype(np.dtype(stored))
    entry = Entry("x.weight", array.shape, array.dtype, lambda: array)
    safetensors.write(tmp_path / "x.safetensors", [entry])
    tensor = safetensors.open(tmp_path / "x.safetensors")["x.weight"]
    target = None if wanted is None else np.dtype(wanted)
    placed = placing.place(tensor, "kernel", target)
    name = wanted or ("float32" if stored == "float64" else stored)
    assert placed.dtype == name and isinstance(placed, jax.Array)
    np.testing.assert_array_equal(np.asarray(placed), array.T.astype(np.dtype(name)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_nan_and_infinity_are_seen_in_every_format_and_place(value, dtype):
    array = np.ones(200_000, dtype)
    array[0], array[1] = np.finfo(np.float16).max, -0.0
    assert placing.finite(array)
    for place in (0, 65_535, 65_536, -1):
        spoiled = array.copy()
        spoiled[place] = value
        assert not placing.finite(spoiled)
        assert not placing.finite(spoiled[::-1])


def test_a_denormal_and_the_largest_number_are_finite():
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        info = ml_dtypes.finfo(dtype)
        assert placing.finite(np.array([info.max, info.min, info.smallest_subnormal], dtype))
    assert placing.finite(np.zeros(0, np.float32))


def test_old_attention_names_of_the_autoencoder(tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key):
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        return key

    params = tiny.random_params(vae())
    tensors = write(tmp_path / "x.safetensors", vae(), params, rename)
    assert any(".proj_attn." in key for key in tensors)
    assert tiny.equal(placing.to_params(vae(), tensors), params)


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_both_spellings_of_clip(cls, tmp_path):
    text = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    module = cls.from_config(text | {"projection_dim": 6})
    params = tiny.random_params(module)

    def other(key):
        if key == "text_projection.weight":
            return key
        return key.removeprefix("text_model.") if "text_model." in key else f"text_model.{key}"

    for rename in (str, other):
        tensors = write(tmp_path / "x.safetensors", module, params, rename)
        assert tiny.equal(placing.to_params(module, tensors), params)


def test_keys_of_any_length_are_cut_where_they_are_shown():
    long = "k" * 5000
    assert len(naming.count([long])) < 120 and len(naming.count([long] * 4)) < 340
    with pytest.raises(InputError, match="kkk") as refused:
        safetensors.claim(long, {}, Path("x.safetensors"))
    assert len(str(refused.value)) < 250


def test_a_damaged_weight_is_named(tmp_path):
    def spoil(key, array):
        return np.full_like(array, np.nan) if key == "decoder.conv_out.bias" else array

    path = tmp_path / "x.safetensors"
    tensors = write(path, vae(), tiny.random_params(vae()), change=spoil)
    with pytest.raises(InputError, match="x.safetensors: tensor 'decoder.conv_out.bias' holds NaN"):
        placing.to_params(vae(), tensors)


def test_jax_adopts_the_array_that_was_filled():
    """A second copy would double what loading needs."""
    array = placing.aligned((64, 64), np.dtype(np.float32))
    array[:] = 1
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.parametrize("name", ["sd1", "x4-upscaler"])
def test_every_vae_and_text_encoder_of_a_shipped_config_is_named_as_torch_names_it(name):
    """On the meta device, so without weights; the UNets are compared with their networks."""
    import torch
    from diffusers import AutoencoderKL as TorchVAE
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as TorchCLIP

    configs = config.read(name)
    with torch.device("meta"):
        peer = TorchVAE.from_config(configs["vae"])
        text = TorchCLIP(CLIPTextConfig(**configs["text_encoder"]))
    for module, theirs in (
        (AutoencoderKL.from_config(configs["vae"]), peer),
        (CLIPTextModel.from_config(configs["text_encoder"]), text),
    ):
        shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
        assert module.shapes() == shapes
