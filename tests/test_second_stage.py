"""The second stage against torch's diffusers: equal weights, batches and noise."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
import trainers

import sdjax
from sdjax.diffusion import noise
from sdjax.diffusion.schedules import PREDICTIONS, Schedule, to_x0
from sdjax.errors import InputError
from sdjax.models.unet import UNet
from sdjax.training import losses
from sdjax.training.encoding import cached, empty, empty_prompt, latents
from sdjax.training.fresh import fresh
from sdjax.training.losses import DiffusionLoss
from sdjax.training.second_stage import SecondStage

LEARNING_RATE = 1e-4


def test_a_loaded_sd1_takes_three_steps_of_adamw_as_torch_does_and_is_saved(tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    pipe, _, _ = trainers.pipeline()
    pipe.save_pretrained(tmp_path / "before")
    model, params = sdjax.load(tmp_path / "before", dtype="float32", progress=False)
    torch_networks = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "vae")}
    trained = ("unet", "text_encoder")
    loss = DiffusionLoss(min_snr_gamma=5.0, caption_dropout=0.5)
    stage = SecondStage(model, trained, loss)
    weights = [p for name in trained for p in torch_networks[name].parameters()]
    theirs = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.01)
    # Flat, as one vector: the same numbers from a program that is compiled sooner.
    optimizer = optax.flatten(optax.adamw(LEARNING_RATE, weight_decay=0.01))
    params, frozen = trainers.split(params, trained)
    first, state = params, optimizer.init(params)

    def step(params, state, frozen, batch, keys):
        got = trainers.gradients(stage, params, frozen, batch, keys)
        updates, state = optimizer.update(got.grads, state, params)
        return optax.apply_updates(params, updates), state, got

    run = None
    for i in range(3):
        batch = {"latents": trainers.latents_batch(i)["latents"]}
        batch |= {"ids": trainers.some_batch(model)["ids"]}
        keys = noise.keys(range(4 * i, 4 * i + 4))
        args = params, state, frozen, batch, keys
        run = run or jax.jit(step).lower(*args).compile(compiler_options=peers.QUICK)
        params, state, got = run(*args)
        theirs.zero_grad()
        expected = trainers.torch_loss(torch_networks, stage, batch, keys)
        expected.backward()
        wanted = trainers.torch_gradients({name: torch_networks[name] for name in trained})
        assert abs(float(got.metrics["loss"]) / float(expected.detach()) - 1) < 1e-5
        assert trainers.distance(got.grads, wanted) < 1e-4
        theirs.step()
    wanted = {name: peers.flax_params(torch_networks[name]) for name in trained}
    assert trainers.distance(params, wanted) < 1e-5
    moved, expected = trainers.minus(params, first), trainers.minus(wanted, first)
    assert trainers.distance(moved, expected) < 5e-3

    sdjax.save(tmp_path / "after", model, frozen | params)
    other = StableDiffusionPipeline.from_pretrained(tmp_path / "after")
    for name in trained:
        assert trainers.distance(peers.flax_params(getattr(other, name)), params[name]) == 0


def test_sdxl_learns_v_with_zero_snr_offset_noise_and_blocks_computed_twice(tmp_path):
    from diffusers import StableDiffusionXLPipeline

    torch_networks, model, params = trainers.networks("sdxl")
    model = trainers.with_schedule(model, prediction="v_prediction", zero_snr=True)
    loss = DiffusionLoss(kind="l1", offset_noise=0.1, perturbation=0.1, caption_dropout=0.4)
    stage = SecondStage(model, loss=loss, remat=True)
    batch, keys = trainers.some_batch(model), noise.keys(range(4))
    assert 0 < np.sum(trainers.draws(loss, (4, 8, 8, 4))(keys).dropped) < 4
    ours = trainers.look(stage, *trainers.split(params, stage.trained), batch, keys)
    expected = trainers.torch_loss(torch_networks, stage, batch, keys, trainers.torch_states_xl)
    expected.backward()
    theirs = trainers.torch_gradients({"unet": torch_networks["unet"]})
    assert abs(float(ours.metrics["loss"]) / float(expected.detach()) - 1) < 1e-5
    assert trainers.distance(ours.grads, theirs) < 1e-4

    unet = jax.tree.map(
        lambda p, g: p - np.float32(0.1) * np.asarray(g), params["unet"], ours.grads["unet"]
    )
    sdjax.save(tmp_path / "after", model, params | {"unet": unet})
    other = StableDiffusionXLPipeline.from_pretrained(tmp_path / "after")
    assert trainers.distance(peers.flax_params(other.unet), unet) == 0
    config = other.scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr


def test_sd2_learns_v_with_its_openclip_encoder_and_is_saved(tmp_path):
    from diffusers import StableDiffusionPipeline

    torch_networks, model, params = trainers.networks("sd2")
    assert model.text_encoder.text.hidden_act == "gelu"
    assert model.unet.use_linear_projection and model.schedule.prediction == "v_prediction"
    stage = SecondStage(model, ("unet", "text_encoder"), DiffusionLoss(caption_dropout=0.5))
    batch = {"latents": trainers.latents_batch()["latents"]}
    batch |= {"ids": trainers.some_batch(model)["ids"]}
    keys = noise.keys(range(4))
    ours = trainers.look(stage, *trainers.split(params, stage.trained), batch, keys)
    expected = trainers.torch_loss(torch_networks, stage, batch, keys)
    expected.backward()
    theirs = trainers.torch_gradients({name: torch_networks[name] for name in stage.trained})
    assert abs(float(ours.metrics["loss"]) / float(expected.detach()) - 1) < 1e-5
    assert trainers.distance(ours.grads, theirs) < 1e-4

    moved = {
        name: jax.tree.map(lambda p, g: p - np.float32(0.1) * np.asarray(g), params[name], grads)
        for name, grads in ours.grads.items()
    }
    sdjax.save(tmp_path / "after", model, params | moved)
    other = StableDiffusionPipeline.from_pretrained(tmp_path / "after")
    for name, tree in moved.items():
        assert trainers.distance(peers.flax_params(getattr(other, name)), tree) == 0
    assert other.scheduler.config.prediction_type == "v_prediction"
    assert other.tokenizer.pad_token == "!"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_says_the_target_makes_the_denoiser_exact(prediction):
    schedule = Schedule(prediction=prediction)
    x0, drawn = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 1)).astype(np.float32)
    t = np.array([0, 400, 999], np.int32)
    sigma = np.asarray(schedule.sigmas[t], np.float32).reshape(-1, 1, 1, 1)
    wanted = losses.target(schedule, x0, drawn, t)
    found = to_x0(schedule, wanted, x0 + sigma * drawn, sigma)
    np.testing.assert_allclose(found, x0, atol=2e-5)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_target_and_weight_are_those_of_diffusers(prediction, zero_snr):
    import torch
    from diffusers.training_utils import compute_snr

    schedule = Schedule(**trainers.BETAS, prediction=prediction, zero_snr=zero_snr)
    ddpm = trainers.scheduler(schedule)
    rng = np.random.default_rng(0)
    x0, drawn = (rng.standard_normal((6, 4, 4, 2), np.float32) for _ in range(2))
    times = np.array([0, 1, 250, 700, 998, 999], np.int32)
    at = torch.tensor(times, dtype=torch.int64)
    ours = losses.add_noise(schedule, x0, drawn, times)
    theirs = ddpm.add_noise(peers.nchw(x0), peers.nchw(drawn), at)
    assert peers.relative_error(ours, peers.nhwc(theirs)) < 2e-6
    ours = losses.target(schedule, x0, drawn, times)
    theirs = {"epsilon": drawn, "sample": x0}.get(prediction)
    if theirs is None:
        theirs = peers.nhwc(ddpm.get_velocity(peers.nchw(x0), peers.nchw(drawn), at))
    assert peers.relative_error(ours, theirs) < 2e-6
    snr = compute_snr(ddpm, at).double().numpy()
    capped = np.minimum(snr, 5)
    with np.errstate(invalid="ignore"):
        weight = capped / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction]
    weight[snr == 0] = 1
    assert (snr[-1] == 0) == zero_snr
    np.testing.assert_allclose(losses.weights(schedule, 5.0)[times], weight, rtol=1e-4)
    assert (losses.weights(schedule, None) == 1).all()


def test_distances_are_those_of_torch():
    import torch
    import torch.nn.functional as F

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((3, 4, 4, 2), np.float32) for _ in range(2))
    ta, tb = torch.tensor(a), torch.tensor(b)
    huber = 0.2 * (torch.sqrt((ta - tb) ** 2 + 0.01) - 0.1)  # diffusers' train_dreambooth
    for kind, theirs in (
        ("l2", F.mse_loss(ta, tb, reduction="none")),
        ("l1", F.l1_loss(ta, tb, reduction="none")),
        ("huber", huber),
    ):
        ours = losses.distances(DiffusionLoss(kind=kind), a, b)
        np.testing.assert_allclose(ours, theirs.mean((1, 2, 3)).numpy(), rtol=1e-5)


def test_what_is_drawn_for_an_image_depends_on_its_key_alone():
    loss = DiffusionLoss(offset_noise=0.5, perturbation=0.5, caption_dropout=0.3, timesteps="cubic")
    keys, run = noise.keys(range(3)), trainers.draws(loss, (2, 4, 4, 3))
    first, second = run(keys[:2]), run(keys[1:])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[1], other[0])
    assert not np.array_equal(first.noise[0], first.noise[1])


def test_draws_have_the_distributions_that_were_asked_for():
    loss, shape = DiffusionLoss(caption_dropout=0.1, offset_noise=0.5), (4000, 2, 2, 2)
    moments = {"uniform": (499.5, 288.7), "cubic": (749.5, 283.5), "logit_normal": (499.5, 208.0)}

    def look(keys):
        kinds = [dataclasses.replace(loss, timesteps=kind) for kind in moments]
        drawn = [losses.draws(keys, shape, kind, 1000) for kind in kinds]
        return drawn[0], [d.timesteps for d in drawn]

    drawn, timesteps = trainers.quick(look, 4000)(noise.keys(range(4000)))
    for times, (mean, deviation) in zip(timesteps, moments.values(), strict=True):
        assert times.dtype == jnp.int32 and 0 <= times.min() and times.max() <= 999
        assert abs(np.mean(times) - mean) < 20
        assert abs(np.std(times) - deviation) < 10
    assert abs(np.mean(drawn.dropped) - 0.1) < 0.02
    noisy = np.asarray(drawn.noise)
    assert abs(noisy.var() - 1.25) < 0.05
    assert abs(noisy.mean((1, 2)).var() - (0.25 + 1 / 4)) < 0.03  # the offset, and what 4 leave
    assert np.array_equal(drawn.seen, drawn.noise)


def test_what_is_cached_is_what_would_be_computed():
    import torch

    torch_networks, model, params = trainers.networks("sdxl")
    batch, keys = trainers.some_batch(model), noise.keys(range(4))

    def look(params, batch, keys):
        made = cached(model, params, batch)
        return made, latents(model, {}, made, keys)

    made, ours = peers.quick_jit(look)(params, batch, keys)
    with torch.no_grad():
        pixels = peers.nchw(batch["pixels"]).float() / 127.5 - 1
        moments = torch_networks["vae"].encode(pixels).latent_dist
        drawn = peers.nchw(trainers.latents_noise(ours.shape)(keys))
        theirs = (moments.mean + moments.std * drawn) * torch_networks["vae"].config.scaling_factor
        context, more = trainers.torch_states_xl(torch_networks, None, batch, np.zeros(4, bool))
    assert peers.relative_error(ours, peers.nhwc(theirs)) < 1e-5
    assert peers.relative_error(made["context"], context.numpy()) < 1e-5
    pooled = more["added_cond_kwargs"]["text_embeds"].numpy()
    assert peers.relative_error(made["pooled"], pooled) < 1e-5
    assert {name: ids.shape for name, ids in empty_prompt(model).items()} == {
        "ids": (1, 77),
        "ids_2": (1, 77),
    }


def test_bfloat16_stays_inside_the_networks():
    _, model, params = trainers.networks()
    stage = SecondStage(model, ("unet", "text_encoder"), dtype="bfloat16", remat=True)
    args = (*trainers.split(params, stage.trained), trainers.some_batch(model))
    run = jax.make_jaxpr(functools.partial(trainers.gradients, stage), return_shape=True)
    inside, got = run(*args, noise.keys(range(4)))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert "bf16[4,8,8,16]" in str(inside) and "bf16[4,77,32]" in str(inside)


def test_blocks_that_are_computed_twice_keep_a_third_for_the_way_back():
    _, model, params = trainers.networks()
    batch, keys = trainers.latents_batch(), noise.keys(range(4))

    def kept(stage):
        def loss(params):
            return stage._loss(params, {}, batch, keys)[0]

        back = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], {"unet": params["unet"]})
        weights = sum(leaf.size for leaf in jax.tree.leaves(params["unet"]))
        return sum(leaf.size for leaf in jax.tree.leaves(back)) - weights

    every, some = kept(SecondStage(model)), kept(SecondStage(model, remat=True))
    assert some < every / 3


def test_first_weights_have_the_variance_of_their_inputs_and_start_from_the_identity():
    _, model, _ = trainers.networks()
    stage = SecondStage(model)
    made = peers.quick_jit(lambda key: (*stage.init(key), fresh(model.text_encoder, key)))
    params, extra, text = made(jax.random.key(0))
    unet = params["unet"]
    assert extra == () and not np.any(unet["conv_out"]["kernel"])
    block = unet["down_blocks_0"]
    assert not np.any(block["resnets_0"]["conv2"]["kernel"])
    assert not np.any(block["attentions_0"]["proj_out"]["kernel"])
    assert abs(np.std(block["resnets_0"]["conv1"]["kernel"]) * 12 - 1) < 0.1
    assert abs(np.std(text["embeddings"]["token_embedding"]["embedding"]) * 32**0.5 - 1) < 0.01
    assert (block["resnets_0"]["norm1"]["scale"] == np.ones(16)).all()
    expected = jax.tree.map(np.shape, trainers.networks()[2]["unet"])
    assert jax.tree.map(np.shape, unet) == expected


def test_conditions_are_dropped_alike_as_ids_and_as_cached_states():
    _, model, params = trainers.networks()
    stage = SecondStage(model, loss=DiffusionLoss(caption_dropout=0.5))
    ids = {"ids": trainers.some_batch(model)["ids"]}
    dropped = np.array([True, False, False, True])

    def look(params, ids):
        states, none = cached(model, params, ids), empty(model, params)
        by_ids = stage._conditions(params, ids, dropped).context
        by_states = stage._conditions(params, states, dropped).context
        return (
            states["context"],
            none,
            by_ids,
            by_states,
            stage._conditions({"empty": none}, states, dropped).context,
        )

    states, none, *dropped_states = peers.quick_jit(look)(params, ids)
    expected = np.where(dropped[:, None, None], none["context"], states)
    for got in dropped_states:
        assert peers.relative_error(got, expected) < 1e-6


def test_what_cannot_be_trained_is_refused():
    _, model, params = trainers.networks()
    inpaint = copy.copy(model.unet.config()) | {"in_channels": 9}
    for settings, words in (
        ({"trained": ("unet", "vae")}, "among unet, text_encoder, got 'vae'"),
        ({"trained": ()}, "trained must name"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        (
            {"model": dataclasses.replace(model, unet=UNet.from_config(inpaint))},
            "reads 9 channels of which 4",
        ),
    ):
        with pytest.raises(InputError, match=words):
            SecondStage(**{"model": model} | settings)
    for settings, words in (
        ({"kind": "l3"}, "kind must be one of l2, l1, huber, got 'l3'"),
        ({"timesteps": "odd"}, "timesteps must be one of"),
        ({"min_snr_gamma": 0.0}, "above 0, got 0.0: try 5"),
        ({"caption_dropout": 1.5}, "share from 0 to 1"),
        ({"offset_noise": -1.0}, "offset_noise must be from 0 to 1"),
        ({"huber_scale": 0.0}, "huber_scale must be above 0"),
    ):
        with pytest.raises(InputError, match=words):
            DiffusionLoss(**settings)
    both = SecondStage(model, ("unet", "text_encoder"))
    for stage, batch, words in (
        (SecondStage(model), {"latents": np.zeros((4, 8, 8, 4), np.float32)}, "lacks 'ids'"),
        (SecondStage(model), {"ids": np.zeros((4, 77), np.int32)}, "lacks 'pixels', it has ids"),
        (both, trainers.latents_batch(), "cached text states"),
    ):
        split = trainers.split(params, stage.trained)
        run = functools.partial(trainers.gradients, stage)
        with pytest.raises(InputError, match=words):
            jax.eval_shape(run, *split, batch, noise.keys(range(4)))
    with pytest.raises(InputError, match="params of 'vae' are missing"):
        latents(model, {}, trainers.some_batch(model), noise.keys(range(4)))
