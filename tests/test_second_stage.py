"""The second stage against torch's diffusers: equal weights, batches and noise."""

import copy

import jax
import optax
import peers
import trainers

from sdjax.diffusion import noise
from sdjax.training.losses import DiffusionLoss
from sdjax.training.second_stage import SecondStage

LEARNING_RATE = 1e-4


def test_sd1_with_its_text_encoder_takes_three_steps_of_adamw_as_torch_does():
    import torch

    torch_networks, model, params = trainers.networks()
    trained = ("unet", "text_encoder")
    loss = DiffusionLoss(min_snr_gamma=5.0, caption_dropout=0.5)
    stage = SecondStage(model, trained, loss)
    torch_networks = {n: copy.deepcopy(m) for n, m in torch_networks.items()}
    weights = [p for name in trained for p in torch_networks[name].parameters()]
    theirs = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.01)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.01)
    params, frozen = trainers.split(params, trained)
    first, state = params, optimizer.init(params)

    def step(params, state, frozen, batch, keys):
        got = trainers.gradients(stage, params, frozen, batch, keys)
        updates, state = optimizer.update(got.grads, state, params)
        return optax.apply_updates(params, updates), state, got

    run = None
    for i in range(3):
        batch, keys = trainers.some_batch(model, seed=i), noise.keys(range(4 * i, 4 * i + 4))
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
    moved = jax.tree.map(lambda a, b: a - b, params, first)
    expected = jax.tree.map(lambda a, b: a - b, wanted, first)
    assert trainers.distance(moved, expected) < 5e-3
