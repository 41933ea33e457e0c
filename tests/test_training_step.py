"""One step: the optimiser against torch's, the average and accumulation against closed forms."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.errors import InputError
from sdjax.training import optimizer, step
from sdjax.training.settings import Optimizer
from sdjax.training.stage import Gradients


@dataclasses.dataclass(frozen=True)
class Line:
    """Least squares of w · x + one number an image, drawn from its key."""

    def init(self, key):
        return {"line": {"w": jax.random.normal(key, (3,))}}, ()

    def first_extra(self, params):
        return {"seen": jnp.int32(0)}

    def gradients(self, params, extra, frozen, batch, keys, step):
        noise = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)

        def loss(params):
            return jnp.mean(jnp.square(batch["x"] @ params["line"]["w"] - batch["y"] - noise))

        value, grads = jax.value_and_grad(loss)(params)
        return Gradients(grads, {"seen": extra["seen"] + len(batch["x"])}, {"loss": value})


BATCH = {
    "x": np.random.default_rng(0).standard_normal((8, 3), np.float32),
    "y": np.arange(8, dtype=np.float32),
}


def trained(steps=5, **more):
    stage, tx = Line(), optax.adamw(1e-2)
    state = step.start(stage, tx, jax.random.key(3), averaged=True)
    states = [state]
    advance = jax.jit(step.stepper(stage, tx, **more))
    for _ in range(steps):
        state, metrics = advance(state, {}, BATCH)
        states.append(state)
    return states, metrics


def settings(**more):
    return Optimizer(**({"learning_rate": 1e-2} | more))


def test_accumulating_is_one_batch_in_parts():
    whole, _ = trained()
    parts, metrics = trained(accumulate=4)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.params["line"]["w"], other.params["line"]["w"], rtol=1e-5)
    assert parts[-1].extra["seen"] == whole[-1].extra["seen"] == 40
    assert metrics["grad_norm/line"] > 0


def test_the_average_is_the_weighted_sum_of_all_params():
    states, _ = trained(decay=0.7, warmup=False)
    want = states[0].params["line"]["w"]
    for state in states[1:]:
        want = 0.7 * want + 0.3 * state.params["line"]["w"]
    np.testing.assert_allclose(states[-1].average["line"]["w"], want, rtol=1e-6)


def test_a_warming_average_forgets_its_start():
    states, _ = trained(decay=0.9999, warmup=True)
    want = states[0].params["line"]["w"]
    for n, state in enumerate(states[1:], 1):
        keep = (1 + n) / (10 + n)
        want = keep * want + (1 - keep) * state.params["line"]["w"]
    np.testing.assert_allclose(states[-1].average["line"]["w"], want, rtol=1e-6)


def test_a_step_draws_what_its_number_says_and_not_what_came_before():
    states, _ = trained()
    advance = jax.jit(step.stepper(Line(), optax.adamw(1e-2)))
    moved, _ = advance(states[3], {}, BATCH)
    np.testing.assert_array_equal(moved.params["line"]["w"], states[4].params["line"]["w"])


def test_the_rate_rises_in_a_line_and_falls_by_half_a_cosine():
    given = settings(learning_rate=2.0, warmup=4, schedule="cosine", final=0.1)
    rate = optimizer.rate(given, 2.0, 24)
    np.testing.assert_allclose([rate(n) for n in range(4)], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    for n in (0, 5, 10, 20):
        fall = 0.5 * (1 + math.cos(math.pi * n / 20))
        np.testing.assert_allclose(rate(4 + n), 2.0 * (0.9 * fall + 0.1), rtol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_with_clipping_is_torchs(clip):
    import torch

    draw = np.random.default_rng(1)
    start = {name: draw.standard_normal((4, 3), np.float32) for name in ("unet", "discriminator")}
    given = settings(clip=clip, weight_decay=0.1, discriminator_learning_rate=3e-3)
    ours = optimizer.build(given, 100)
    params = {name: {"w": jnp.asarray(value)} for name, value in start.items()}
    state = ours.init(params)
    weights = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    rates = {"unet": 1e-2, "discriminator": 3e-3}
    theirs = {
        name: torch.optim.AdamW([w], lr=rates[name], weight_decay=0.1)
        for name, w in weights.items()
    }
    for _ in range(3):
        grads = {name: draw.standard_normal((4, 3), np.float32) for name in start}
        updates, state = ours.update(
            {n: {"w": jnp.asarray(g)} for n, g in grads.items()}, state, params
        )
        params = optax.apply_updates(params, updates)
        for name, weight in weights.items():
            weight.grad = torch.tensor(grads[name])
            if clip:
                torch.nn.utils.clip_grad_norm_([weight], clip)
            theirs[name].step()
    for name, weight in weights.items():
        np.testing.assert_allclose(params[name]["w"], weight.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_muon_is_torchs_and_leaves_what_is_no_hidden_kernel_to_adamw():
    """torch orthogonalises in bfloat16, hence the tolerance of the kernels."""
    import torch

    draw = np.random.default_rng(2)
    shapes = {
        "unet": {"conv_in": (3, 3, 4, 8), "resnet": (3, 3, 8, 6), "to_q": (6, 9), "bias": (9,)},
        "text_encoder": {"embedding": (7, 6)},
        "discriminator": {"conv": (2, 2, 3, 5)},
    }
    kernels = ("resnet", "to_q", "conv")
    params = {
        name: {leaf: draw.standard_normal(shape, np.float32) for leaf, shape in net.items()}
        for name, net in shapes.items()
    }
    params = jax.tree.map(jnp.asarray, params)
    grads = jax.tree.map(lambda w: jnp.asarray(draw.standard_normal(w.shape, np.float32)), params)
    given = settings(name="muon", clip=0.0, weight_decay=0.1, discriminator_learning_rate=3e-3)
    ours = optimizer.build(given, 100)
    updates, _ = jax.jit(ours.update)(grads, ours.init(params), params)
    for network, leaves in updates.items():
        lr = 3e-3 if network == "discriminator" else 1e-2
        for leaf, moved in leaves.items():
            rows = -1, moved.shape[-1]
            start = np.reshape(params[network][leaf], rows)
            weight = torch.tensor(start, requires_grad=True)
            weight.grad = torch.tensor(np.reshape(grads[network][leaf], rows))
            if leaf in kernels:
                torch.optim.Muon(
                    [weight], lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
                ).step()
            else:
                torch.optim.AdamW([weight], lr=lr, weight_decay=0.1).step()
            want = weight.detach().numpy() - start
            error = np.linalg.norm(np.reshape(moved, rows) - want) / np.linalg.norm(want)
            assert error < (0.02 if leaf in kernels else 1e-4), (leaf, error)


def test_a_mesh_that_does_not_divide_the_devices_is_refused():
    from sdjax import parallel

    with pytest.raises(InputError, match="mesh.fsdp must divide the number of devices, 1, got 3"):
        parallel.mesh(3)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused():
    code = (
        "from sdjax import parallel\n"
        "parallel.check_batch(16, parallel.mesh())\n"
        "parallel.check_batch(12, parallel.mesh())\n"
    )
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    sentence = "run.batch_size must be a multiple of the number of devices, 8, got 12: try 16"
    assert sentence in done.stderr
