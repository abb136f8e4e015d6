"""Ranks started as by torchrun, but faster; no agent ends the others when one is lost."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from fastiat import cli, data
from fastiat.config import EvaluateConfig, TrainConfig
from fastiat.engine import graphs
from fastiat.measuring.one_pass import fooled
from fastiat.models import build, to_pixels
from fastiat.system import ranks
from fastiat.train import Trainer

# The command sets it before torch is imported; the forked ranks have torch imported already.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# The fork server imports everything once; every rank is a fork of it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["rank_jobs", "fastiat.train", "fastiat.evaluate", "tensorboard"])


@dataclass
class Ended:
    """Exit status, stdout and stderr of every rank, in order."""

    statuses: list[int | None]
    out: list[str]
    err: list[str]

    @property
    def complaints(self) -> list[str]:
        return [line for text in self.err for line in text.splitlines()]


def together(count: int, folder: Path, job: Callable[..., object], *arguments: Any) -> Ended:
    """Run `job(*arguments)` in `count` processes that find each other by torchrun's environment."""
    # torchrun keeps the store in a process of its own, so that it outlives every rank.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    folder.mkdir(exist_ok=True)
    processes = []
    for rank in range(count):
        environment = {
            **{"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count},
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": store.port},
            **{"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0},
        }
        process = _context.Process(
            target=_rank, args=(environment, folder / str(rank), job, arguments)
        )
        process.start()
        processes.append(process)
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    texts = [
        [folder.joinpath(f"{rank}.{name}").read_text() for rank in range(count)]
        for name in ("out", "err")
    ]
    return Ended([process.exitcode for process in processes], *texts)


def _rank(
    environment: dict[str, Any], prefix: Path, job: Callable[..., object], arguments: Sequence[Any]
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{prefix}.{name}", os.O_CREAT | os.O_WRONLY, 0o666), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.exit(job(*arguments))  # type: ignore[arg-type]


def command(*argv: str) -> int:
    """Run the `fastiat` command."""
    return cli.main(argv)


def command_signalled(number: int, to: int, step: int, *argv: str) -> int:
    """Run the command; rank `to` gets a signal twice, before the update after `step`.

    Twice, because SLURM sends it to every process, and torchrun passes on the one that it gets.
    """
    original = Trainer.update

    def update(self, *batch):
        if self.step == step and self.ranks.rank == to:
            for _ in range(2):
                os.kill(os.getpid(), number)
        return original(self, *batch)

    Trainer.update = update
    return cli.main(argv)


def command_unlike(*argv: str) -> int:
    """Run the command with another learning rate on each rank."""
    return cli.main([*argv, "--lr", f"0.0{1 + int(os.environ['RANK'])}"])


def command_diverging(*argv: str) -> int:
    """Run the command; the weights of rank 1 alone become infinite."""
    original = Trainer.update

    def update(self, *batch):
        if self.step == 3 and self.ranks.rank == 1:
            next(self.model.parameters()).data.fill_(torch.inf)
        return original(self, *batch)

    Trainer.update = update
    return cli.main(argv)


def command_waiting(*argv: str) -> int:
    """Run the command; rank 1 is killed while the others are blocked in C, as by a GPU."""
    original = Trainer.update

    def update(self, *batch):
        if self.step == 3:
            if self.ranks.rank != 1:
                lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
                libc.pthread_mutex_lock(lock)
                libc.pthread_mutex_lock(lock)  # never returns, and no signal interrupts it
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *batch)

    Trainer.update = update
    return cli.main(argv)


def command_skipping(*argv: str) -> int:
    """Run the command; one gradient of rank 1 alone is NaN, once."""
    original = Trainer._all_reduce_mean

    def averaged(self, update):
        if self.step == 3 and self.ranks.rank == 1:
            next(self.model.parameters()).grad.fill_(torch.nan)
        return original(self, update)

    Trainer._all_reduce_mean = averaged
    return cli.main([*argv, "--on-nan", "skip"])


TRAINING = TrainConfig(
    dataset="digits", arch="preact18", width=2, steps=2, lr=0.02, ema=0.9, bn="update",
    holdout=700, batch_size=36, device="cpu", precision="fp32",
)  # fmt: skip
FROZEN = replace(
    TRAINING, mix="none", random_start=False, bn="eval", ema=0.0, holdout=0, momentum=0.0,
    nesterov=False,
)  # fmt: skip
METHODS = {
    "trades, awp": {"objective": "trades", "awp": 0.05},
    "mart": {"objective": "mart", "mix": "cutmix"},
    "awp": {"awp": 0.05},
    "mixed": {"attack_mixed": True, "mix": "mixup", "awp": 0.05},
    "n-fgsm": {"adv": "n-fgsm"},
}
"""Methods whose ranks must agree; AWP has a collective of its own within an update."""


def trained(config: TrainConfig, updates: int) -> dict[str, Any]:
    """Make some updates and validate; `own` differs between ranks, everything else is equal."""
    trainer = Trainer(config, data.load("digits"))
    steps = trainer.epoch_updates()
    figures = [torch.stack(next(steps)) for _ in range(updates)]
    own = [trainer.rank_random[name].get_state() for name in ("mix", "attack")]
    trainer.validate(row := {})
    return {
        "state": trainer.state_dict(),
        "figures": torch.stack(figures),
        "row": row,
        "own": own,
        "modes": [module.training for module in trainer.model.modules()],
    }


def frozen_update(arch: str, **changes: Any) -> dict[str, Any]:
    """Make one update with BatchNorm in eval mode on the first batch; return its gradient."""
    trainer = Trainer(replace(FROZEN, arch=arch, **changes), data.load("digits"))
    # Not the initial running statistics, 0 and 1, with which BatchNorm would change nothing.
    generator = torch.Generator().manual_seed(1)
    for buffer in trainer.model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    trainer.model.eval()
    update = trainer.update(*next(iter(trainer.loader)))
    return {
        "grads": [parameter.grad.clone() for parameter in trainer.model.parameters()],
        "figures": torch.stack(update),
    }


MEASURED = {
    "linf": EvaluateConfig(device="cpu", precision="fp32", batch_size=100, restarts=2, seed=3),
    "l2": EvaluateConfig(
        device="cpu", precision="fp32", batch_size=50, restarts=2, norm="l2", seed=4
    ),
    "one batch": EvaluateConfig(device="cpu", precision="fp32", batch_size=360),
}


def guessing() -> torch.nn.Module:
    """Return an untrained network, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build("preact18", 10, 1, 8, width=2).eval()


def measured() -> dict[str, dict[str, torch.Tensor]]:
    """Return which of the digits each attack fools, under several settings."""
    model, found = guessing(), {}
    for name, config in MEASURED.items():
        for worst in (False, True):
            found[f"{name}, worst {worst}"] = fooled(
                model, data.load("digits").test, ("none", "fgsm", "pgd-1", "pgd-3"),
                eps=0.05, alpha=0.02, config=config, worst=worst,
            )  # fmt: skip
    return found


def autoattacked() -> tuple[torch.Tensor, dict[str, int], list[str]]:
    """Attack 21 digits in three batches with AutoAttack cut to a few steps."""
    import pyautoattack

    from fastiat.measuring.autoattack import autoattack

    class Short(pyautoattack.AutoAttack):
        def _set_version(self, version="standard"):
            super()._set_version(version)
            self.square.n_queries = 3
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyautoattack, "AutoAttack", Short)
        images, model = data.load("digits").test.images[:21], guessing()
        split = data.Split(images, model(to_pixels(images.permute(0, 3, 1, 2))).argmax(1))
        config = EvaluateConfig(device="cpu", batch_size=8)
        outcome = autoattack(model, split, eps=0.01, config=config)
    return outcome.fooled, outcome.errors_after, outcome.warnings


def numbers(folder: str) -> int:
    """Compute all of the above on every rank and save it in `folder`."""

    def work() -> int:
        job = ranks.ranks()
        found: dict[str, Any] = {"measured": measured()}
        if job.count == 2:
            if find_spec("pyautoattack"):
                found["autoattack"] = autoattacked()
            found["eager"] = trained(TRAINING, 3)
            found["mlp6"], found["preact18"] = frozen_update("mlp6"), frozen_update("preact18")
            found["awp"] = frozen_update("mlp6", awp=0.05)
            # The step in fixed buffers, without the minutes of compiling.
            graphs.compile_once = lambda function: function
            found["compile"] = trained(replace(TRAINING, engine="compile"), 3)
            for name, method in METHODS.items():
                small = replace(TRAINING, arch="mlp6", width=8, **method)
                for engine in ("eager", "compile"):
                    found[name, engine] = trained(replace(small, engine=engine), 3)
        tensors = [torch.full((2, 3), float(job.rank)), torch.tensor(3.0 * job.rank)]
        job.all_reduce_mean_(tensors)
        found["means"] = tensors
        found["sum"] = job.all_reduce_sum_(torch.tensor([1, job.rank]))
        with job.local_rank_first():
            found["came before"] = [file.name for file in Path(folder).glob("turn *")]
            Path(folder, f"turn {job.rank}").touch()
        found["texts"] = job.gather(f"of {job.rank}")
        found["agreed"] = job.all_reduce_max(job.rank, -job.rank)
        torch.save(found, Path(folder) / f"{job.rank}.pt")
        return 0

    return ranks.run_distributed(work)
