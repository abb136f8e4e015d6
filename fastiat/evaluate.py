"""Measuring: the error of trained runs on clean images and under white-box attacks."""

import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastiat import data
from fastiat.attack import Starts, attack_mode, pgd
from fastiat.config import (
    DiagnoseConfig,
    EvaluateConfig,
    MeasureConfig,
    SweepConfig,
    TrainConfig,
    TransferConfig,
)
from fastiat.engine.device import autocast, own_defaults, pick_device, pick_precision
from fastiat.images import convert
from fastiat.images.downloads import SOURCES
from fastiat.measuring.autoattack import ATTACKS, autoattack, check_classes, library_version
from fastiat.measuring.one_pass import default_batch, error_rates, fooled, title, within_memory
from fastiat.models import ModelCard, correct, to_pixels
from fastiat.runs.directory import MODEL, Run, load_with_card
from fastiat.runs.results import Rate, add_results, figures, fingerprint, provenance, read_results
from fastiat.system.errors import InputError, printable_lines
from fastiat.system.progress import Progress
from fastiat.system.ranks import ranks
from fastiat.system.settings import steps_of

__all__ = ["Rate", "error_rate", "error_rates", "evaluate", "read_results"]

UNITS = "error in %, ± 95 % interval"


def error_rate(
    model: nn.Module,
    split: data.Split,
    attack: str,
    *,
    eps: float,
    alpha: float,
    config: MeasureConfig,
) -> Rate:
    """Return the error of `model` on `split` under "none", "fgsm" or "pgd-K".

    Examples are crafted in the configuration's precision and classified in fp32.
    """
    return error_rates(model, split, (attack,), eps=eps, alpha=alpha, config=config)[attack]


@own_defaults()
def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Rate]]:
    """Measure every run of `config` and print a table.

    Returns the rates as {run: {"split/attack": rate}}, where an attack is one of the configuration,
    "autoattack" or, with `worst`, "none" and "worst". A run directory keeps them in metrics.jsonl
    and evaluation.json. Raises `InputError` for runs or data that are missing or do not fit each
    other.
    """
    config.check()
    if config.autoattack:
        library_version()
    # All is loaded and checked before anything is measured, so that a run is not measured in vain.
    runs = open_runs(config)
    for trained in runs if config.autoattack else ():
        check_classes(trained.name, trained.card.num_classes)
    return {job.name: _measure(job, config) for job in prepare(runs, config)}


@dataclass(frozen=True)
class Trained:
    """A network that was asked for by `name`, and its run where that is a run directory."""

    name: str
    model: nn.Module
    card: ModelCard
    fingerprint: str
    run: Run | None

    @property
    def settings(self) -> TrainConfig:
        """How it was trained, or the defaults where nothing says."""
        return self.run.config if self.run else TrainConfig()

    def batch_size(self, config: MeasureConfig) -> int:
        """Return how many images to attack at a time: the configuration's, else what fits."""
        own = self.run.config.batch_size if self.run else None
        return config.batch_size or default_batch(self.card.image_size, own)

    def within_memory(self, command: str, config: MeasureConfig) -> AbstractContextManager[None]:
        """Say, where memory runs out in the block, how to measure this network with less of it."""
        return within_memory(f"fastiat {command} {shlex.quote(self.name)}", self.batch_size(config))


