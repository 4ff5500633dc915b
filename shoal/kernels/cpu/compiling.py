"""A word for whoever waits while kernels are compiled: the first time only, as numba keeps what it compiled."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import event


class _Listener(event.Listener):
    def __init__(self, say: Callable[[], None]) -> None:
        self.say: Callable[[], None] | None = say

    def on_start(self, event: event.Event) -> None:
        ours = event.data["dispatcher"].py_func.__module__.startswith("shoal.")
        if ours and self.say is not None:
            say, self.say = self.say, None
            say()

    def on_end(self, event: event.Event) -> None:
        pass


def when_compiling(say: Callable[[], None]) -> None:
    """Call `say` once, when a kernel of this package is about to be compiled; never, if all are found compiled."""
    event.register("numba:compile", _Listener(say))
