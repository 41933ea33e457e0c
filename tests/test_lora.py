"""LoRA: trained as peft trains it, in files that diffusers reads and writes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import trainers

from sdjax.checkpoints import compvis, naming
from sdjax.checkpoints.lora import NAME, load_lora, save_lora
from sdjax.diffusion import noise
from sdjax.errors import InputError
from sdjax.models.lora import merge
from sdjax.models.unet import UNet
from sdjax.training import lora as low_rank
from sdjax.training.lora import Lora
from sdjax.training.second_stage import SecondStage

# Matrices, 1x1 and 3x3 convolutions.
TARGETS = ("to_q", "to_out.0", "attn2.to_k", "ff.net.0.proj", "proj_in", "conv1")
EVERY = (*TARGETS, "q_proj", "fc1")


def some_lora(model, lora=None, seed=5):
    """Updates of all networks that a model may have, b not 0."""
    lora = lora or Lora(rank=3, alpha=6.0, targets=EVERY)
    names = [n for n in ("unet", "text_encoder", "text_encoder_2") if getattr(model, n)]
    tree = {n: low_rank.init(lora, getattr(model, n), jax.random.key(seed)) for n in names}
    rng = np.random.default_rng(seed)

    def away(path, leaf):
        moved = rng.standard_normal(leaf.shape, np.float32)
        return 0.3 * moved if path[-1].key == "b" else np.array(leaf)

    return lora, jax.tree_util.tree_map_with_path(away, tree)


def fused(pipe, names):
    """A pipeline's weights with its LoRA fused, under our names."""
    pipe.fuse_lora(components=[n for n in names])
    pipe.unload_lora_weights()
    return {name: peers.flax_params(getattr(pipe, name)) for name in names}


def flat_layers(model, tree):
    """(network, torch name of the layer, pair) of a tree of updates."""
    for network, updates in tree.items():
        for name, leaf in low_rank.layers(getattr(model, network)).items():
            node = functools.reduce(lambda t, part: t.get(part, {}), leaf.path[:-1], updates)
            if node:
                yield network, name, node


def torch_halves(node):
    a = naming.to_torch_axes("kernel", np.asarray(node["a"]))
    b = np.asarray(node["b"]).T
    return a, b.reshape(*b.shape, *(1,) * (a.ndim - 2))


@functools.cache
def training():
    """A stage of updates, what it looks at, and its gradients of the whole batch."""
    _, model, params = trainers.networks()
    lora, tree = some_lora(model, Lora(rank=3, alpha=6.0, targets=TARGETS))
    stage, updates = SecondStage(model, lora=lora), {"unet": tree["unet"]}
    batch, keys = trainers.latents_batch(), noise.keys(range(4))
    frozen = {"unet": params["unet"]}
    return stage, updates, frozen, batch, keys, trainers.look(stage, updates, frozen, batch, keys)


def test_gradients_of_updates_are_those_of_peft():
    import torch
    from peft import LoraConfig

    stage, updates, _, batch, keys, ours = training()
    unet = peers.tiny_unet("sd1", peers.LITTLE)[0]
    unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS)))
    own = {n: p for n, p in unet.named_parameters() if "lora_" in n}
    pairs = {name: node for _, name, node in flat_layers(stage.model, updates)}
    assert len(own) == 2 * len(pairs)
    with torch.no_grad():
        for name, node in pairs.items():
            for half, value in zip("AB", torch_halves(node), strict=True):
                own[f"{name}.lora_{half}.default.weight"].copy_(torch.tensor(value))
    loss = trainers.torch_loss({"unet": unet}, stage, batch, keys)
    loss.backward()
    assert abs(float(ours.metrics["loss"]) / float(loss.detach()) - 1) < 1e-5
    grads = {name: torch_halves(node) for _, name, node in flat_layers(stage.model, ours.grads)}
    theirs = {
        name: tuple(own[f"{name}.lora_{half}.default.weight"].grad.numpy() for half in "AB")
        for name in pairs
    }
    assert trainers.distance(grads, theirs) < 1e-4
    assert jax.tree.structure(ours.grads) == jax.tree.structure(updates)


