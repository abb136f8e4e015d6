"""Batches of images from a .beton, which FFCV decodes ahead of the training."""

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
from fastiat.images.dataset import Split, StoredSplit, without_margin
from fastiat.images.ffcv import import_ffcv
from fastiat.system.errors import InputError

AHEAD = 2
"""Number of batches that are decoded ahead; FFCV's ring buffer holds two more."""
PATIENCE = 0.5
"""Seconds between two checks that the decoding thread is alive."""
# numba's thread pool runs only one parallel function at a time, and numba compiles only one
# function at a time. Several loaders may be open at once, so their decoding threads take turns.
_DECODING = threading.Lock()


class FFCVBatches:
    """Batches of a `StoredSplit`: FFCV reads and decodes the images; it does not augment them.

    FFCV decodes into a ring buffer and writes later batches into the same memory, so `slices`
    copies each batch, on the CPU too; `picked` on the CPU does not. On CUDA the copies to the
    device run on a separate stream. Raises `InputError` for a split that is not in a .beton, and if
    FFCV cannot be used.
    """

    def __init__(self, split: Split, device: torch.device) -> None:
        if not isinstance(split, StoredSplit):
            raise InputError("FFCV reads images out of a .beton: convert them first")
        self.file, self.positions = split.file, split.positions.numpy().astype(np.uint64)
        self.margin = split.margin
        self.device = device
        self.engine = _engine(split.file, _threads(device))
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def slices(self, spans: list[slice]) -> Iterator[Tensor]:
        """Yield the images, (B, H, W, C) uint8, at each span of positions in the split.

        All spans except the last must have the same length.
        """
        if spans:
            order = np.concatenate([self.positions[span] for span in spans])
            for images in self._decoded(order, spans[0].stop - spans[0].start):
                yield images if self.copies else images.clone()

    def picked(self, batches: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (B, H, W, C) uint8, indices (B,) into them) for each row of `batches`.

        `batches` is (batches, B) int64, positions in the split. On the CPU, images are valid only
        until the next batch is requested.
        """
        count, size = batches.shape
        every = torch.arange(size, device=self.device)
        if count:
            order = self.positions[batches.reshape(-1).numpy()]
            yield from ((images, every) for images in self._decoded(order, size))

    def _decoded(self, order: NDArray[np.uint64], size: int) -> Iterator[Tensor]:
        """Yield the images at `order`, positions in the file, as (B, H, W, C), `size` at a time.

        On the CPU the tensors may share memory with the ring buffer, so they are valid only until
        the next batch is requested. Raises `InputError` for a damaged JPEG.
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
                images = without_margin(self._placed(torch.from_numpy(pixels)), self.margin)
                yield images[..., :channels].contiguous()
        finally:
            decoded.close()

    def _placed(self, images: Tensor) -> Tensor:
        """Return a batch of the ring buffer on the device; on the CPU, the batch itself."""
        if self.copies is None:
            return images
        # `to` from pageable memory waits for the copy, but not for the kernels of the training,
        # which run on another stream. After `to` returns, FFCV may overwrite the ring buffer.
        with torch.cuda.stream(self.copies):
            placed = images.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copies)
        # The memory belongs to the stream of the copies; the allocator must not reuse it for the
        # next copy before the training has read this batch.
        placed.record_stream(current)
        return placed


def _threads(device: torch.device) -> int:
    """Return the number of decoding threads: one on the CPU, where the network needs the others."""
    if device.type == "cpu":
        return 1
    import_ffcv()
    import numba

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, numba.config.NUMBA_NUM_THREADS // processes)  # type: ignore[attr-defined]


def _engine(file: Beton, threads: int) -> Any:
    """Return the decoder of a file; it is compiled again only if the file was replaced."""
    status = os.stat(file.path)
    mark = status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
    return _compiled(file.path, mark, threads)


@lru_cache(maxsize=4)
def _compiled(path: Path, _: tuple[int, int, int, int], threads: int) -> Any:
    """Compile FFCV's pipeline for a file, once for all passes, because it takes seconds.

    Returns a function of (order, batch size) that starts a pass: an iterator over (images
    (B, H, W, 3) uint8, failed (B,) bool) in the ring buffer, which the caller must close. The
    argument `_` identifies the version of the file.
    """
    import_ffcv()
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, memcpy
    from ffcv.loader import Loader as Pipeline
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler

    class Decoder(SimpleRGBImageDecoder):
        """FFCV's decoder of whole images, which also reports damaged JPEGs."""

        def declare_state_and_memory(self, previous_state: Any) -> Any:
            state, pixels = super().declare_state_and_memory(previous_state)
            return state, (pixels, AllocationQuery((), np.dtype("?")))

        def generate_code(self) -> Any:
            read, images = self.memory_read, Compiler.get_iterator()
            decode_jpeg, copy = Compiler.compile(imdecode), Compiler.compile(memcpy)

            # mypy requires the annotations; numba ignores them.
            def decode(
                batch_indices: Any, destination: Any, metadata: Any, storage_state: Any
            ) -> Any:
                pixels, failed = destination
                for i in images(len(batch_indices)):
                    field = metadata[batch_indices[i]]
                    stored = read(field["data_ptr"], storage_state)
                    height, width = field["height"], field["width"]
                    failed[i] = False
                    if field["mode"] == 0:  # a JPEG, see `beton.MODES`
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
        """FFCV's pass, whose `close` ends its thread, and which passes on errors of the thread."""

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
            # FFCV waits for the queue without a limit, so a thread that failed would block it.
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
            while self.is_alive():  # the thread may be blocked on a full queue: empty the queue
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
