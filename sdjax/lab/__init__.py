"""The laboratory: samplers compared at equal cost, against what is exactly right."""

from sdjax.lab.compare import Cell, Comparison, compare
from sdjax.lab.distances import sliced_wasserstein
from sdjax.lab.problems import PROBLEMS, Analytic, Problem, gaussian, mixture
from sdjax.lab.sampled import Pictures

__all__ = [
    "PROBLEMS",
    "Analytic",
    "Cell",
    "Comparison",
    "Pictures",
    "Problem",
    "compare",
    "gaussian",
    "mixture",
    "sliced_wasserstein",
]
