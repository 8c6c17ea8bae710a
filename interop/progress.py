"""A bar on a terminal for work that takes longer than a second."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Generator
from contextvars import ContextVar

__all__ = ["advance", "expect", "working"]

DELAY = 1.0  # seconds before the bar is shown


class _Bar:
    def __init__(self, text: str):
        from rich import console, progress  # slow to import

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TimeElapsedColumn(),
            progress.MofNCompleteColumn(),
        )
        out = console.Console(file=sys.stderr)
        self._progress = progress.Progress(*columns, console=out, transient=True)
        self._task = self._progress.add_task(text, total=None)
        self._steps = self._done = 0

    @contextlib.contextmanager
    def shown(self) -> Generator[None]:
        timer = threading.Timer(DELAY, self._progress.start)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # it may be starting the bar
            self._progress.stop()

    def expect(self, steps: int) -> None:
        self._steps = self._done + steps
        self._progress.update(self._task, total=self._steps)

    def advance(self) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done)


_bar: ContextVar[_Bar | None] = ContextVar("bar", default=None)


@contextlib.contextmanager
def working(text: str) -> Generator[None]:
    """Show ``text`` and a bar while the work inside goes on, if it takes more than a second.

    Only where standard error is a terminal: never in a log or a notebook. Work inside of such
    work has no bar of its own.
    """
    if _bar.get() is not None or sys.stderr is None or not sys.stderr.isatty():  # pyright: ignore[reportUnnecessaryComparison]
        yield
        return
    bar = _Bar(text)
    token = _bar.set(bar)
    try:
        with bar.shown():
            yield
    finally:
        _bar.reset(token)


def expect(steps: int) -> None:
    """Tell the bar, if there is one, how many steps are to come."""
    if (bar := _bar.get()) is not None:
        bar.expect(steps)


def advance() -> None:
    """Tell the bar, if there is one, that a step is done."""
    if (bar := _bar.get()) is not None:
        bar.advance()
