"""Pictures and captions on their way to training: sources, batches, caches."""

from sdjax.training.data.batching import Batches, batches
from sdjax.training.data.cached import Cached, cache, open_cached
from sdjax.training.data.folder import Folder
from sdjax.training.data.opening import open, scenes
from sdjax.training.data.source import ENDLESS, Drawn, Example, Joined, Source
from sdjax.training.data.tars import Tars

__all__ = [
    "ENDLESS",
    "Batches",
    "Cached",
    "Drawn",
    "Example",
    "Folder",
    "Joined",
    "Source",
    "Tars",
    "batches",
    "cache",
    "open",
    "open_cached",
    "scenes",
]
