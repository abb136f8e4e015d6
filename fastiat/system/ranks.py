"""Ranks: this process's place among those that torchrun has started, and their collectives.

torchrun starts the processes, on one machine or several, and ends the others when one fails. An
update all-reduces one flat buffer, an evaluation its counts; all other state comes from the same
seed. So no wrapper such as DistributedDataParallel is needed. In a single process every collective
returns at once.
"""

import hashlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fastiat.system import errors
from fastiat.system.errors import InputError, RankLostError, out_of_memory

TIMEOUT = timedelta(minutes=20)
"""Time until a collective fails if a rank is connected but does not answer."""


@dataclass(eq=False)
class Ranks:
    """This process's place among the ranks of a job, and the collectives that they share.

    rank, count: number of this rank, from 0, and number of ranks (`RANK`, `WORLD_SIZE`).
    local_rank, local_count: the same among the ranks of this machine.
    node: number of this machine, from 0.
    store: torchrun's key-value store; None for a single process.
    context: returns the end of the message of a `RankLostError`: the step and the resume command.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    node: int = 0
    store: dist.Store | None = None
    context: Callable[[], str] = lambda: ""
    _flat: dict[tuple[torch.Size, ...], tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    _turns: int = 0  # numbers the keys in the store; all ranks count alike

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def launcher(self) -> str:
        """The command that starts the same number of processes, without fastiat's arguments."""
        if self.alone:
            return "fastiat"
        nodes = self.count // self.local_count
        several = f"--nnodes {nodes} " if nodes > 1 else ""
        return f"torchrun {several}--nproc-per-node {self.local_count} -m fastiat"

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace fp32 tensors, on one device, by their means; bitwise equal on all ranks.

        They are copied to one flat buffer, kept for these shapes: one all-reduce, not dozens.
        """
        if self.alone:
            return
        sizes = [tensor.numel() for tensor in tensors]
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._flat:
            flat = torch.empty(sum(sizes), device=tensors[0].device)
            # Each part has the strides of its tensor: with equal strides `_foreach_copy_` copies
            # many tensors in one kernel, otherwise each tensor in its own.
            parts = [
                part.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
                for part, tensor in zip(flat.split(sizes), tensors, strict=True)
            ]
            self._flat[shapes] = flat, parts
        flat, parts = self._flat[shapes]
        with torch.no_grad():
            torch._foreach_copy_(parts, list(tensors))
            self.all_reduce_sum_(flat).div_(self.count)
            torch._foreach_copy_(list(tensors), parts)

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks, and return it."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, *values: int) -> tuple[int, ...]:
        """Return the maximum over the ranks of each value."""
        if self.alone:
            return values
        return tuple(self._all_reduce(torch.tensor(values), dist.ReduceOp.MAX).tolist())

    def gather(self, text: str) -> list[str]:
        """Return the text of every rank, in the order of the ranks."""
        if self.store is None:
            return [text]
        self._turns += 1
        keys = [f"text/{self._turns}/{rank}" for rank in range(self.count)]
        self.store.set(keys[self.rank], text)
        self.barrier()
        return [self.store.get(key).decode() for key in keys]

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        self.all_reduce_max(0)

    def check_same(self, what: str, *contents: Any) -> None:
        """Raise `InputError`, which names `what`, unless `contents` are equal on all ranks.

        contents: tensors, and values that `repr` tells apart.
        """
        if self.alone:
            return
        digest = hashlib.sha256()
        for content in contents:
            is_tensor = isinstance(content, Tensor)
            digest.update(content.cpu().numpy().tobytes() if is_tensor else repr(content).encode())
        if len(set(self.gather(digest.hexdigest()))) > 1:
            raise InputError(
                f"the {self.count} processes do not have the same {what}: "
                f"start all of them with the same command and files"
            )

    @contextmanager
    def local_rank_first(self) -> Iterator[None]:
        """Let local rank 0 of every machine run the block before the machine's other ranks.

        The other ranks then find the files that local rank 0 has downloaded and cached.
        """
        if self.store is None:
            yield
            return
        self._turns += 1
        done = f"done/{self._turns}/{self.node}"
        # `Store.wait` would block in C++, where Ctrl-C has no effect.
        while self.local_rank and not self.store.check([done]):
            time.sleep(0.1)
        try:
            yield
        finally:
            self.store.set(done, "")

    def may_report(self) -> bool:
        """Whether this rank is the first that calls this, so that only one failing rank reports.

        From then on SIGINT and SIGTERM are ignored: torchrun sends one of them to the other ranks
        as soon as a rank ends, which must not cut off the message.
        """
        if self.store is None:
            return True
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return self.store.add("reports", 1) == 1
        except RuntimeError:  # the machine that has the store has failed
            return True

    def _all_reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.alone:
            return tensor
        try:
            dist.all_reduce(tensor, operation)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            # gloo's message is "[file:line] cause. Further text": keep the cause alone.
            first_line = (str(error).splitlines() or [""])[0]
            cause = re.sub(r"^\[\S*\] ", "", first_line).partition(". ")[0]
            raise RankLostError(
                f"another of the {self.count} processes has ended ({cause[:100]}){self.context()}"
            ) from None
        return tensor


_ranks = Ranks()


def ranks() -> Ranks:
    """Return this process's place: that of a single process, except inside `run_distributed`."""
    return _ranks


def run_distributed(work: Callable[[], int]) -> int:
    """Join the ranks that torchrun has started, do `work` with them and return its exit status.

    Only rank 0 prints to stdout, and only the first rank that fails prints its error. A rank that
    fails exits here, with its status, or with 1 after a traceback.
    """
    global _ranks
    _ranks = _join()
    errors.may_report = _ranks.may_report
    if not _ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        status = work()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        _ranks.may_report()  # the other ranks, whose collectives fail now, then print nothing
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # A normal exit may wait forever for a collective on the GPU.
        os._exit(status)
    dist.destroy_process_group()
    return status


def _join() -> Ranks:
    """Join the process group that torchrun's environment variables describe.

    Raises `SystemExit` with status 2, after an error message, if one of the variables is not set.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            errors.complain(
                f"fastiat: RANK and WORLD_SIZE are set, but not {name}: start fastiat with "
                f"torchrun, or unset RANK and WORLD_SIZE"
            )
            raise SystemExit(2)
    rank, count, local_rank, local_count = (int(os.environ[name]) for name in names)
    node = int(os.environ.get("GROUP_RANK", rank // local_count))
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)
    # gloo opens a connection, which takes a file descriptor, to every other rank; the soft limit is
    # often 1,024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    own_keys = dist.PrefixStore("fastiat", store)
    return Ranks(rank, count, local_rank, local_count, node, own_keys)
