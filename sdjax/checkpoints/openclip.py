"""The text encoder's names in OpenCLIP and in transformers.

OpenCLIP fuses the three attention projections (`attn.in_proj_weight`, rows q, k, v), and keeps the
text projection as a bare matrix P of `pooled @ P`: [width, projection], where a torch Linear's
weight is [projection, width]. Source: github.com/mlfoundations/open_clip (`TextTransformer`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sdjax.checkpoints.compvis import Table, rename
from sdjax.checkpoints.tensors import Tensor

FUSED = ("q_proj", "k_proj", "v_proj")
BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
PROJECTION = "text_projection"


def table(config: Mapping[str, Any]) -> Table:
    """Module prefixes of transformers (without `text_model.`) to OpenCLIP's, but for q, k, v."""
    names = {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in BLOCK.items():
            names[f"encoder.layers.{layer}.{ours}"] = f"transformer.resblocks.{layer}.{theirs}"
    return names


def is_dropped(key: str, config: Mapping[str, Any]) -> bool:
    """Whether an OpenCLIP key serves only outputs that Stable Diffusion 2 does not use.

    It conditions on the penultimate layer and on no pooled text, so that its configs have one layer
    fewer than its files, and no projection.
    """
    return key == PROJECTION or key.startswith(
        f"transformer.resblocks.{config['num_hidden_layers']}."
    )


def to_transformers(
    key: str, tensor: Tensor, back: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """One of OpenCLIP's tensors as transformers' one or three, without `text_model.`.

    Args:
        key: the key without the single file's prefix.
        tensor: the unread tensor; what is yielded is a view of it.
        back: `inverse(table(config))`.

    Yields:
        Nothing for a key that is not OpenCLIP's.
    """
    block, _, leaf = key.rpartition(".attn.in_proj_")
    # The table says which layers there are; what a key has in a number's place is any text.
    if f"{block}.ln_1" in back and leaf in ("weight", "bias"):
        layer = block.rpartition(".")[2]
        width = tensor.shape[0] // 3 if tensor.shape else 0
        for i, name in enumerate(FUSED):
            part = tensor.rows(i * width, (i + 1) * width)
            yield f"encoder.layers.{layer}.self_attn.{name}.{leaf}", part
        return
    if key == PROJECTION:
        yield f"{PROJECTION}.weight", tensor.transposed()
        return
    renamed = rename(key, back)
    if renamed is not None:
        yield renamed, tensor


def to_openclip(key: str, names: Table) -> tuple[str, int | None] | None:
    """Where a transformers key (without `text_model.`) goes: OpenCLIP's, and its place if fused.

    The place is 0, 1, 2 for q, k, v in `in_proj_*`, else None; the result is None for unknown keys.
    """
    if key == f"{PROJECTION}.weight":
        return PROJECTION, None
    head, _, leaf = key.rpartition(".")
    block, _, name = head.rpartition(".self_attn.")
    if name in FUSED:
        layer = block.rpartition(".")[2]
        return f"transformer.resblocks.{layer}.attn.in_proj_{leaf}", FUSED.index(name)
    other = rename(key, names)
    return None if other is None else (other, None)
