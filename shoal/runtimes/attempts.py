"""A rank's channels, attempt after attempt: what it does when another rank is lost.

Under `shoal.runtimes.supervisor` the lost rank is replaced, and the others leave their group and meet the new one in
the next attempt, in this very process: nothing is loaded or compiled again. Elsewhere (the user's own torchrun) a lost
rank is an error; torchrun starts all of them again, and they go on from a checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch.distributed as dist

from shoal.errors import PeerLost, PeerTimeout
from shoal.runtimes import crash
from shoal.runtimes.replicated import Replicated

Still = Callable[[], None]
ENDED = "ended"  # the key of the attempt in which the work was done


class Attempts:
    """`enter(still)` is a context of the channel of the attempt that TORCHELASTIC_RESTART_COUNT says; `still` raises
    PeerLost where there is a newer one. No attempt is waited for longer than `timeout` seconds."""

    channel: Replicated

    def __init__(self, enter: Callable[[Still], AbstractContextManager[Replicated]], timeout: float) -> None:
        self.enter, self.timeout = enter, timeout
        self.number = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._context: AbstractContextManager[Replicated] | None = None
        self._store: dist.TCPStore | None = None
        self._left: list[dist.ProcessGroup] = []
        if self.supervised:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            wait = timedelta(seconds=timeout)
            self._store = dist.TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False)

    @property
    def supervised(self) -> bool:
        """Whether somebody replaces what is lost."""
        return "SHOAL_SUPERVISOR" in os.environ

    def _newest(self) -> int:
        assert self._store is not None
        try:
            return int(self._store.get("attempt"))
        except RuntimeError as error:  # torch's own errors of the store
            raise PeerLost(f"the store that the ranks meet through is gone: {str(error).splitlines()[0]}") from error

    def _still(self) -> None:
        if self._store is None:
            return
        if self._newest() > self.number:
            raise PeerLost(f"attempt {self.number} is over: another rank was lost.")
        if self._store.check([ENDED]) and int(self._store.get(ENDED)) < self.number:
            raise SystemExit(0)  # this rank was killed when all had done their work: nobody will come

    def _join(self) -> None:
        crash.here("joining", int(os.environ["RANK"]), 0)
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(self.number)
        context = self.enter(self._still)
        self.channel = context.__enter__()
        self._context = context

    def _leave(self, error: BaseException | None) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def __enter__(self) -> Self:
        try:
            self._join()
        except PeerLost as error:
            self.again(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is not None and error is None:
            with suppress(RuntimeError):
                self._store.set(ENDED, str(self.number))
        try:
            self._leave(error)
        except PeerLost:
            # At the end every rank knows that all have done their work: whoever dies now is not missed.
            if self._store is None:
                raise

    def again(self, error: PeerLost) -> Replicated:
        """The channel of the next attempt, for which the others are waiting. Raises the error where there is none."""
        if self._store is None:
            raise error
        if dist.is_initialized():
            # Its end would wait for exchanges that will never be done. A supervised rank ends without tidying up.
            self._left.append(dist.distributed_c10d._get_default_group())
        self._leave(error)
        end = time.monotonic() + self.timeout
        self._report(error)
        while True:
            newest = self._newest()
            if newest > self.number:
                self.number = newest
                try:
                    self._join()
                    return self.channel
                except PeerLost as other:
                    error, end = other, time.monotonic() + self.timeout
                    self._report(error)
            elif time.monotonic() > end:
                raise error
            else:
                time.sleep(0.001)

    def _report(self, error: PeerLost) -> None:
        """Who does not answer is alive, perhaps, and must be replaced all the same: the supervisor kills it."""
        if isinstance(error, PeerTimeout) and error.ranks:
            os.write(int(os.environ["SHOAL_SUPERVISOR"]), b"".join(b"%d\n" % rank for rank in error.ranks))
