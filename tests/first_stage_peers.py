"""Torch peers of the first stage's helpers, built from torch's own layers by their papers."""

from types import SimpleNamespace

import jax
import numpy as np
import peers

SMALL = {
    "block_out_channels": [8, 12],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
WIDTHS = (4, 4, 8, 8, 8)


def discriminator(ndf=8, n_layers=1, norm="batch", seed=3):
    """PatchGAN, always with the batch's statistics."""
    import torch
    from torch import nn

    norms = {
        "batch": lambda c: [nn.BatchNorm2d(c, track_running_stats=False)],
        "group": lambda c: [nn.GroupNorm(8, c)],
        "none": lambda c: [],
    }
    layers = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
    width = ndf
    for i in range(1, n_layers + 1):
        wider, stride = ndf * min(2**i, 8), 2 if i < n_layers else 1
        layers += [nn.Conv2d(width, wider, 4, stride, 1, bias=norm != "batch")]
        layers += [*norms[norm](wider), nn.LeakyReLU(0.2)]
        width = wider
    layers += [nn.Conv2d(width, 1, 4, 1, 1)]
    model = nn.Module()
    model.main = nn.Sequential(*layers)
    model.forward = model.main.forward
    assert isinstance(model, torch.nn.Module)
    return peers.randomize(model, seed)


def lpips(widths=WIDTHS, seed=4):
    """LPIPS v0.1 under the package's names, with VGG16's layers at other widths."""
    import torch
    from torch import nn

    model = nn.Module()
    model.net = nn.Module()
    before, number = 3, 0
    for block, (width, depth) in enumerate(zip(widths, (2, 2, 3, 3, 3), strict=True), 1):
        layers = nn.Sequential()
        if block > 1:
            layers.add_module(str(number), nn.MaxPool2d(2, 2))
            number += 1
        for _ in range(depth):
            layers.add_module(str(number), nn.Conv2d(before, width, 3, 1, 1))
            layers.add_module(str(number + 1), nn.ReLU())
            before, number = width, number + 2
        setattr(model.net, f"slice{block}", layers)
        lin = nn.Module()
        lin.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
        setattr(model, f"lin{block - 1}", lin)
    peers.randomize(model, seed, gain=1.4)
    for name, p in model.named_parameters():
        if name.startswith("lin"):
            p.data.abs_()
        elif name.endswith("bias"):
            p.data.abs_().add_(
                0.3
            )  # few channels are all 0 somewhere, and near 0 a unit vector jumps

    def forward(x, y):
        shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        x, y, total = (x - shift) / scale, (y - shift) / scale, 0
        for i in range(5):
            x, y = (getattr(model.net, f"slice{i + 1}")(a) for a in (x, y))
            u, v = (a / (a.square().sum(1, keepdim=True).sqrt() + 1e-10) for a in (x, y))
            total = total + getattr(model, f"lin{i}").model((u - v).square()).mean((2, 3))
        return total[:, 0]

    model.forward = forward
    return model.requires_grad_(False)


def vq_model(changes=None, seed=1):
    """diffusers' VQModel with random weights, its config, and the weights under our names."""
    from diffusers import VQModel

    config = SMALL | {"latent_channels": 4, "vq_embed_dim": 3, "num_vq_embeddings": 12}
    model = peers.randomize(VQModel(**config | (changes or {})), seed)
    return model, peers._written(model), vq_params(model)


def vq_params(model):
    """As `peers.flax_params`, but for the codebook, which is a table."""
    params = peers.flax_params(model)
    params["quantize"] = {"embedding": {"embedding": params["quantize"]["embedding"]["kernel"].T}}
    return params


def gradients(model, convert=peers.flax_params):
    """A torch model's gradients under our names."""
    found = {
        name: p.new_zeros(p.shape) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return convert(SimpleNamespace(state_dict=lambda: found))


def raveled(tree):
    """All leaves in one row: an optimiser that knows no tensors, in a fraction of the programs."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def unraveled(row, like):
    """A row as the tree that it came from."""
    leaves, structure = jax.tree.flatten(like)
    parts = np.split(row, np.cumsum([np.size(leaf) for leaf in leaves])[:-1])
    pairs = zip(parts, leaves, strict=True)
    return jax.tree.unflatten(structure, [part.reshape(np.shape(leaf)) for part, leaf in pairs])


def distance(ours, theirs):
    """Norm of the difference of two trees, as a share of the norm of the second."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    error = sum(np.square(a - b).sum() for a, b in pairs)
    return np.sqrt(error / sum(np.square(b).sum() for _, b in pairs))
