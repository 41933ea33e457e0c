"""The text encoders against transformers, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

from sdjax.errors import InputError
from sdjax.models import clip

LIMIT = 2e-5


def peer(kind, changes=None, projection=None):
    """A torch encoder, our module of the same class, and its params."""
    model, config = peers.tiny_clip(kind, changes, projection=projection)
    module = getattr(clip, type(model).__name__).from_config(config)
    return model, module, peers.flax_params(model)


def prompts():
    """Token ids as CLIP's tokenizers pad them: with the end of text, and with `!`."""
    ids = np.random.default_rng(0).integers(1, 49406, (3, 77))
    ids[:, 0] = 49406
    ids[0, 9:] = 49407
    ids[1, 30], ids[1, 31:] = 49407, 0
    ids[2, 76] = 49407
    return ids


def torch_output(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids), output_hidden_states=True)


@pytest.mark.parametrize("eos", [2, 49407])
@pytest.mark.parametrize("kind", peers.CLIPS)
def test_text_states_agree_with_transformers(kind, eos):
    model, module, params = peer(kind, {"eos_token_id": eos})
    ids = prompts()
    theirs = torch_output(model, ids)

    def encode(params, ids):
        last = module.apply({"params": params}, ids)
        return last, module.apply({"params": params}, ids, layer=-2, final_norm=False)

    last, penultimate = peers.quick_jit(encode)(params, jnp.asarray(ids))
    assert peers.relative_error(last.states, theirs.last_hidden_state) <= LIMIT
    assert peers.relative_error(penultimate.states, theirs.hidden_states[-2]) <= LIMIT
    np.testing.assert_array_equal(last.pooled, penultimate.pooled)
    if kind == "openclip-bigg":
        assert peers.relative_error(last.projected, theirs.text_embeds) <= LIMIT
    else:
        assert peers.relative_error(last.pooled, theirs.pooler_output) <= LIMIT
        assert last.projected is None


def test_every_layer_counts_as_transformers_counts_it():
    model, module, params = peer("clip-l")
    ids = prompts()[:1, :12]
    hidden = torch_output(model, ids).hidden_states
    for layer in (*range(5), *range(-5, 0)):
        ours = module.apply({"params": params}, jnp.asarray(ids), layer=layer, final_norm=False)
        assert peers.relative_error(ours.states, hidden[layer]) <= LIMIT


def test_clip_skip_normalises_the_layer_it_stops_at():
    model, module, params = peer("clip-l")
    ids = prompts()
    skipped = module.apply({"params": params}, jnp.asarray(ids), layer=-2)
    theirs = model.final_layer_norm(torch_output(model, ids).hidden_states[-2])
    assert peers.relative_error(skipped.states, theirs.detach()) <= LIMIT


@pytest.mark.parametrize(("kind", "projection"), [("clip-l", False), ("openclip-bigg", True)])
def test_parameters_have_the_names_and_shapes_of_the_checkpoint(kind, projection):
    model, module, params = peer(kind, projection=projection)
    ids = jnp.zeros((1, 77), int)
    made = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), (made, params))
    assert shapes[0] == shapes[1]


def test_a_config_survives_the_round_trip():
    model, module, _ = peer("openclip-bigg")
    config = module.config()
    assert type(module).from_config(config) == module and hash(module) == hash(module)
    assert config["architectures"] == ["CLIPTextModelWithProjection"]
    theirs = type(model.config)(**config).to_dict()
    assert {key: theirs[key] for key in config} == {
        key: model.config.to_dict()[key] for key in config
    }


def test_two_encoders_with_equal_sizes_are_not_the_same_module():
    _, config = peers.tiny_clip("clip-l")
    plain = clip.CLIPTextModel.from_config(config)
    assert plain != clip.CLIPTextModelWithProjection.from_config(config)


def test_encoders_compute_in_the_dtype_of_their_weights():
    _, module, params = peer("openclip-bigg", {"num_hidden_layers": 1})
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    ids = jnp.asarray(prompts())
    encode = peers.quick_jit(lambda p, ids: module.apply({"params": p}, ids))
    full, low = encode(params, ids), encode(half, ids)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in low)
    for mine, its in zip(low, full, strict=True):
        difference = jnp.abs(mine.astype(jnp.float32) - its).mean()
        assert bool(jnp.isfinite(mine).all()) and float(difference / its.std()) < 0.03


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu_new"}, "'hidden_act' must be 'quick_gelu' or 'gelu'"),
        ({"hidden_size": 33}, "'num_attention_heads' must be a number that divides"),
        ({"hidden_size": 10**9}, "'hidden_size'"),
        ({"hidden_size": 65536, "num_hidden_layers": 256}, "at most 5e+10 parameters"),
        ({"vocab_size": 0}, "got 0"),
        ({"vocab_size": 10**7}, "'vocab_size'"),
        ({"num_hidden_layers": -1}, "got -1"),
        ({"num_hidden_layers": 12.0}, "got 12.0"),
        ({"layer_norm_eps": float("nan")}, "got nan"),
        ({"eos_token_id": [2, 49407]}, "'eos_token_id'"),
        ({"projection_dim": "512"}, "'projection_dim'"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_sentence(changes, words):
    with pytest.raises(InputError) as error:
        clip.CLIPTextModel.from_config(peers.CLIP_L | changes)
    text = str(error.value)
    assert text.startswith("CLIPTextModel config: ") and words in text and "\n" not in text


def test_a_layer_or_a_prompt_that_does_not_exist_is_refused():
    _, module, params = peer("clip-l")
    with pytest.raises(InputError, match="layer must be from -5 to 4, got -6"):
        module.apply({"params": params}, jnp.zeros((1, 3), int), layer=-6)
    with pytest.raises(InputError, match="at most 77 tokens"):
        module.apply({"params": params}, jnp.zeros((1, 78), int))
