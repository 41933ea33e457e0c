"""`Stage`: what differs between one kind of training and another."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int, Key

from sdjax.model import Params
from sdjax.types import Array

Batch = dict[str, Any]
"""Arrays [b, ...]: `pixels` uint8 [b, h, w, 3], `ids` int32 [b, s], or what was cached of them."""


class Gradients(NamedTuple):
    """What one look at a batch gives."""

    grads: Params
    """The tree of the params."""
    extra: Any
    """The next value of what is learnt without gradients, such as a codebook's averages."""
    metrics: dict[str, Float[Array, ""]]
    """Means over the batch, `loss` among them."""


@runtime_checkable
class Stage(Protocol):
    """One kind of training: a frozen, hashable dataclass, static under jit.

    All that is random comes from `keys`, one an image: an image's share of the loss then depends
    neither on its place in the batch nor on how the batch is split over devices or accumulated.
    """

    def init(self, key: Key[Array, ""]) -> tuple[Params, Any]:
        """Draw the params that are trained, one tree a network, and their `first_extra`."""
        ...

    def first_extra(self, params: Params) -> Any:
        """The `extra` to start from with these params."""
        ...

    def gradients(
        self,
        params: Params,
        extra: Any,
        frozen: Params,
        batch: Batch,
        keys: Key[Array, " b"],
        step: Int[Array, ""],
    ) -> Gradients:
        """Gradients of the mean loss over the batch; `frozen` holds the networks not trained."""
        ...
