"""Training the autoencoder, against torch on equal weights and noise."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peers

from sdjax.models.vae import AutoencoderKL
from sdjax.training import first_stage
from sdjax.training.first_stage import FirstStage, FirstStageLoss

SMALL = {
    "block_out_channels": [8, 12],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
}
LOSS, NORM = 1e-5, 1e-4


@functools.cache
def pair():
    """A torch autoencoder, ours, and the weights that both have."""
    model, config = peers.tiny_vae("sd1", SMALL)
    return model, AutoencoderKL.from_config(config), peers.flax_params(model)


def images(count=2, seed=0):
    """A batch and its keys."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return {"pixels": pixels}, jax.random.split(jax.random.key(seed + 5), count)


def step(stage, params, extra=(), frozen=None, at=0, count=2):
    batch, keys = images(count)
    call = peers.quick_jit(lambda *a: stage.gradients(*a))
    return call(params, extra, frozen or {}, batch, keys, jnp.int32(at))


def torch_forward(model, count=2):
    """Pixels, reconstruction and divergence of the same batch with the same noise."""
    batch, keys = images(count)
    x = peers.nchw(batch["pixels"].astype(np.float32) / 127.5 - 1)
    posterior = model.encode(x).latent_dist
    _, c, h, w = posterior.mean.shape
    noise = peers.nchw(first_stage.latent_noise(keys, (h, w, c)))
    made = model.decode(posterior.mean + posterior.std * noise).sample
    return x, made, posterior.kl()


def worst_gradient(grads, model):
    """Error of the gradient of torch's parameters, as a share of its norm."""
    theirs = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    theirs = peers.flax_params(SimpleNamespace(state_dict=lambda: theirs))
    error = jax.tree.map(lambda a, b: np.square(a - b).sum(), grads, theirs)
    norm = jax.tree.map(lambda a: np.square(a).sum(), theirs)
    return np.sqrt(sum(jax.tree.leaves(error)) / sum(jax.tree.leaves(norm)))


def test_kl_loss_and_gradients_agree_with_torch():
    model, vae, params = pair()
    out = step(FirstStage(vae, loss=FirstStageLoss(kl_weight=1e-2)), {"vae": params})
    x, made, kl = torch_forward(model)
    nll = (x - made).abs().sum() / 2
    loss = nll + 1e-2 * kl.mean()
    loss.backward()
    for name, value in {"loss": loss, "nll": nll, "kl": kl.mean()}.items():
        assert abs(float(out.metrics[name]) / value.item() - 1) <= LOSS, name
    assert worst_gradient(out.grads["vae"], model) <= NORM


def test_scale_makes_latents_of_unit_deviation():
    vae, params = pair()[1:]
    stage = FirstStage(vae)
    batches = [images(3, seed)[0] for seed in range(4)]
    scale = first_stage.measure_scale(stage, {"vae": params}, batches)
    pixels = np.concatenate([batch["pixels"] for batch in batches])
    mean, logvar = peers.quick_jit(stage.encode)(params, first_stage.to_float(pixels))
    deviation = np.sqrt(np.var(np.asarray(mean)) + np.exp(logvar).mean())
    assert abs(scale * deviation - 1) < 0.03
