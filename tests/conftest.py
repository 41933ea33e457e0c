"""Runs before any test: small threads, no network, and every shape annotation checked."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads fight with XLA's
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook  # noqa: E402

# Must stand before the first import of sdjax. The hook lives only under pytest: users pay nothing.
install_import_hook("sdjax", "beartype.beartype")
