"""Ctrl-C and SIGTERM, asked for once: finish the step; asked for again: stop at once."""

import signal
import threading
from typing import Any


class StopSignals:
    """While open, the first signal is only noted (`number`); a second one raises
    `KeyboardInterrupt` where the program stands. Outside the main thread nothing is caught."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
