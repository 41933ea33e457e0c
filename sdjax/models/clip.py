"""The text encoders: OpenAI's CLIP-L and OpenCLIP's H and bigG."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from sdjax.errors import InputError
from sdjax.models.attention import attention
from sdjax.models.clip_config import ProjectedTextModelConfig, TextConfig, TextModelConfig
from sdjax.models.layers import Dense, Embed, LayerNorm
from sdjax.types import Array


class TextStates(NamedTuple):
    """What a text encoder says of a batch of token ids."""

    states: Float[Array, "b s d"]  # of the layer that was asked for
    pooled: Float[Array, "b d"]  # last layer, normalised, at the end-of-text token
    projected: Float[Array, "b p"] | None  # pooled, projected; None without a projection


class CLIPTextModel(TextModelConfig, nn.Module):
    """A causal transformer over tokens (Radford et al. 2021, arXiv 2103.00020)."""

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b s"], *, layer: int = -1, final_norm: bool = True
    ) -> TextStates:
        """Encode token ids; the dtype is the embeddings' own.

        `layer` counts as transformers' `hidden_states` do: 0 are the embeddings, -1 the last layer,
        -2 the penultimate. `final_norm` says whether the final norm is applied to it; `pooled` is
        always of the last layer, normalised.
        """
        count = self.text.num_hidden_layers
        if not -count - 1 <= layer <= count:
            raise InputError(f"layer must be from {-count - 1} to {count}, got {layer}")
        ids = jnp.asarray(ids)
        x = Embeddings(self.text, name="embeddings")(ids)
        hidden = Encoder(self.text, name="encoder")(x)
        norm = LayerNorm(self.text.layer_norm_eps, name="final_layer_norm")
        last = norm(hidden[-1])
        states = norm(hidden[layer]) if final_norm else hidden[layer]
        place = _end_of_text(ids, self.text.eos_token_id)[:, None, None]
        pooled = jnp.take_along_axis(last, place, axis=1)[:, 0]
        return TextStates(states, pooled, None)


class CLIPTextModelWithProjection(ProjectedTextModelConfig, nn.Module):
    """The same with its map into CLIP's space shared with images: SDXL's second encoder."""

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b s"], *, layer: int = -1, final_norm: bool = True
    ) -> TextStates:
        """Encode token ids as `CLIPTextModel` does, and project what is pooled."""
        encoder = CLIPTextModel(self.text, name="text_model")
        states, pooled, _ = encoder(ids, layer=layer, final_norm=final_norm)
        features = self.text.projection_dim
        assert features is not None  # from_config refuses it
        projection = Dense(features, use_bias=False, name="text_projection")
        return TextStates(states, pooled, projection(pooled))


class Embeddings(nn.Module):
    """Tokens plus learned positions."""

    text: TextConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Return [b, s, hidden_size]."""
        text, length = self.text, ids.shape[1]
        if length > text.max_position_embeddings:
            raise InputError(
                f"at most {text.max_position_embeddings} tokens fit this text encoder, got {length}"
            )
        tokens = Embed(text.vocab_size, text.hidden_size, name="token_embedding")(ids)
        table = Embed(text.max_position_embeddings, text.hidden_size, name="position_embedding")
        return tokens + table(jnp.arange(length))


class Encoder(nn.Module):
    """The stack of layers."""

    text: TextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> list[Float[Array, "b s d"]]:
        """Return the embeddings and every layer's output; what nobody reads, jit drops."""
        hidden = [x]
        for i in range(self.text.num_hidden_layers):
            hidden.append(Layer(self.text, name=f"layers_{i}")(hidden[-1]))
        return hidden


class Layer(nn.Module):
    """Causal self-attention and an MLP, each normalised before and added after."""

    text: TextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Return [b, s, d]."""
        epsilon = self.text.layer_norm_eps
        y = LayerNorm(epsilon, name="layer_norm1")(x)
        x = x + SelfAttention(self.text.num_attention_heads, name="self_attn")(y)
        y = LayerNorm(epsilon, name="layer_norm2")(x)
        return x + MLP(self.text, name="mlp")(y)


class SelfAttention(nn.Module):
    """Each token attends to itself and those before it."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Return [b, s, d]."""
        b, s, d = x.shape
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (Dense(d, name=n)(x).reshape(b, s, self.heads, -1) for n in names)
        return Dense(d, name="out_proj")(attention(q, k, v, causal=True).reshape(b, s, d))


class MLP(nn.Module):
    """Two linear maps around CLIP-L's quick GELU, x * sigmoid(1.702 x), or OpenCLIP's exact one."""

    text: TextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Return [b, s, d]."""
        y = Dense(self.text.intermediate_size, name="fc1")(x)
        quick = self.text.hidden_act == "quick_gelu"
        y = y * jax.nn.sigmoid(1.702 * y) if quick else jax.nn.gelu(y, approximate=False)
        return Dense(x.shape[-1], name="fc2")(y)


def _end_of_text(ids: Int[Array, "b s"], eos_token_id: int | None) -> Int[Array, "b"]:
    """Find the end-of-text token as transformers does.

    A config that says 2 (all the published ones: a mistake of long ago) means the largest id,
    which is CLIP's end of text as long as no tokens were added; any other means its first place.
    """
    return jnp.argmax(ids if eos_token_id == 2 else ids == eos_token_id, axis=-1)
