"""Several processes that do one job: which of them this is, and what they tell each other.

torchrun starts them, on one machine or on many. There is no wrapper around the network: an update
adds up one flat buffer, an evaluation its counts, and everything else is the same on all ranks
because it comes from the same seed. A process on its own goes through the same calls, which then
cost nothing.
"""

import hashlib
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fastiat.system import errors
from fastiat.system.errors import InputError, RankLostError, out_of_memory

TIMEOUT = timedelta(minutes=20)
"""How long a rank waits for one that is silent; one whose process ended is noticed at once."""
PATIENCE = 5.0
"""Seconds in which a process is to notice by itself that another was lost."""
REPORTING = 2.0
"""Seconds in which the ranks that are left report, so that the lost one can be named."""


class Terminated(BaseException):
    """SIGTERM came while no training was there to note it."""


class Ranks:
    """This process's place among those that share a job, and what they exchange.

    rank, count: its number, from 0, and how many there are.
    local_rank, local_count: the same among those on this machine, which has number `node`.
    store: where ranks leave each other short notes; None for a process on its own.
    sentinel: a group for the watch that every rank keeps over the next one.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        local_rank: int = 0,
        local_count: int = 1,
        node: int = 0,
        store: dist.Store | None = None,
        sentinel: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.count = rank, count
        self.local_rank, self.local_count, self.node = local_rank, local_count, node
        self.store, self.sentinel = store, sentinel
        self.context: Callable[[], str] = lambda: ""
        """What to add to the line about a lost rank: where the job was, and how it goes on."""
        self._watch = threading.Thread(target=self._look_after_the_next, daemon=True)
        self._ear = threading.Thread(target=self._listen, daemon=True)
        self._leaving = threading.Event()
        if sentinel is not None:
            self._watch.start()
            self._ear.start()
        self._flat: tuple[Tensor, list[Tensor]] | None = None
        self._turns = 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
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
        """Replace fp32 tensors, of one device and always the same shapes, by their means.

        One all-reduce of one flat buffer; every rank gets the same bits.
        """
        if self.alone:
            return
        sizes = [tensor.numel() for tensor in tensors]
        if self._flat is None or len(self._flat[0]) != sum(sizes):
            flat = torch.empty(sum(sizes), device=tensors[0].device)
            # In the tensors' own memory order, so that one kernel copies many of them.
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
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, *values: int) -> tuple[int, ...]:
        """Return, of each value, the largest that any rank has; all have to be here."""
        if self.alone:
            return values
        return tuple(self._reduce(torch.tensor(values), dist.ReduceOp.MAX).tolist())

    def gather(self, text: str) -> list[str]:
        """Return the text of every rank, in order."""
        if self.alone:
            return [text]
        self._turns += 1
        names = [f"text/{self._turns}/{rank}" for rank in range(self.count)]
        self._notes.set(names[self.rank], text)
        self.barrier()
        return [self._notes.get(name).decode() for name in names]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce_max(0)

    def check_same(self, what: str, *contents: Any) -> None:
        """Raise `InputError` unless the tensors and texts of `contents` are equal on all ranks."""
        if self.alone:
            return
        digest = hashlib.sha256()
        for content in contents:
            if isinstance(content, Tensor):
                content = content.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            else:
                content = repr(content).encode()
            digest.update(content)
        number = int.from_bytes(digest.digest()[:7])
        largest, smallest = self.all_reduce_max(number, -number)
        if largest != -smallest:
            raise InputError(f"the {self.count} processes do not have the same {what}")

    @contextmanager
    def local_rank_first(self) -> Iterator[None]:
        """Let one process of every machine through the block first.

        What it downloads and caches there, the others find.
        """
        if self.alone:
            yield
            return
        self._turns += 1
        store, done = self._notes, f"done/{self._turns}/{self.node}"
        while self.local_rank and not store.check([done]):
            if store.check(["speaker"]):
                raise RankLostError("another process ended")
            time.sleep(0.1)
        yield
        if not self.local_rank:
            store.set(done, "")

    def may_report(self) -> bool:
        """Whether this rank is the one to say why all end: the first that asks is.

        From then on SIGTERM, which torchrun sends the others when one ends, is ignored.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return self._speaks

    def leave(self) -> None:
        """Part from the others when all is done."""
        self._leaving.set()
        self._ear.join()
        before = (self.rank - 1) % self.count
        with suppress(RuntimeError):  # it has left already
            dist.send(torch.zeros(1), before, self.sentinel)
        self._watch.join()
        dist.destroy_process_group()

    def _look_after_the_next(self) -> None:
        """End this process if the next rank is lost and nothing here notices.

        Whoever waits for the device does not: that waits for the lost rank's part for ever.
        """
        after = (self.rank + 1) % self.count
        try:
            dist.recv(torch.zeros(1), after, self.sentinel)
        except RuntimeError as error:
            with suppress(RuntimeError):
                if not self._notes.check([f"ended/{after}"]):
                    self._notes.set("lost", str(after))
            time.sleep(PATIENCE)
            if "_speaks" not in vars(self):
                errors.complain(f"fastiat: {self._lost(error)}")
                os._exit(1)

    def _listen(self) -> None:
        """End this process if another has said why all end, and nothing here notices.

        Each of those that wait for the device would otherwise end only after its next.
        """
        with suppress(RuntimeError):  # the notes went with the process that had them
            while not self._notes.check(["speaker"]):
                if self._leaving.wait(1):
                    return
        if not self._leaving.wait(PATIENCE) and "_speaks" not in vars(self):
            os._exit(1)

    @cached_property
    def _speaks(self) -> bool:
        # Where the notes were another process's that has died, too much is better than nothing.
        with suppress(RuntimeError):
            self._notes.set(f"ended/{self.rank}", "")
            return self._notes.add("speaker", 1) == 1
        return True

    def missing(self, enough: int) -> set[int]:
        """Return the others that do not notice the end soon; wait until they are `enough`.

        A single one is enough, too, whose process is known to be lost.
        """
        missing = set(range(self.count)) - {self.rank}
        until = time.monotonic() + REPORTING
        while len(missing) > enough and time.monotonic() < until:
            with suppress(RuntimeError):
                if enough and self._notes.check(["lost"]):
                    return {int(self._notes.get("lost"))}
                missing -= {rank for rank in missing if self._notes.check([f"ended/{rank}"])}
            time.sleep(0.02)
        return missing

    @property
    def _notes(self) -> dist.Store:
        assert self.store is not None
        return self.store

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.alone:
            return tensor
        try:
            dist.all_reduce(tensor, operation)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise self._lost(error) from None
        return tensor

    def _lost(self, error: RuntimeError) -> RankLostError:
        """Say who no longer answers, which takes a moment where that is not plain."""
        if not self.may_report():
            return RankLostError("another process ended")
        missing = self.missing(1)
        who = f"rank {missing.pop()} of" if len(missing) == 1 else "one or more of"
        # gloo starts with the place in its source.
        reason = re.sub(r"^\[\S*\] ", "", (str(error).splitlines() or [""])[0]).partition(". ")[0]
        return RankLostError(
            f"{who} {self.count} processes was lost ({reason[:100]}){self.context()}"
        )