@dataclass(frozen=True)
class Job(Trained):
    """A network to measure and the images to do it with."""

    dataset: data.Dataset
    splits: dict[str, data.Split]
    data: str
    """Fingerprint of the data set."""

    def alpha(self, config: MeasureConfig) -> float:
        """Return the PGD step: the configuration's, else that of the run's training."""
        return self.settings.alpha if config.alpha is None else config.alpha

    def keep(self, entry: dict[str, Any]) -> None:
        """Write a result to the run's metrics.jsonl and evaluation.json.

        Measured again to the same figures, as a resume does after a kill, it is not written twice.
        A model without its run has no place for it, and somebody else's run is only read.
        """
        if self._writable:
            assert self.run is not None
            if not self.run.has_row({k: v for k, v in entry.items() if k != "seconds"}):
                self.run.log(**entry)
            add_results(self.run.path, [entry])

    def log_line(self, text: str) -> None:
        """Print a text, and add it to stdout.log where results are kept."""
        if self._writable:
            assert self.run is not None
            self.run.log_line(text)
        else:
            print(printable_lines(text), flush=True)

    @property
    def _writable(self) -> bool:
        return ranks().first and self.run is not None and os.access(self.run.path, os.W_OK)

    def entry(
        self,
        kind: str,
        split: str,
        attack: str,
        rate: Rate,
        config: MeasureConfig,
        eps: float,
        alpha: float,
    ) -> dict[str, Any]:
        """Return a figure with its settings as `fastiat.runs.results` has them."""
        drawn = len(self.splits[split]) < len(getattr(self.dataset, split))
        started = config.random_start and attack not in ("none", "fgsm")
        return {
            "kind": kind,
            "dataset": self.dataset.name,
            "data": self.data,
            "split": split,
            "attack": attack,
            "eps": eps,
            "alpha": alpha,
            "steps": None if attack in ("worst", "autoattack") else steps_of(attack),
            "norm": config.norm,
            "loss": config.attack_loss,
            "restarts": config.restarts,
            "random_start": config.random_start,
            "precision": pick_precision(config.precision, pick_device(config.device)),
            "seed": config.seed if drawn or started or attack == "autoattack" else None,
            "batch_size": self.batch_size(config),
            "model": self.fingerprint,
            **figures(rate),
        }


def open_runs(config: MeasureConfig) -> list[Trained]:
    """Load the networks of `config.runs`; raise `InputError` for one that is missing or damaged."""
    return [_open(name, pick_device(config.device)) for name in dict.fromkeys(config.runs)]


def _open(name: str, device: torch.device) -> Trained:
    model, card = load_with_card(name, device)
    path = Path(name)
    if not path.is_dir():
        return Trained(name, model, card, fingerprint(path), None)
    run = Run.open(path)
    if (card.arch, run.config.width or card.width) != (run.config.arch, card.width):
        raise InputError(
            f"{name} holds the model of another run, {card.arch} of width {card.width}: "
            f"put its own {MODEL} back, or evaluate that file by its name"
        )
    read_results(path)  # refuses a damaged file before anything is measured for it
    return Trained(name, model, card, fingerprint(path / MODEL), run)


def prepare(runs: Iterable[Trained], config: MeasureConfig) -> list[Job]:
    """Give every network its images; raise `InputError` where there are none or they do not fit."""
    load = cache(data.load)
    jobs: list[Job] = []
    for trained in runs:
        jobs.append(_prepare(trained, config, load, jobs))
    return jobs


def _prepare(
    trained: Trained, config: MeasureConfig, load: Callable[..., data.Dataset], others: list[Job]
) -> Job:
    dataset = _data_for(trained, config, load)
    splits = {split: getattr(dataset, split) for split in config.splits}
    for split, images in splits.items():
        if config.limit is not None and config.limit < len(images):
            splits[split] = data.draw(images, config.limit, config.seed)
    # A fingerprint reads every image: it is taken once for runs on the same data set.
    known = (job.data for job in others if job.dataset is dataset)
    mark = next(known, None) or dataset.fingerprint()
    return Job(**vars(trained), dataset=dataset, splits=splits, data=mark)


def _data_for(
    trained: Trained, config: MeasureConfig, load: Callable[..., data.Dataset]
) -> data.Dataset:
    """Load the data set to measure on, and check that the network fits its images and classes."""
    name, card, own = trained.name, trained.card, trained.run.config if trained.run else None
    dataset_name = config.dataset or (own.dataset if own else None)
    if dataset_name is None:
        raise InputError(f"{name} is a model without its run: say which images with --dataset")
    data_dir = data_place(config, own)
    fetch = data_dir is None or config.data_dir is not None
    dataset = load(dataset_name, data_dir, loader=own.loader if own else "auto", fetch=fetch)
    device = pick_device(config.device)
    if not dataset.stored and data.choose_loader("auto", dataset, device)[0] == "ffcv":
        dataset = convert.cached_dataset(dataset)
    wanted = (card.in_channels, card.image_size, card.image_size)
    if dataset.test.shape != wanted:
        raise InputError(
            f"{name} takes images of (channels, height, width) {wanted}, "
            f"but those of {dataset_name} are {dataset.test.shape}: convert them, or choose "
            f"other images with --dataset and --data-dir"
        )
    if dataset.classes != card.classes:
        raise InputError(
            f"{name} tells {some(card.classes)} apart, "
            f"but {dataset_name} has {some(dataset.classes)}: "
            f"choose images of its classes with --dataset and --data-dir"
        )
    return dataset


