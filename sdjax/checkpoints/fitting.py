"""Whether the parts of a model fit together, before its weights are read or drawn."""

from collections.abc import Mapping
from typing import Any

from sdjax.errors import InputError
from sdjax.text import Tokenizer

MEND = "the parts belong to different models, take those that were saved together"
"""What to do about a checkpoint."""


def check_text(
    modules: Mapping[str, Any], tokenizers: Mapping[str, Tokenizer], where: Any, mend: str = MEND
) -> None:
    """Refuse text encoders that do not fit the UNet or their tokenizers.

    Args:
        modules: networks by their names: "unet", "text_encoder" and its like.
        tokenizers: "tokenizer" for "text_encoder", and so on.
        where: what they are of, for messages.
        mend: what the user can do about it.

    Raises:
        InputError: text states that the UNet does not take, an encoder without a tokenizer, or
            tokens that an encoder has no embedding for, which would be NaN.
    """
    names = [name for name in ("text_encoder", "text_encoder_2") if name in modules]
    wanted = modules["unet"].cross_attention_dim
    width = sum(modules[name].text.hidden_size for name in names)
    if width != wanted:
        raise InputError(
            f"{where}: the UNet's cross_attention_dim is {wanted}, and hidden_size of "
            f"{' and '.join(names)} gives {width}: {mend}"
        )
    for name in names:
        text, tokenizer = modules[name].text, tokenizers.get(tokenizer_of(name))
        if tokenizer is None:
            raise InputError(f"{where} has a {name} and no {tokenizer_of(name)}: add it")
        ids, length = text.vocab_size, text.max_position_embeddings
        for key, has, needed, what in (
            ("vocab_size", ids, tokenizer.size, "has {} ids"),
            ("max_position_embeddings", length, tokenizer.length, "makes {} ids of a prompt"),
        ):
            if needed > has:
                raise InputError(
                    f"{where}: {key} of its {name} is {has}, and its {tokenizer_of(name)} "
                    f"{what.format(needed)}: {mend}"
                )


def check_latents(unet: Any, vae: Any, where: Any, mend: str = MEND) -> None:
    """Refuse a UNet that does not make an autoencoder's latents, by an InputError."""
    if unet.out_channels != vae.latent_channels:
        raise InputError(
            f"{where}: the UNet's out_channels is {unet.out_channels}, and the autoencoder's "
            f"latent_channels {vae.latent_channels}: {mend}"
        )


def tokenizer_of(encoder: str) -> str:
    """The tokenizer's name that belongs to a text encoder's."""
    return encoder.replace("text_encoder", "tokenizer")
