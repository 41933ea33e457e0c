"""The components of a checkpoint that have weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.checkpoints import naming
from sdjax.checkpoints.tensors import Tensor
from sdjax.errors import InputError
from sdjax.models.clip_config import ProjectedTextModelConfig, TextModelConfig
from sdjax.models.unet_config import UNetConfig
from sdjax.models.vae_config import VAEConfig

CONFIGS: dict[str, Any] = {
    "unet": UNetConfig,
    "vae": VAEConfig,
    "text_encoder": TextModelConfig,
    "text_encoder_2": ProjectedTextModelConfig,
}
"""Every such component and its config, in the order in which they are read."""


@dataclass(frozen=True)
class Network:
    """A component before its weights are read: its config, its tensors, and where they are."""

    config: Any
    tensors: dict[str, Tensor]
    path: Path

    @property
    def nbytes(self) -> int:
        """What the file holds of it."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def network(config: Any, tensors: Mapping[str, Tensor], path: Path) -> Network:
    """A component whose headers have been held against its config, by `naming.check`."""
    return Network(config, naming.check(config, tensors, path), path)


def configured(name: str, config: Mapping[str, Any], said: str | Path) -> Any:
    """A component's config, read from the content of config.json; errors begin with `said`."""
    try:
        return CONFIGS[name].from_config(config)
    except InputError as error:
        raise InputError(f"{said}: {error}") from None