def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    stage, updates, frozen, batch, keys, whole = training()
    run = jax.jit(functools.partial(trainers.gradients, stage))
    parts = [({n: v[i : i + 2] for n, v in batch.items()}, keys[i : i + 2]) for i in (2, 0)]
    run = run.lower(updates, frozen, *parts[0]).compile(compiler_options=peers.QUICK)
    looks = [run(updates, frozen, *part) for part in parts]
    mean = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, *looks)
    assert trainers.distance(mean.grads, whole.grads) < 1e-6
    for name, value in whole.metrics.items():
        np.testing.assert_allclose(mean.metrics[name], value, rtol=1e-5)
    quarters = sum(whole.metrics[f"mse_q{i}"] for i in (1, 2, 3, 4)) / 4
    np.testing.assert_allclose(quarters, whole.metrics["mse"], rtol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_loads_what_is_saved(tmp_path, family):
    pipe, model, params = trainers.pipeline(family)
    lora, tree = some_lora(model)
    save_lora(tmp_path, model, tree, lora.scale)
    pipe.load_lora_weights(tmp_path)
    expected = merge(params, tree, lora.scale)
    for name, weights in fused(pipe, list(tree)).items():
        assert trainers.distance(weights, expected[name]) < 1e-6
        assert trainers.distance(weights, params[name]) > 1e-3
    read = merge(params, load_lora(tmp_path, model))
    assert trainers.distance(read, expected) < 1e-6


def kohya_file(path, model, tree, alpha, compvis_names):
    """What kohya's scripts write: halves under names with underscores, and each layer's alpha."""
    from safetensors.numpy import save_file

    table = compvis.unet(model.unet.config()) if compvis_names else {}
    names = {"unet": "lora_unet", "text_encoder": "lora_te1" if compvis_names else "lora_te"}
    names["text_encoder_2"] = "lora_te2"
    tensors = {}
    for network, layer, node in flat_layers(model, tree):
        if network == "text_encoder":
            layer = f"text_model.{layer}"
        layer = (compvis.rename(layer, table) if network == "unet" else None) or layer
        name = f"{names[network]}_{layer.replace('.', '_')}"
        down, up = torch_halves(node)
        tensors[f"{name}.lora_down.weight"] = np.ascontiguousarray(down)
        tensors[f"{name}.lora_up.weight"] = np.ascontiguousarray(up)
        tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_file_of_kohya_means_what_it_means_to_diffusers(tmp_path, family):
    pipe, model, params = trainers.pipeline(family)
    # diffusers 0.42.1 drops kohya's updates of attention in transformers 5's text encoders.
    targets = ("to_q", "to_out.0", "proj_in", "ff.net.0.proj", "fc1")
    if family == "sdxl":  # levels, which CompVis numbers in one list
        changes = peers.few_layers()["unet"] | {"attention_head_dim": [2, 4]}
        changes["transformer_layers_per_block"] = 1
        pipe.unet, config = peers.tiny_unet("sdxl", changes)
        model = dataclasses.replace(model, unet=UNet.from_config(config))
        params = params | {"unet": peers.flax_params(pipe.unet)}
    lora, tree = some_lora(model, Lora(rank=2, alpha=1.0, targets=targets))
    kohya_file(tmp_path / "lora.safetensors", model, tree, 1.0, family == "sdxl")
    merged = merge(params, load_lora(tmp_path / "lora.safetensors", model))
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    weights = fused(pipe, list(tree))
    for name in tree:
        assert trainers.distance(merged[name], weights[name]) < 1e-6
        assert trainers.distance(merged[name], params[name]) > 1e-3


def test_a_file_of_diffusers_is_read_with_its_alpha(tmp_path):
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, model, params = trainers.pipeline()
    layers = {}
    for name, targets in (("unet", ["to_q", "conv1"]), ("text_encoder", ["q_proj"])):
        module = getattr(pipe, name)
        config = LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=targets,
            init_lora_weights=False,
            alpha_pattern={"attn2.to_q": 5} if name == "unet" else {},
            rank_pattern={"conv1": 4} if name == "unet" else {},
        )
        module.add_adapter(config)
        layers[name] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
    type(pipe).save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        **_collate_lora_metadata({name: getattr(pipe, name) for name in layers}),
    )
    merged = merge(params, load_lora(tmp_path, model))
    for name, weights in fused(pipe, list(layers)).items():
        assert trainers.distance(merged[name], weights) < 1e-6
        assert trainers.distance(merged[name], params[name]) > 1e-3


