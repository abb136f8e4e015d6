"""How a long job shows itself: a bar on a terminal, plain lines now and then elsewhere."""

import io
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from fastiat.system.ranks import ranks

PLAIN_EVERY = 30.0
"""Seconds between two plain lines."""


class Progress:
    """Progress over `total` images under a title, on stderr, of the first rank of a job.

    Use as a context manager; a bar disappears when done. Where several ranks share the images,
    `share` is how many do: each image that is told of then stands for as many.
    """

    def __init__(self, title: str, total: int, done: int = 0, share: int = 1) -> None:
        self.title, self.share = title, share
        self.total = total
        self.done = done
        self._skipped = done
        self._text = ""
        self._start = self._last = time.monotonic()
        self._bar = None
        self._shown = ranks().first
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                unit=" img",
                leave=False,
                dynamic_ncols=True,
                # Without the counts, so that the figures after them fit into 80 columns.
                bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_noinv_fmt}, "
                "{remaining} left{postfix}",
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, images: int) -> None:
        """Count `images` more as done."""
        images = min(images * self.share, self.total - self.done)
        self.done += images
        if self._bar is not None:
            self._bar.update(images)
            return
        now = time.monotonic()
        if self._shown and now - self._last >= PLAIN_EVERY and self.done < self.total:
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


class Events:
    """TensorBoard events of one session, handed to `append(name, record)` as they come.

    tensorboard's own writer has a thread, and an error in it, such as a full disk, ends in a
    traceback. `step` is where the session starts: what earlier ones showed after it is hidden.
    """

    def __init__(self, append: Callable[[str, bytes], None], step: int) -> None:
        # Imported here, as it takes a second that a wrong flag should not have to wait for.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._append, self._event, self._summary = append, Event, Summary
        self._name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if step:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Show the figures of a row at its "step", as kind/figure."""
        values = [
            self._summary.Value(tag=f"{kind}/{name}", simple_value=value)
            for name, value in row.items()
            if name not in ("step", "epoch")
        ]
        summary = self._summary(value=values)
        self._write(self._event(wall_time=time.time(), step=row["step"], summary=summary))

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._append(self._name, record.getvalue())


def duration(seconds: float) -> str:
    """Write a time span as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
