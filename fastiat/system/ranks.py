"""Ranks: this process's place among those that torchrun has started, and their collectives.

torchrun starts the processes, on one machine or several, and ends the others when one is lost. The
network needs no wrapper such as DistributedDataParallel: an update all-reduces one flat buffer, an
evaluation its counts, and the rest is equal on all ranks because it comes from the same seed. In a
single process every collective returns at once.
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
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fastiat.system import errors
from fastiat.system.errors import InputError, RankLostError, out_of_memory

TIMEOUT = timedelta(minutes=20)
"""How long a collective waits for a rank whose connection is open but silent."""


@dataclass(eq=False)
class Ranks:
    """This process's place among the ranks of a job, and the collectives that they share.

    rank, count: its number, from 0, and the number of ranks (`RANK`, `WORLD_SIZE`).
    local_rank, local_count: the same among the ranks of this machine, which has the number `node`.
    store: torchrun's key-value store; None for a single process.
    context: ends the message of a `RankLostError`: the step, and the command that resumes.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    node: int = 0
    store: dist.Store | None = None
    context: Callable[[], str] = lambda: ""
    _flat: tuple[Tensor, list[Tensor]] | None = None
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
        """The command line that starts as many processes, up to fastiat's own arguments."""
        if self.alone:
            return "fastiat"
        nodes = self.count // self.local_count
        several = f"--nnodes {nodes} " if nodes > 1 else ""
        return f"torchrun {several}--nproc-per-node {self.local_count} -m fastiat"

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace fp32 tensors by their means over the ranks, the same bits on each.

        All tensors are on one device, and their shapes are the same in every call. Copying them to
        one flat buffer makes it one all-reduce instead of dozens.
        """
        if self.alone:
            return
        sizes = [tensor.numel() for tensor in tensors]
        if self._flat is None or len(self._flat[0]) != sum(sizes):
            flat = torch.empty(sum(sizes), device=tensors[0].device)
            # Each part has its tensor's strides: for equal strides `_foreach_copy_` copies many
            # tensors in one kernel, for others one by one.
            parts = [
                part.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())
                for part, tensor in zip(flat.split(sizes), tensors, strict=True)
            ]
            self._flat = flat, parts
        flat, parts = self._flat
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
        """Wait until every rank is here."""
        self.all_reduce_max(0)

    def check_same(self, what: str, *contents: Any) -> None:
        """Raise `InputError` unless the tensors and values `contents` are equal on all ranks."""
        if self.alone:
            return
        digest = hashlib.sha256()
        for content in contents:
            is_tensor = isinstance(content, Tensor)
            digest.update(content.cpu().numpy().tobytes() if is_tensor else repr(content).encode())
        if len(set(self.gather(digest.hexdigest()))) > 1:
            raise InputError(f"the {self.count} processes do not have the same {what}")

    @contextmanager
    def local_rank_first(self) -> Iterator[None]:
        """Let local rank 0 of every machine run the block before the machine's other ranks.

        The others find what it has downloaded and cached there.
        """
        if self.store is None:
            yield
            return
        self._turns += 1
        done = f"done/{self._turns}/{self.node}"
        # `Store.wait` would block in C++, where Ctrl-C is not noticed.
        while self.local_rank and not self.store.check([done]):
            time.sleep(0.1)
        try:
            yield
        finally:
            self.store.set(done, "")

    def may_report(self) -> bool:
        """Whether this rank is the first that asks, so that of all that fail one prints why.

        From then on SIGINT and SIGTERM are ignored: torchrun sends one of them to the others as
        soon as a rank ends, which must not cut off the message.
        """
        if self.store is None:
            return True
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            return self.store.add("reports", 1) == 1
        except RuntimeError:  # the store was on a machine that is lost
            return True

    def _all_reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.alone:
            return tensor
        try:
            dist.all_reduce(tensor, operation)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            # gloo's message starts with a place in its source and goes on after the cause.
            first_line = (str(error).splitlines() or [""])[0]
            cause = re.sub(r"^\[\S*\] ", "", first_line).partition(". ")[0]
            raise RankLostError(
                f"another of the {self.count} processes has ended ({cause[:100]}){self.context()}"
            ) from None
        return tensor


_ranks = Ranks()


def ranks() -> Ranks:
    """Return this process's place: a single process, except inside `run_distributed`."""
    return _ranks


def run_distributed(work: Callable[[], int]) -> int:
    """Join the ranks that torchrun has started, do `work` with them and return its exit status.

    Only rank 0 has a stdout, and only the first rank that fails prints why. A rank that fails ends
    here, with its status or, after a traceback, 1.
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
        _ranks.may_report()  # the others, whose collectives fail now, are to print nothing
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # A normal exit may wait for a collective on the GPU that never ends.
        os._exit(status)
    dist.destroy_process_group()
    return status


def _join() -> Ranks:
    """Make the process group that torchrun's environment variables describe."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            errors.complain(
                f"fastiat: RANK and WORLD_SIZE are set, but not {name}: start it with torchrun, or "
                f"unset them"
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
    # gloo opens a connection, so a file descriptor, to every other rank: 1,024 are often allowed.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    own_keys = dist.PrefixStore("fastiat", store)
    return Ranks(rank, count, local_rank, local_count, node, own_keys)
