"""Runs before any test: small threads, no network, and every shape annotation checked."""

import gc
import os
from importlib.metadata import version

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads fight with XLA's
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time here.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=2"
if version("jaxlib").startswith("0.10."):  # one that does not know a flag would stop
    os.environ.setdefault("XLA_FLAGS", QUICK)

gc.set_threshold(200_000, 10, 10)  # tracing makes so many objects that collecting is a tenth

from jaxtyping import install_import_hook  # noqa: E402

# Must stand before the first import of sdjax. The hook lives only under pytest: users pay nothing.
install_import_hook("sdjax", "beartype.beartype")

NOTEBOOKS = "test_notebooks.py"
LONG = (
    NOTEBOOKS,
    "test_text_to_image.py",
    "test_training_loop.py",
    "test_training_job.py",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    """A file stays on one worker: its tests share compiled programs. Notebooks share nothing."""
    file = item.path.name
    item.add_marker(pytest.mark.xdist_group(item.name if file == NOTEBOOKS else file))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