def data_place(config: MeasureConfig | DiagnoseConfig, own: TrainConfig | None) -> str | None:
    """Return the data folder to measure with: the configuration's, else the run's `own`.

    The run's is that of its own data set, and of those that are downloaded, which may share one.
    """
    if config.data_dir or own is None:
        return config.data_dir
    wanted = {config.dataset or own.dataset, own.dataset}
    return own.data_dir if len(wanted) == 1 or wanted <= SOURCES.keys() else None


def some(classes: tuple[str, ...]) -> str:
    """Write how many classes these are, and the first few."""
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' * (len(classes) > 3)})"


def _measure(job: Job, config: EvaluateConfig) -> dict[str, Rate]:
    config = replace(config, batch_size=job.batch_size(config))
    rates: dict[str, Rate] = {}
    for name, split in job.splits.items():
        with job.within_memory("evaluate", config):
            found = _measure_split(job, name, split, config)
        rates |= {f"{name}/{attack}": rate for attack, rate in found.items()}
    job.log_line(_table(job, rates, config))
    return rates


def _measure_split(
    job: Job, name: str, split: data.Split, config: EvaluateConfig
) -> dict[str, Rate]:
    """Measure one split, keep the results as they come, and return {attack: rate}."""
    device, (eps, alpha) = pick_device(config.device), _radius_and_step(job, config)
    library = {"autoattack": library_version()} if config.autoattack else {}
    rates: dict[str, Rate] = {}
    started = time.monotonic()

    def keep(attack: str, wrong: Tensor, kind: str = "evaluation", **more: Any) -> None:
        rates[attack] = Rate(int(wrong.sum()), len(split))
        entry = job.entry(kind, name, attack, rates[attack], config, eps, alpha)
        versions = library if attack in ("worst", "autoattack") else {}
        job.keep(entry | more | provenance(device, time.monotonic() - started, **versions))

    found = fooled(
        job.model, split, config.attacks, eps=eps, alpha=alpha, config=config, worst=config.worst
    )
    for attack in ("none",) if config.worst else found:
        keep(attack, found[attack])
    union = torch.stack(list(found.values())).any(0)
    if library:
        outcome = autoattack(
            job.model, split, eps=eps, config=config, skip=union if config.worst else None
        )
        union |= outcome.fooled
        if not config.worst:
            keep(
                "autoattack", outcome.fooled, "autoattack", precision="fp32", attacks=ATTACKS,
                errors_after=outcome.errors_after, warnings=outcome.warnings,
            )  # fmt: skip
    if config.worst:
        keep("worst", union, attacks=(*found, *library))
    return rates


def _radius_and_step(job: Job, config: EvaluateConfig) -> tuple[float, float]:
    return job.settings.eps if config.eps is None else config.eps, job.alpha(config)


def _table(job: Job, rates: dict[str, Rate], config: EvaluateConfig) -> str:
    """Write a run's rates as text, a row per split and a column per attack."""
    attacks = list(dict.fromkeys(key.partition("/")[2] for key in rates))
    rows = {
        split: [*(str(rates[f"{split}/{attack}"]) for attack in attacks), str(len(images))]
        for split, images in job.splits.items()
    }
    eps, alpha = _radius_and_step(job, config)
    heading = (
        f"{job.name}: {UNITS}, {config.norm} eps {eps:.4g}, alpha {alpha:.4g}{unusual(config)}"
    )
    return table(heading, [*map(title, attacks), "images"], rows)


def unusual(config: MeasureConfig) -> str:
    """Write what of the measurement is not as usual, to be added to a heading."""
    loss = f", {config.attack_loss} loss" if config.attack_loss != "ce" else ""
    restarts = f", {config.restarts} restarts" if config.restarts > 1 else ""
    start = "" if config.random_start else ", no random start"
    seed = f", seed {config.seed}" if config.seed else ""
    images = ", ".join(filter(None, (config.dataset, config.data_dir)))
    return loss + restarts + start + seed + (f", images of {images}" if images else "")