def test_old_spellings_are_known(tmp_path):
    from safetensors.numpy import save_file

    _, model, _ = trainers.networks()
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    names = {
        f"unet.{block}.processor.to_out_lora": ("unet", f"{block}.to_out.0"),
        f"unet.{block}.to_k.lora": ("unet", f"{block}.to_k"),
        f"{block}.to_v.lora": ("unet", f"{block}.to_v"),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora": (
            "text_encoder",
            "encoder.layers.0.self_attn.q_proj",
        ),
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer": (
            "text_encoder",
            "encoder.layers.0.self_attn.k_proj",
        ),
    }
    tensors = {}
    for old, (network, _) in names.items():
        width = 16 if network == "unet" else 32
        tensors[f"{old}.down.weight"] = np.ones((2, width), np.float16)
        tensors[f"{old}.up.weight"] = np.ones((width, 2), np.float16)
    save_file(tensors, tmp_path / NAME)
    found = {(network, name) for network, name, _ in flat_layers(model, load_lora(tmp_path, model))}
    assert found == set(names.values())


def test_a_merged_kernel_keeps_its_dtype_and_the_params_stay():
    _, model, params = trainers.networks()
    lora, tree = some_lora(model)
    half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    merged = merge(half, tree, lora.scale)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    kept = jax.tree.map(lambda a, b: a is b, half, merged)
    changed = sum(not same for same in jax.tree.leaves(kept))
    assert changed == sum(1 for _ in flat_layers(model, tree))


def test_new_updates_change_nothing():
    _, model, params = trainers.networks()
    stage = SecondStage(model, ("unet", "text_encoder"), lora=Lora(targets=("to_q", "q_proj")))
    drawn, _ = stage.init(jax.random.key(0))
    networks = stage.networks(drawn, params)
    assert trainers.distance(networks, params) == 0
    a = drawn["unet"]["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_q"]["a"]
    assert a.shape == (16, 8) and 0.8 / 4 < float(jnp.abs(a).max()) <= 1 / 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": ("to_qq",)}, "did you mean .*to_q"),
        ({"targets": ("to_q", "zebra")}, "'zebra': try"),
        ({"targets": ("to_q",)}, "text_encoder is among .* such as q_proj"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"targets": ()}, "no targets"),
    ],
)
def test_what_cannot_be_updated_is_refused(settings, words):
    _, model, _ = trainers.networks()
    with pytest.raises(InputError, match=words):
        SecondStage(model, ("unet", "text_encoder"), lora=Lora(**settings))


def test_a_file_that_is_not_this_models_is_refused(tmp_path):
    from safetensors.numpy import save_file

    _, model, _ = trainers.networks()
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = np.ones((2, 16), np.float32), np.ones((16, 2), np.float32)
    cases = {
        "does not know": {"unet.down_blocks.7.to_q.lora_A.weight": a},
        "is a LoHa": {f"{name}.hada_w1_a": a},
        "which is no LoRA's": {"unet.conv_in.weight": a},
        "has no up half": {f"{name}.lora_A.weight": a},
        "and the model's weight": {f"{name}.lora_A.weight": a[:, :3], f"{name}.lora_B.weight": b},
        "holds NaN": {f"{name}.lora_A.weight": a * np.nan, f"{name}.lora_B.weight": b},
        "has no layers": {},
    }
    for words, tensors in cases.items():
        save_file(tensors, tmp_path / NAME)
        with pytest.raises(InputError, match=words):
            load_lora(tmp_path, model)
    with pytest.raises(InputError, match="no layer 'conv_inn'"):
        save_lora(tmp_path, model, {"unet": {"conv_inn": {"a": a.T, "b": b.T}}})
    with pytest.raises(InputError, match="'text_encoder_2'"):
        save_lora(tmp_path, model, {"text_encoder_2": {}})
