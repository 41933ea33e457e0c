"""Files to params and back: every format in and out, without torch.

`load` and `save` are for people, `inspect` for the curious; the rest is what they are made of.
"""

from sdjax.checkpoints.loading import load, load_vae
from sdjax.checkpoints.report import Report, inspect
from sdjax.checkpoints.saving import save

__all__ = ["Report", "inspect", "load", "load_vae", "save"]
