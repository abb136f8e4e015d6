"""Progress of long jobs, as a bar on a terminal or a line every 30 seconds; TensorBoard events."""

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
"""Seconds between two progress lines if stderr is not a terminal."""


class Progress:
    """Progress over `total` images under a title, on stderr of rank 0; a context manager.

    done: number of images that an earlier session has processed; the speed does not include them.
    share: number of ranks that share the images; each image of this rank counts `share` times.
    """

    def __init__(self, title: str, total: int, done: int = 0, share: int = 1) -> None:
        self.title, self.total, self.done, self.share = title, total, done, share
        self._done_before = done
        self._figures = ""
        self._start = self._last = time.monotonic()
        self._bar = None
        self._shown = ranks().first
        # A notebook shows the bar below the cell, though its stderr is no terminal.
        if self._shown and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                unit=" img",
                leave=False,
                dynamic_ncols=True,
                # Without counts of images, so that the figures of `show` fit into 80 columns.
                bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_noinv_fmt}, "
                "{remaining} left{postfix}",
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, images: int) -> None:
        """Add `images`, a number of images that this rank has processed since the last call."""
        images = min(images * self.share, self.total - self.done)
        self.done += images
        if self._bar is not None:
            self._bar.update(images)
            return
        now = time.monotonic()
        if self._shown and now - self._last >= PLAIN_EVERY and self.done < self.total:
            self._last = now
            rate = (self.done - self._done_before) / (now - self._start)
            left = duration((self.total - self.done) / rate)
            print(
                f"{self.title}: {self.done}/{self.total} images, {rate:.0f} img/s, "
                f"{left} left{self._figures}",
                file=sys.stderr,
                flush=True,
            )

    def clear(self) -> None:
        """Erase the bar so that a line can be printed; the next update draws it again."""
        if self._bar is not None:
            self._bar.clear()

    def show(self, **figures: str) -> None:
        """Append these figures to the progress from now on."""
        self._figures = "".join(f", {name} {value}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures.removeprefix(", "), refresh=False)


class Events:
    """TensorBoard events of a session that starts at `step`; `append` gets file name and record.

    TensorBoard's own writer runs in a thread, where a full disk ends in a traceback.
    """

    def __init__(self, append: Callable[[str, bytes], None], step: int) -> None:
        # Imported here because the import takes a second, which would delay the error for a wrong
        # flag.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._append = append
        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        self._name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._write(file_version="brain.Event:2")
        if step:
            # This event makes TensorBoard hide events of this step and later ones written so far.
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Write the values of a row of metrics.jsonl at its "step", each with the tag kind/name."""
        values = [
            self._summary.Value(tag=f"{kind}/{name}", simple_value=value)
            for name, value in row.items()
            if name not in ("step", "epoch")
        ]
        self._write(step=row["step"], summary=self._summary(value=values))

    def _write(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        record = io.BytesIO()
        self._writer(record).write(event.SerializeToString())
        self._append(self._name, record.getvalue())


def duration(seconds: float) -> str:
    """Return a time span as m:ss, h:mm:ss or, from a day on, such as "12 days 3 h"."""
    if seconds >= 24 * 3600:
        days, hours = divmod(round(seconds / 3600), 24)
        return f"{days} day{'s' * (days > 1)} {hours} h"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