def table(heading: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """Write rows of cells as text under a heading and the columns' titles."""
    first = max(map(len, rows)) + 2
    width = max(12, *(len(cell) + 2 for cells in (columns, *rows.values()) for cell in cells))
    lines = [heading, " " * first + "".join(f"{column:>{width}}" for column in columns)]
    for row, cells in rows.items():
        lines.append(f"{row:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


Key = tuple[str, float, int]
"""Split, eps and steps."""


@own_defaults()
def sweep(config: SweepConfig) -> dict[str, dict[Key, Rate]]:
    """Measure every run of `config` at each eps and number of steps, and print tables.

    Returns {run: {(split, eps, steps): rate}}; run directories keep the results as `evaluate`'s.
    One pass measures all numbers of steps. The step is the run's own alpha, whatever the radius,
    unless `config` gives one. Raises `InputError` for runs or data that are missing or do not fit.
    """
    config.check()
    jobs = prepare(open_runs(config), config)
    rates = {job.name: _measure_sweep(job, config) for job in jobs}
    several = len(set(config.steps)) > 1
    for split, eps in product(
        dict.fromkeys(config.splits), dict.fromkeys(config.eps) if several else (None,)
    ):
        print(_sweep_table(rates, config, split, eps), flush=True)
    return rates


def _measure_sweep(job: Job, config: SweepConfig) -> dict[Key, Rate]:
    rates = {}
    config = replace(config, batch_size=job.batch_size(config))
    alpha = job.alpha(config)
    for (split_name, split), eps in product(job.splits.items(), dict.fromkeys(config.eps)):
        started = time.monotonic()
        attacks = {f"pgd-{steps}": steps for steps in config.steps}
        with job.within_memory("sweep", config):
            found = error_rates(
                job.model, split, tuple(attacks), eps=eps, alpha=alpha, config=config
            )
        made = provenance(pick_device(config.device), time.monotonic() - started)
        for attack, rate in found.items():
            rates[split_name, eps, attacks[attack]] = rate
            job.keep(job.entry("sweep", split_name, attack, rate, config, eps, alpha) | made)
    return rates


def _sweep_table(
    rates: dict[str, dict[Key, Rate]], config: SweepConfig, split: str, eps: float | None
) -> str:
    """Write a split's rates as text, a row per run: over the steps at `eps`, or over all radii."""
    at, steps = dict.fromkeys(config.eps), dict.fromkeys(config.steps)
    if eps is None:
        heading, columns = f"PGD-{config.steps[0]}, eps across", [f"{eps:g}" for eps in at]
    else:
        heading, columns = f"eps {eps:.4g}, PGD steps across", [str(n) for n in steps]
    rows, counts = {}, set()
    for name, found in rates.items():
        row = [rate for key, rate in found.items() if key[0] == split and eps in (None, key[1])]
        rows[name] = [str(rate) for rate in row]
        counts.add(row[0].n)
    # Runs on different data sets may be swept together.
    n = " or ".join(map(str, sorted(counts)))
    step = "" if config.alpha is None else f", alpha {config.alpha:.4g}"
    return table(
        f"{split}, {n} images, {config.norm} {heading}{step}{unusual(config)}: {UNITS}",
        columns,
        rows,
    )


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
            print(_transfer_table(matrix, config, split, eps), flush=True)
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
    batches = data.make_loader(split, size, device=device, train=False)
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


def _transfer_table(matrix: Matrix, config: TransferConfig, split: str, eps: float) -> str:
    short = [Path(name).resolve().name for name in matrix]
    names = short if len(set(short)) == len(short) else list(matrix)
    cells = [list(row.values()) for row in matrix.values()]
    step = "" if config.alpha is None else f", alpha {config.alpha:.4g}"
    heading = (
        f"{split}, {cells[0][0].n} images, {config.norm} eps {eps:.4g}, PGD-{config.steps}{step}"
        f"{unusual(config)}: {UNITS}\ntarget down, attacking run across"
    )
    return table(heading, names, dict(zip(names, ([*map(str, row)] for row in cells), strict=True)))
