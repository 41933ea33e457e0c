"""Being asked to stop: the signals and notices that a run saves itself at."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopping:
    """While it is entered, the first SIGTERM or SIGINT only asks; a SIGINT after it interrupts.

    The loop looks at `asked` after every step, saves, and ends. Outside the main thread, where
    Python has no signals, nothing ever asks. On a pod that jax has been told of
    (`jax.distributed.initialize`) all processes must stop at one step: there SIGTERM is left to
    jax, which makes it known to all and has them agree on the step.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._before: dict[int, Any] = {}

    def asked(self, step: int) -> str | None:
        """What asked to stop, such as `SIGTERM`; None while nothing has."""
        if _distributed():
            from jax.experimental import multihost_utils

            try:
                reached = multihost_utils.reached_preemption_sync_point(step)
            except RuntimeError:  # jax_enable_preemption_service is off
                return None
            return "preemption" if reached else None
        return self._name

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread() and not _distributed():
            for number in (signal.SIGTERM, signal.SIGINT):
                # A shell's background jobs ignore Ctrl-C, and it stays so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name


def _distributed() -> bool:
    import jax

    return jax.distributed.is_initialized()