_ranks = Ranks()


def ranks() -> Ranks:
    """Return this process's place: alone, unless it has joined others with `run_distributed`."""
    return _ranks


def run_distributed(work: Callable[[], int]) -> int:
    """Join the processes that torchrun has started, do `work` with them and return its status.

    Rank 0 alone has a stdout, and only the first rank with a complaint prints it. A status other
    than 0 ends the process here, as its peers may no longer be there to take leave of.
    """
    global _ranks
    _ranks = _join()
    errors.may_report = _ranks.may_report
    signal.signal(signal.SIGTERM, _terminate)
    if not _ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        status = work()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except Terminated:
        errors.complain(
            "fastiat: ended by SIGTERM, which torchrun sends when it is ended or a process is lost"
        )
        status = 128 + signal.SIGTERM
    except BaseException:
        _ranks.may_report()
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # Without torchrun the notes are rank 0's, and the others have to see who has spoken.
        if _ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _ranks.missing(0)
        os._exit(status)
    _ranks.leave()
    return status


def _terminate(*_: object) -> None:
    raise Terminated


def _join() -> Ranks:
    """Find the others by torchrun's environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            print(
                f"fastiat: RANK and WORLD_SIZE are set, but not {name}: start it with torchrun, or "
                f"unset them",
                file=sys.stderr,
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
    # Every pair of ranks has a connection or two.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    sentinel = dist.new_group(backend="gloo", timeout=timedelta(days=1000))
    assert isinstance(sentinel, dist.ProcessGroup)
    notes = dist.PrefixStore("fastiat", store)
    return Ranks(rank, count, local_rank, local_count, node, notes, sentinel)
