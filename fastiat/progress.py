"""How a long job shows itself: a bar on a terminal, plain lines now and then elsewhere."""

import sys
import time

from tqdm import tqdm

PLAIN_EVERY = 30.0
"""Seconds between two plain lines."""


class Progress:
    """Progress over `total` images under a title, on stderr.

    Use as a context manager; a bar disappears when done.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = done
        self._skipped = done
        self._text = ""
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=title, unit="img", leave=False, dynamic_ncols=True
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, images: int) -> None:
        """Count `images` more as done."""
        self.done += images
        if self._bar is not None:
            self._bar.update(images)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_EVERY and self.done < self.total:
            self._last = now
            rate = (self.done - self._skipped) / (now - self._start)
            left = (self.total - self.done) / rate
            print(
                f"{self.title}: {self.done}/{self.total} images, {rate:.0f} img/s, "
                f"{duration(left)} left{self._text}",
                file=sys.stderr,
                flush=True,
            )

    def clear(self) -> None:
        """Take the bar off the line, so that something can be printed; it comes back by itself."""
        if self._bar is not None:
            self._bar.clear()

    def show(self, **values: str) -> None:
        """Show these figures beside the progress from now on."""
        self._text = "".join(f", {name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._text.removeprefix(", "), refresh=False)


def duration(seconds: float) -> str:
    """Write a time span as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
