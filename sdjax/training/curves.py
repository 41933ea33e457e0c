"""A run's loss curves as one small PNG."""

import json
from pathlib import Path

import numpy as np


def draw(metrics: Path, out: Path) -> Path | None:
    """Draw the losses in a file of metrics; None where matplotlib is not installed.

    Thin are the means that were logged, thick what is left after smoothing over a fiftieth of the
    run. Metrics whose names have a slash, such as norms of gradients, are left out.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    left_out = {"step", "seconds", "images_per_second", "learning_rate"}
    found = dict.fromkeys(name for line in lines for name in line)
    names = [name for name in found if "/" not in name and name not in left_out]
    if not names:
        return None
    rows = -(-len(names) // 3)
    columns = min(3, len(names))
    figure = Figure(figsize=(4 * columns, 2.6 * rows), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = (np.array(column) for column in zip(*points, strict=True))
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.plot(steps, values, linewidth=0.6, alpha=0.4)
        axes.plot(steps, smoothed(values, max(1, len(values) // 50)), linewidth=1.4)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        # The first steps of a loss are so high that nothing else would be seen.
        low, high = np.percentile(values, [0, 98])
        if high > low:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    figure.savefig(out)
    return out


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Means over `width` values to either side, over fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    low, high = np.maximum(at - width, 0), np.minimum(at + width + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
