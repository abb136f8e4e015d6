"""Transfer: every run attacked with the examples that are crafted on every run (Table 5)."""

import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fastiat import loaders
from fastiat.ascent import Starts
from fastiat.attack import attack_mode, pgd
from fastiat.engine.device import autocast, own_defaults, pick_device, pick_precision
from fastiat.evaluate import UNITS, Job, Trained, open_runs, prepare, some, table, unusual
from fastiat.measuring.one_pass import within_memory
from fastiat.models import correct, to_pixels
from fastiat.queries import TransferConfig
from fastiat.runs.directory import Run
from fastiat.runs.results import Rate, provenance
from fastiat.system.errors import InputError
from fastiat.system.progress import Progress

HOLDOUT = "holdout_error_percent"
Matrix = dict[str, dict[str, Rate]]
"""{target: {attacking run: error of the target}}."""


@own_defaults()
def transfer(config: TransferConfig) -> dict[tuple[str, float], Matrix]:
    """Attack every run of `config` with every run's PGD examples, and print a matrix per eps.

    Returns {(split, eps): {target: {source: rate}}}; a target that is a run directory keeps its
    row, as `evaluate`'s results. A source's examples are crafted once per eps, with its own alpha
    unless `config` gives one, and classified by all. Raises `InputError` for runs that are missing,
    unfinished, or of other images or classes than the first.
    """
    config.check()
    runs = open_runs(config)
    for trained in runs:
        _check_finished(trained)
        _check_partners(runs[0], trained, config)
    jobs = prepare(runs, config)
    _check_same_images(jobs)
    matrices = {}
    for split in config.splits:
        for eps in dict.fromkeys(config.eps):
            matrix: Matrix = {job.name: {} for job in jobs}
            for source in jobs:
                for target, rate in _attack(source, jobs, split, eps, config):
                    matrix[target][source.name] = rate
            matrices[split, eps] = matrix
            print(_table(matrix, config, split, eps), flush=True)
    return matrices


def _attack(
    source: Job, targets: list[Job], split_name: str, eps: float, config: TransferConfig
) -> Iterator[tuple[str, Rate]]:
    """Craft examples on `source`, keep and yield the error of every target on them."""
    device, alpha, started = pick_device(config.device), source.alpha(config), time.monotonic()
    precision = pick_precision(config.precision, device)
    size = min(job.batch_size(config) for job in targets)
    config = replace(config, batch_size=size)
    starts = Starts(config.seed, device)
    attack = partial(
        pgd, source.model, eps=eps, alpha=alpha, steps=config.steps, norm=config.norm,
        loss=config.attack_loss, restarts=config.restarts, random_start=config.random_start,
        generator=starts,
    )  # fmt: skip
    split = source.splits[split_name]
    errors = torch.zeros(len(targets), dtype=torch.int64, device=device)
    batches = loaders.make(split, size, device=device, train=False)
    names = " ".join(shlex.quote(job.name) for job in targets)
    title = f"{Path(source.name).name}'s examples, eps {eps:.4g}"
    with (
        within_memory(f"fastiat transfer {names}", size),
        Progress(title, len(split)) as progress,
    ):
        for number, (images, y) in enumerate(batches):
            starts.batch(number * size)
            with autocast(device, precision):
                x_adv = attack(to_pixels(images), y)
            for row, target in enumerate(targets):
                with torch.no_grad(), attack_mode(target.model, "eval"):
                    errors[row] += (~correct(target.model(x_adv), y)).sum()
            progress.advance(len(y))
    made = provenance(device, time.monotonic() - started)
    origin = {"source": Path(source.name).resolve().name, "source_model": source.fingerprint}
    for target, wrong in zip(targets, errors.tolist(), strict=True):
        rate = Rate(wrong, len(split))
        entry = target.entry(
            "transfer", split_name, f"pgd-{config.steps}", rate, config, eps, alpha
        )
        target.keep(entry | origin | made)
        yield target.name, rate


def _check_finished(trained: Trained) -> None:
    if trained.run is None:
        return
    epoch, best = _progress(trained.run)
    config = trained.run.config
    if epoch < config.epochs and not (config.patience and epoch - best >= config.patience):
        raise InputError(
            f"{trained.name} is unfinished, epoch {epoch} of {config.epochs}: "
            f"go on with fastiat train --resume --out {trained.name}"
        )


def _progress(run: Run) -> tuple[int, int]:
    """Return the last epoch of a run and, with held-out images, the one that was kept."""
    rows = [row for row in run.rows() if isinstance(row.get("epoch"), int)]
    errors = {
        row["epoch"]: row[HOLDOUT] for row in rows if isinstance(row.get(HOLDOUT), int | float)
    }
    last = max((row["epoch"] for row in rows), default=0)
    return last, min(errors, key=lambda epoch: (errors[epoch], epoch), default=last)


def _check_partners(first: Trained, other: Trained, config: TransferConfig) -> None:
    """Raise `InputError` where two networks cannot be shown the same images."""
    if first.run and other.run and config.dataset is None:
        names = first.run.config.dataset, other.run.config.dataset
        if names[0] != names[1]:
            raise InputError(
                f"{other.name} is a run on {names[1]}, and {first.name} one on {names[0]}: "
                f"transfer needs runs of one data set"
            )
    if first.card.classes != other.card.classes:
        raise InputError(
            f"{other.name} tells {some(other.card.classes)} apart, and {first.name} "
            f"{some(first.card.classes)}: transfer needs runs with the same classes"
        )


def _check_same_images(jobs: list[Job]) -> None:
    first = jobs[0]
    for job in jobs[1:]:
        if job.data != first.data:
            raise InputError(
                f"{job.name} is a run on other images of {job.dataset.name} than {first.name}: "
                f"name those to attack with --dataset and --data-dir"
            )


def _table(matrix: Matrix, config: TransferConfig, split: str, eps: float) -> str:
    short = [Path(name).resolve().name for name in matrix]
    names = short if len(set(short)) == len(short) else list(matrix)
    cells = [list(row.values()) for row in matrix.values()]
    step = "" if config.alpha is None else f", alpha {config.alpha:.4g}"
    heading = (
        f"{split}, {cells[0][0].n} images, {config.norm} eps {eps:.4g}, PGD-{config.steps}{step}"
        f"{unusual(config)}: {UNITS}\ntarget down, attacking run across"
    )
    return table(heading, names, dict(zip(names, ([*map(str, row)] for row in cells), strict=True)))
