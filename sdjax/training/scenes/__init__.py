"""An endless, seeded, captioned world, and the measure of how well a picture follows its prompt."""

from sdjax.training.scenes.asked import Asked, AskedGroup, asked
from sdjax.training.scenes.caption import caption, vocabulary
from sdjax.training.scenes.draw import draw
from sdjax.training.scenes.world import Group, Scene, scene

__all__ = [
    "Asked",
    "AskedGroup",
    "Group",
    "Scene",
    "asked",
    "caption",
    "draw",
    "scene",
    "vocabulary",
]
