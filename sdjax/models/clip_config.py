"""A text encoder's config.json: what is read, what is refused, what weights it asks for; no jax."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

from sdjax.models.fields import MAX_LAYERS, MAX_PARAMETERS, MAX_VOCABULARY, Fields
from sdjax.models.weights import Shapes, linear, listed, norm, table, tree

PROJECTED = "CLIPTextModelWithProjection"

T = TypeVar("T", bound="TextModelConfig")


@dataclass(frozen=True)
class TextConfig:
    """A text encoder's sizes, named as in transformers' config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    projection_dim: int | None
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | None

    @classmethod
    def read(cls, name: str, config: Mapping[str, Any]) -> "TextConfig":
        """Read config.json's content; InputError names the class `name` and the key."""
        fields = Fields(name, config)
        tokens = {
            key: fields.integer(key, default, low=-1, high=MAX_VOCABULARY)
            for key, default in (("pad_token_id", 1), ("bos_token_id", 49406))
            if config.get(key, default) is not None
        }
        projection = config.get("projection_dim", 512)
        if projection is not None or name == PROJECTED:
            projection = fields.integer("projection_dim", 512)
        read = cls(
            vocab_size=fields.integer("vocab_size", 49408, high=MAX_VOCABULARY),
            hidden_size=fields.integer("hidden_size", 512),
            intermediate_size=fields.integer("intermediate_size", 2048, high=4 * 65_536),
            projection_dim=projection,
            num_hidden_layers=fields.integer("num_hidden_layers", 12, high=MAX_LAYERS),
            num_attention_heads=fields.integer("num_attention_heads", 8),
            max_position_embeddings=fields.integer("max_position_embeddings", 77),
            hidden_act=fields.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
            layer_norm_eps=fields.number("layer_norm_eps", 1e-5, 1e-12, 1.0),
            pad_token_id=tokens.get("pad_token_id"),
            bos_token_id=tokens.get("bos_token_id"),
            eos_token_id=fields.integer("eos_token_id", 49407, low=-1, high=MAX_VOCABULARY),
        )
        if read.hidden_size % read.num_attention_heads:
            wanted = f"a number that divides 'hidden_size' ({read.hidden_size})"
            raise fields.error("num_attention_heads", wanted, read.num_attention_heads)
        layer = read.hidden_size * (4 * read.hidden_size + 2 * read.intermediate_size)
        parameters = read.num_hidden_layers * layer + read.vocab_size * read.hidden_size
        if parameters > MAX_PARAMETERS:
            wanted = f"part of at most {MAX_PARAMETERS:.0e} parameters (these are {parameters:.0e})"
            raise fields.error("hidden_size", wanted, read.hidden_size)
        return read


@dataclass(unsafe_hash=True, repr=False)
class TextModelConfig:
    """A text encoder's one field, its sizes."""

    text: TextConfig

    kind: ClassVar[str] = "CLIPTextModel"

    @classmethod
    def from_config(cls: type[T], config: Mapping[str, Any]) -> T:
        """Build from config.json's content; InputError names the key that cannot be."""
        return cls(TextConfig.read(cls.kind, config))

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        written = {"architectures": [self.kind], "model_type": "clip_text_model"}
        return written | asdict(self.text)

    def shapes(self) -> Shapes:
        """Return the shape of every weight by its torch key."""
        return _shapes(self.text)


@dataclass(unsafe_hash=True, repr=False)
class ProjectedTextModelConfig(TextModelConfig):
    """The same for an encoder with a projection; the networks themselves share nothing."""

    kind: ClassVar[str] = PROJECTED

    def shapes(self) -> Shapes:
        """Return the shape of every weight by its torch key."""
        features = self.text.projection_dim
        assert features is not None  # from_config refuses it
        projection = linear(self.text.hidden_size, features, bias=False)
        return tree({"text_model": _shapes(self.text), "text_projection": projection})


def _shapes(text: TextConfig) -> Shapes:
    width, inner = text.hidden_size, text.intermediate_size
    maps = ("q_proj", "k_proj", "v_proj", "out_proj")
    layer = tree(
        {
            "layer_norm1": norm(width),
            "self_attn": tree({name: linear(width, width) for name in maps}),
            "layer_norm2": norm(width),
            "mlp.fc1": linear(width, inner),
            "mlp.fc2": linear(inner, width),
        }
    )
    return tree(
        {
            "embeddings.token_embedding": table(text.vocab_size, width),
            "embeddings.position_embedding": table(text.max_position_embeddings, width),
            **listed("encoder.layers", [layer] * text.num_hidden_layers),
            "final_layer_norm": norm(width),
        }
    )
