"""Batches of images from a .beton, which FFCV decodes before the training asks for them."""

import os
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastiat.images.beton import Beton
from fastiat.images.dataset import Split, StoredSplit
from fastiat.images.ffcv import import_ffcv
from fastiat.system.errors import InputError

AHEAD = 2
"""Batches that are decoded ahead; FFCV's ring buffer holds two more."""
PATIENCE = 0.5
"""Seconds between two checks that the decoding thread is alive."""
# numba allows only one pass at a time in its pool of threads, and only one compilation.
_DECODING = threading.Lock()


class FFCVBatches:
    """Batches of a `StoredSplit`: FFCV reads and decodes the images; it does not augment them.

    Each batch is copied before it is handed out, on the CPU too, because FFCV writes a later batch
    into the same memory. On CUDA the copies run on a stream of their own.
    """

    def __init__(self, split: Split, device: torch.device) -> None:
        if not isinstance(split, StoredSplit):
            raise InputError("FFCV reads images out of a .beton: convert them first")
        self.file, self.positions = split.file, split.positions.numpy().astype(np.uint64)
        self.device = device
        self.engine = _engine(split.file, _threads(device))
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def slices(self, spans: list[slice]) -> Iterator[Tensor]:
        """Yield the images, (B, H, W, C), at each span of positions in the split.

        All spans but the last have the same length.
        """
        if spans:
            order = np.concatenate([self.positions[span] for span in spans])
            for images in self._decoded(order, spans[0].stop - spans[0].start):
                yield images if self.copies else images.clone()

    def picked(self, batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each row of `batches`, (batches, B) positions in the split, its images,
        (B, H, W, C), and their positions in that tensor, (B,). On the CPU the images are valid
        until the next ones are asked for.
        """
        count, size = batches.shape
        every = torch.arange(size, device=self.device)
        if count:
            order = self.positions[batches.reshape(-1).numpy()]
            yield from ((images, every) for images in self._decoded(order, size))

    def _decoded(self, order: NDArray[np.uint64], size: int) -> Iterator[Tensor]:
        """Yield (B, H, W, C) for `size` images of `order` at a time.

        On the CPU these are in the ring buffer itself, valid until the next ones are asked for.
        """
        channels = self.file.card.channels
        decoded = self.engine(order, size)
        try:
            for number, (pixels, failed) in enumerate(decoded):
                if failed.any():
                    image = order[number * size + int(failed.argmax())]
                    raise InputError(
                        f"{self.file.path} cannot be used, its image {image} is damaged: "
                        f"write it again with fastiat convert"
                    )
                yield self._placed(torch.from_numpy(pixels))[..., :channels].contiguous()
        finally:
            decoded.close()

    def _placed(self, images: Tensor) -> Tensor:
        if self.copies is None:
            return images
        # `to` waits for this stream only. When it returns, the ring buffer may be overwritten.
        with torch.cuda.stream(self.copies):
            placed = images.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copies)
        placed.record_stream(current)
        return placed


def _threads(device: torch.device) -> int:
    """Return how many threads decode: one on the CPU, where the network needs the others."""
    if device.type == "cpu":
        return 1
    import_ffcv()
    import numba

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, numba.config.NUMBA_NUM_THREADS // processes)  # type: ignore[attr-defined]


def _engine(file: Beton, threads: int) -> Any:
    """Return the decoder of a file, compiled anew only if the file was replaced."""
    status = os.stat(file.path)
    mark = status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
    return _compiled(file.path, mark, threads)


@lru_cache(maxsize=4)
def _compiled(path: Path, _: tuple[int, int, int, int], threads: int) -> Any:
    """Compile FFCV's pipeline for a file, once for all passes, because it takes seconds.

    Returns a function of (order, batch size) that returns a pass: an iterator over (images
    (B, H, W, 3) uint8, failed (B,) bool) in the ring buffer. The caller must close it.
    """
    import_ffcv()
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, memcpy
    from ffcv.loader import Loader as Pipeline
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler

    class Decoder(SimpleRGBImageDecoder):
        """FFCV's decoder, which also reports damaged JPEGs."""

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            state, pixels = super().declare_state_and_memory(previous_state)
            return state, (pixels, AllocationQuery((), np.dtype("?")))

        def generate_code(self) -> Any:
            read, images = self.memory_read, Compiler.get_iterator()
            decode_jpeg, copy = Compiler.compile(imdecode), Compiler.compile(memcpy)

            # numba ignores annotations; mypy wants them.
            def decode(
                batch_indices: Any, destination: Any, metadata: Any, storage_state: Any
            ) -> Any:
                pixels, failed = destination
                for i in images(len(batch_indices)):
                    field = metadata[batch_indices[i]]
                    stored = read(field["data_ptr"], storage_state)
                    height, width = field["height"], field["width"]
                    failed[i] = False
                    if field["mode"] == 0:
                        failed[i] = decode_jpeg(
                            stored, pixels[i], height, width, height, width, 0, 0, 1, 1, False,
                            False,
                        ) != 0  # fmt: skip
                    else:
                        copy(stored, pixels[i])
                return pixels[: len(batch_indices)], failed[: len(batch_indices)]

            decode.is_parallel = True  # type: ignore[attr-defined]
            return decode

    class Pass(EpochIterator):
        """FFCV's pass; closing it ends its thread, and errors of the thread reach the caller."""

        error: BaseException | None = None

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:
                self.error = error

        def run_pipeline(self, *arguments: Any) -> Any:
            with _DECODING:
                return super().run_pipeline(*arguments)

        def __next__(self) -> Any:
            while self.output_queue.empty() and self.is_alive():
                with self.output_queue.not_empty:
                    self.output_queue.not_empty.wait_for(self.output_queue._qsize, PATIENCE)
            if self.output_queue.empty():
                raise self.error or RuntimeError("the thread that decodes has ended")
            (result,) = super().__next__()
            return result

        def close(self) -> None:
            super().close()
            self.closed = True
            while self.is_alive():  # it may be waiting for room in the queue
                while not self.output_queue.empty():
                    self.output_queue.get_nowait()
                self.join(0.01)

    pipeline = Pipeline(
        os.fspath(path),
        batch_size=1,
        num_workers=threads,
        os_cache=True,
        seed=0,
        drop_last=False,
        batches_ahead=AHEAD,
        pipelines={"image": [Decoder()], "label": None},
    )

    def make_pass(order: NDArray[np.uint64], size: int) -> Pass:
        Compiler.set_num_threads(threads)
        pipeline.batch_size = size  # FFCV reads it only when a pass begins
        return Pass(pipeline, order)

    return make_pass
