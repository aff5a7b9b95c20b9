# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM for a whole command: the first one ends it in order, the second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

CAUGHT = (signal.SIGINT, signal.SIGTERM)
# Seconds after which a stop is raised again if the code where it arose went on regardless.
AGAIN = 0.2


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end; no handler of ordinary errors stops it on its way.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")


class Signals:
    """Context of a command: a signal raises ``Interrupted``, inside ``noting`` it is only noted.

    Python raises such an exception wherever it is, also in places that swallow every exception
    (``__del__``, callbacks of weak references, a library's bare ``except``). A timer therefore
    raises it again until it is on its way to the end of the command. After the first signal the
    system's own action is back, so that the second one ends the process even in the middle of a
    kernel. Outside the main thread the context does nothing.

    Attributes:
        caught: The first signal that came, or 0.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._noting = 0
        self._owner = 0
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook
        self._outer: Signals | None = None

    def __enter__(self) -> Signals:
        global _current
        if threading.current_thread() is threading.main_thread():
            self._owner, self._outer, _current = os.getpid(), _current, self
            self._before = {number: signal.signal(number, self._handle) for number in CAUGHT}
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._again)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            sys.unraisablehook, _current = self._hook, self._outer
            self._before = {}

    def settled(self) -> None:
        """Say that the end of the command was reached: from now on signals are only noted."""
        self._noting += 1
        signal.setitimer(signal.ITIMER_REAL, 0)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Context in which the code asks for ``caught`` itself, where it can stop."""
        self._noting += 1
        try:
            yield
        finally:
            self._noting -= 1

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            self._in_child(signum)
            return
        self.caught = signum
        for number in CAUGHT:
            # Checkpoints are whole at any moment, so the second signal needs no clean-up.
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        if not self._noting:
            raise Interrupted(signum)

    def _in_child(self, signum: int) -> None:
        """In a loader process: Ctrl-C reaches it too, but its parent is who ends it."""
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _again(self, signum: int, frame: FrameType | None) -> None:
        error = sys.exc_info()[1]
        while error is not None and not isinstance(error, Interrupted):
            error = error.__context__
        # Code that cleans up after the exception is left alone.
        if error is None and self.caught and not self._noting:
            raise Interrupted(self.caught)

    def _swallowed(self, unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            self._hook(unraisable)


_current: Signals | None = None


@contextmanager
def noting() -> Iterator[Signals]:
    """Context in which signals are only noted: those of the command, or else of this context."""
    if _current is not None:
        with _current.noting():
            yield _current
    else:
        with Signals() as signals, signals.noting():
            yield signals


def handled() -> None:
    """Say, while ``Interrupted`` is handled, that the code will end the command in its own time."""
    if _current is not None:
        _current.settled()


def check() -> None:
    """Raise ``Interrupted`` if a signal was noted: called where a long piece of work can stop."""
    if _current is not None and _current.caught:
        raise Interrupted(_current.caught)


def run_command(body: Callable[[], int], kept: str) -> int:
    """Run the body of a command with its signals; returns its exit status.

    Args:
        body: Returns the status.
        kept: Said after a signal: what is left of the work.

    Returns:
        The body's status; 128 plus the signal if one came, however the body ended.
    """
    with Signals() as signals:
        status, caught = 0, 0
        try:
            status = body()
            signals.settled()
        except KeyboardInterrupt as stop:
            signals.settled()
            caught = stop.signum if isinstance(stop, Interrupted) else signal.SIGINT
        caught = caught or signals.caught
        if caught:
            print(f"{Interrupted(caught)}; {kept}", file=sys.stderr)
        return 128 + caught if caught else status
