"""Whether the parts of a config of one's own fit together, before weights are drawn for them."""

import json
from typing import Any

from sdjax.errors import InputError
from sdjax.model import Model
from sdjax.text import Tokenizer


def check(model: Model, where: str) -> None:
    """Refuse parts that belong to different models; `where` is the config's name, for messages.

    InputError: text states that the UNet does not take, an encoder without a tokenizer, or tokens
    that an encoder has no embedding for, which would be NaN; the tables and the keys.
    """
    encoders = {n: getattr(model, n) for n in ("text_encoder", "text_encoder_2")}
    encoders = {name: encoder.text for name, encoder in encoders.items() if encoder is not None}
    width = sum(encoder.hidden_size for encoder in encoders.values())
    if width != model.unet.cross_attention_dim:
        raise InputError(
            f"{where}: [unet] cross_attention_dim is {model.unet.cross_attention_dim}, and "
            f"hidden_size of {_tables(encoders)} gives {width}: make them equal"
        )
    for name, encoder in encoders.items():
        table = name.replace("text_encoder", "tokenizer")
        tokenizer: Tokenizer | None = getattr(model, table)
        if tokenizer is None:
            raise InputError(f"{where} has [{name}] and no [{table}]: add one")
        for key, has, needed, what in (
            ("vocab_size", encoder.vocab_size, _count(tokenizer), "knows {} tokens"),
            (
                "max_position_embeddings",
                encoder.max_position_embeddings,
                tokenizer.length,
                "makes {} tokens of a prompt",
            ),
        ):
            if needed > has:
                raise InputError(
                    f"{where}: [{name}] {key} is {has}, and [{table}] {what.format(needed)}: set "
                    f"{key} to {needed}"
                )


def check_latents(model: Model, where: str) -> None:
    """Refuse a UNet that does not make the autoencoder's latents, by an InputError."""
    made, wanted = model.unet.out_channels, model.vae.latent_channels
    if made != wanted:
        raise InputError(
            f"{where}: the UNet's out_channels is {made}, and the autoencoder's latent_channels "
            f"{wanted}: take parts of one model"
        )


def _count(tokenizer: Tokenizer) -> int:
    """How many numbers a tokenizer may give."""
    content: dict[str, Any] = json.loads(tokenizer.definition)
    added = (token["id"] for token in content["added_tokens"])
    return 1 + max(*content["model"]["vocab"].values(), *added)


def _tables(names: Any) -> str:
    return " and ".join(f"[{name}]" for name in names)
