"""Measuring trained runs under white-box attacks: errors, comparisons, sweeps, and transfer.

The commands evaluate, compare, sweep and transfer load runs and images with `open_jobs`, and write
results with `Job.record`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from fastiat.attack import Starts, attack_mode, pgd
from fastiat.attacks.starts import Norm
from fastiat.config import (
    CompareConfig,
    EvaluateConfig,
    MeasureConfig,
    SweepConfig,
    TransferConfig,
    WithAttacks,
)
from fastiat.engine.device import autocast, own_defaults, pick_device, pick_precision
from fastiat.measuring.autoattack import ATTACKS, autoattack
from fastiat.measuring.jobs import Job, class_names, open_jobs
from fastiat.measuring.mcnemar import Pair, pairs
from fastiat.measuring.one_pass import batches, fooled, title, within_memory
from fastiat.models import correct
from fastiat.runs.directory import Run
from fastiat.runs.results import Rate
from fastiat.system.errors import InputError, printable_lines
from fastiat.system.progress import Progress
from fastiat.system.settings import LARGEST, steps_of

UNITS = "error in %, ± 95 % interval"
HOLDOUT = "holdout_error_percent"
Key = tuple[str, float, int]
"""Split, eps and number of steps."""
Matrix = dict[str, dict[str, Rate]]
"""{target: {source of the examples: error rate of the target}}."""


def table(heading: str, columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    """Return a table as text: `heading`, the titles `columns`, and `rows`, {title: cells}."""
    first = max(map(len, rows)) + 2
    width = max(12, *(len(cell) + 2 for cells in (columns, *rows.values()) for cell in cells))
    lines = [heading, " " * first + "".join(f"{column:>{width}}" for column in columns)]
    for row, cells in rows.items():
        lines.append(f"{row:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def _unusual(config: MeasureConfig) -> str:
    """Return the settings that differ from the defaults, as text for the heading of a table."""
    loss = f", {config.attack_loss} loss" if config.attack_loss != "ce" else ""
    restarts = f", {config.restarts} restarts" if config.restarts > 1 else ""
    start = "" if config.random_start else ", no random start"
    seed = f", seed {config.seed}" if config.seed else ""
    images = ", ".join(filter(None, (config.dataset, config.data_dir)))
    return loss + restarts + start + seed + (f", images of {images}" if images else "")


@own_defaults()
def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Rate]]:
    """Measure every run of `config` under its attacks, and print a table for each run.

    Returns {run: {"split/attack": rate}}, for the attacks of `config` and "autoattack" if it is
    set; with `worst` the attacks are "none" and "worst". Results are added to the run's
    metrics.jsonl and evaluation.json. Raises `InputError` for runs or data that are missing or do
    not fit each other.
    """
    config.check()
    return {job.name: _evaluate(job, config) for job in open_jobs(config)}


def _evaluate(job: Job, config: EvaluateConfig) -> dict[str, Rate]:
    """Measure one run, print its table and return {"split/attack": rate}."""
    rates = {}
    for split in job.splits:
        with within_memory("evaluate", [job.name], job.batch_size):
            rates[split] = _evaluate_split(job, split, config)
    settings = f"{job.norm} eps {job.eps:.4g}, alpha {job.alpha:.4g}{_unusual(config)}"
    columns = [*map(title, next(iter(rates.values()))), "images"]
    rows = {
        split: [*map(str, found.values()), str(len(job.splits[split]))]
        for split, found in rates.items()
    }
    job.log_line(table(f"{job.name}: {UNITS}, {settings}", columns, rows))
    return {f"{split}/{attack}": rate for split in rates for attack, rate in rates[split].items()}


def _evaluate_split(job: Job, split: str, config: EvaluateConfig) -> dict[str, Rate]:
    """Measure one split, record the result of each attack, and return {attack: rate}."""
    if not config.worst:
        return {name: Rate.of(wrong) for name, wrong in _measure(job, split, config).items()}
    images, eps = job.splits[split], job.eps
    record = partial(job.record, "evaluation", split, eps=eps, started=time.monotonic())
    found = fooled(
        job.model, images, config.attacks, eps=eps, alpha=job.alpha, config=job.config, worst=True
    )
    rates = {"none": record("none", found["none"])}
    wrong, attacks = torch.stack(list(found.values())).any(0), tuple(found)
    if config.autoattack:
        # AutoAttack skips the images that are misclassified already.
        wrong = autoattack(job.model, images, eps=eps, config=job.config, skip=wrong).fooled
        attacks += ("autoattack",)
    rates["worst"] = record("worst", wrong, attacks=attacks)
    return rates


def _measure(job: Job, split: str, config: WithAttacks) -> dict[str, Tensor]:
    """Measure one split under each attack, and record the results.

    Returns {attack: which images are misclassified, (N,) bool}, with "autoattack" if it is set.
    """
    images, eps = job.splits[split], job.eps
    record = partial(job.record, split=split, eps=eps, started=time.monotonic())
    found = fooled(job.model, images, config.attacks, eps=eps, alpha=job.alpha, config=job.config)
    for name, wrong in found.items():
        record("evaluation", attack=name, wrong=wrong)
    if config.autoattack:
        outcome = autoattack(job.model, images, eps=eps, config=job.config)
        record(
            "autoattack", attack="autoattack", wrong=outcome.fooled, precision="fp32",
            attacks=ATTACKS, errors_after=outcome.errors_after, warnings=outcome.warnings,
        )  # fmt: skip
        found["autoattack"] = outcome.fooled
    return found


@dataclass(frozen=True)
class Comparison:
    """Several runs on the same images under the same attacks."""

    rates: dict[str, dict[str, Rate]]
    """{run: {attack: error rate}}, the most robust run first."""
    seconds: dict[str, float | None]
    """{run: seconds of its training}; None where they are not known."""
    attack: str
    """The attack of `pairs`."""
    pairs: list[Pair]
    """Every two of the runs."""


@own_defaults()
def compare(config: CompareConfig) -> dict[str, Comparison]:
    """Measure all runs of `config` on the same images; print a table and a sentence for each pair.

    Returns {split: comparison}. Results are recorded like those of `evaluate`. If AutoAttack is not
    measured, errors under it that all settings fit are taken from the runs' results. Raises
    `InputError` for runs that are missing, have different images or classes, or would be attacked
    with different settings.
    """
    config.check()
    jobs = open_jobs(config)
    for job in jobs:
        _check_same_images(jobs[0], job, "compare")
    _one_norm(jobs)
    _check_same_attack(jobs, config)
    seconds = {job.name: _training_seconds(job.run) for job in jobs}
    names = _short_names(list(seconds))
    attack = "autoattack" if config.autoattack else max(config.attacks, key=steps_of)
    found = {}
    for split in dict.fromkeys(config.splits):
        rates: dict[str, dict[str, Rate]] = {}
        wrong = {}
        for job in jobs:
            with within_memory("compare", seconds, job.batch_size):
                measured = _measure(job, split, config)
            wrong[job.name] = measured[attack]
            rates[job.name] = {name: Rate.of(which) for name, which in measured.items()}
            recorded = None if config.autoattack else job.recorded_autoattack(split)
            if recorded:
                rates[job.name]["autoattack"] = recorded
        known = all("autoattack" in of for of in rates.values())
        key = "autoattack" if known else attack
        ranked = dict(sorted(rates.items(), key=lambda item: item[1][key].errors))
        found[split] = Comparison(ranked, seconds, attack, pairs(wrong))
        text = _comparison_text(
            found[split], names, f"{split}, {_settings(jobs[0], split, config)}"
        )
        print(printable_lines(text), flush=True)
    return found


def _settings(job: Job, split: str, config: CompareConfig) -> str:
    """Return the images and the attack of a comparison as text for the heading of its table."""
    alpha = f", alpha {job.alpha:.4g}" if _has_steps(config) else ""
    images = f"{len(job.splits[split])} images"
    return f"{images}, {job.norm} eps {job.eps:.4g}{alpha}{_unusual(config)}"


def _comparison_text(found: Comparison, names: dict[str, str], heading: str) -> str:
    """Return a comparison as text: a table, and a sentence for each pair of runs."""
    attacks = list(dict.fromkeys(name for rates in found.rates.values() for name in rates))
    rows = {}
    for run, rates in found.rates.items():
        seconds = found.seconds[run]
        cells = [str(rates.get(attack, "")) for attack in attacks]
        rows[names[run]] = [*cells, "" if seconds is None else f"{seconds:.1f}"]
    columns = [*map(title, attacks), "training (s)"]
    lines = [table(f"{heading}: {UNITS}", columns, rows)]
    if len(found.pairs) > 1:
        lines.append(f"p-values of {len(found.pairs)} pairs, adjusted by Holm's method:")
    return "\n".join([*lines, *(pair.sentence(found.attack, names) for pair in found.pairs)])


def _training_seconds(run: Run | None) -> float | None:
    """Return the seconds of a run's epochs with their validation; None if they are not known."""
    rows = run.rows() if run else ()
    found = [row.get("seconds") for row in rows if row.get("kind") == "epoch"]
    seconds = [one for one in found if isinstance(one, int | float) and 0 <= one <= LARGEST]
    return sum(seconds) if seconds else None


def _has_steps(config: CompareConfig) -> bool:
    """Whether one of the attacks takes several steps, whose size then changes the result."""
    return any(steps_of(attack) > 1 for attack in config.attacks)


def _check_same_attack(jobs: list[Job], config: CompareConfig) -> None:
    """Raise `InputError` unless the attacks on all runs have the same eps and alpha."""
    first = jobs[0]
    for job in jobs:
        for flag in ("eps", "alpha") if _has_steps(config) else ("eps",):
            mine, others = getattr(first, flag), getattr(job, flag)
            # Defaults that are in proportion to --eps are rounded differently.
            if not math.isclose(mine, others):
                raise InputError(
                    f"{job.name} would be attacked with {flag} {others:.6g}, but {first.name} with "
                    f"{flag} {mine:.6g}: give one value for all runs with --{flag}"
                )


@own_defaults()
def sweep(config: SweepConfig) -> dict[str, dict[Key, Rate]]:
    """Measure every run of `config` at each eps and number of PGD steps, and print tables.

    Returns {run: {(split, eps, steps): rate}}. Results are recorded like those of `evaluate`. One
    pass measures all numbers of steps. The step size is the alpha of `config`, else the run's own
    alpha, at every radius. Raises `InputError` for runs or data that are missing or do not fit each
    other.
    """
    config.check()
    jobs = open_jobs(config)
    norm = _one_norm(jobs)
    radii, steps = config.radii(norm), tuple(dict.fromkeys(config.steps))
    attacks = [f"pgd-{count}" for count in steps]
    rates: dict[str, dict[Key, Rate]] = {}
    config = replace(config, norm=norm)
    for job in jobs:
        rates[job.name] = {}
        for split, eps in product(job.splits, radii):
            started = time.monotonic()
            with within_memory("sweep", [job.name], job.batch_size):
                found = fooled(
                    job.model, job.splits[split], attacks, eps=eps, alpha=job.alpha,
                    config=job.config,
                )  # fmt: skip
            for count, attack in zip(steps, attacks, strict=True):
                rates[job.name][split, eps, count] = job.record(
                    "sweep", split, attack, found[attack], eps=eps, started=started
                )
    # With several numbers of steps, print a table for every radius, else one table of all radii.
    for split in dict.fromkeys(config.splits):
        if len(steps) > 1:
            for eps in radii:
                heading = f"eps {eps:.4g}, PGD steps across"
                keys = {str(count): (split, eps, count) for count in steps}
                print(_sweep_table(rates, config, heading, keys), flush=True)
        else:
            heading = f"PGD-{steps[0]}, eps across"
            keys = {f"{eps:g}": (split, eps, steps[0]) for eps in radii}
            print(_sweep_table(rates, config, heading, keys), flush=True)
    return rates


def _sweep_table(
    rates: dict[str, dict[Key, Rate]], config: SweepConfig, heading: str, keys: dict[str, Key]
) -> str:
    """Return a table with a row for every run and a column for every entry of `keys`.

    `keys` has the title of each column and its (split, eps, steps), all of one split.
    """
    split = next(iter(keys.values()))[0]
    rows = {name: [str(found[key]) for key in keys.values()] for name, found in rates.items()}
    # Runs on different data sets may have different numbers of images.
    counts = {found[key].n for found in rates.values() for key in keys.values()}
    n = " or ".join(map(str, sorted(counts)))
    heading = f"{split}, {n} images, {config.norm} {heading}{_own_alpha(config)}"
    return table(f"{heading}{_unusual(config)}: {UNITS}", list(keys), rows)


def _own_alpha(config: MeasureConfig) -> str:
    """Return the configuration's alpha as text for a heading; empty if every run uses its own."""
    return "" if config.alpha is None else f", alpha {config.alpha:.4g}"


@own_defaults()
def transfer(config: TransferConfig) -> dict[tuple[str, float], Matrix]:
    """Classify PGD examples of every run of `config` by every run; print a matrix for each eps.

    Returns {(split, eps): {target: {source: rate}}}; the examples are made on the source. Results
    are recorded in the target's run, like those of `evaluate`. The step size is the alpha of
    `config`, else the source's own alpha. Raises `InputError` for runs that are missing or
    unfinished, or whose images or classes differ from those of the first run.
    """
    config.check()
    jobs = open_jobs(config)
    for job in jobs:
        _check_finished(job)
        _check_same_images(jobs[0], job, "transfer")
    norm = _one_norm(jobs)
    config = replace(config, norm=norm)
    radii = config.eps or ((0.01, 0.02, 0.04) if norm == "linf" else (0.25, 0.5, 1.0))
    matrices = {}
    for split in config.splits:
        for eps in dict.fromkeys(radii):
            matrix: Matrix = {job.name: {} for job in jobs}
            for source in jobs:
                for target, rate in _attack(source, jobs, split, eps, config):
                    matrix[target][source.name] = rate
            matrices[split, eps] = matrix
            print(_transfer_table(matrix, config, split, eps), flush=True)
    return matrices


def _attack(
    source: Job, targets: list[Job], split: str, eps: float, config: TransferConfig
) -> Iterator[tuple[str, Rate]]:
    """Make examples on `source`; record and yield every target's name and error rate on them."""
    device, started = pick_device(config.device), time.monotonic()
    precision = pick_precision(config.precision, device)
    # Every target classifies the whole batch, so the smallest batch size of the targets is used.
    size = min(job.batch_size for job in targets)
    starts = Starts(config.seed, device)
    attack = partial(
        pgd, source.model, eps=eps, alpha=source.alpha, steps=config.steps, norm=source.norm,
        loss=config.attack_loss, restarts=config.restarts, random_start=config.random_start,
        generator=starts,
    )  # fmt: skip
    images = source.splits[split]
    wrong: dict[str, list[Tensor]] = {job.name: [] for job in targets}
    text = f"{Path(source.name).name}'s examples, eps {eps:.4g}"
    with within_memory("transfer", wrong, size), Progress(text, len(images)) as progress:
        for x, y in batches(images, size, device, starts):
            with autocast(device, precision):
                x_adv = attack(x, y)
            for target in targets:
                with torch.no_grad(), attack_mode(target.model, "eval"):
                    wrong[target.name].append(~correct(target.model(x_adv), y))
            progress.advance(len(y))
    fields = {
        "source": Path(source.name).resolve().name,
        "source_model": source.fingerprint,
        "alpha": source.alpha,
        "batch_size": size,
    }
    for target in targets:
        found, name = torch.cat(wrong[target.name]), f"pgd-{config.steps}"
        rate = target.record("transfer", split, name, found, eps=eps, started=started, **fields)
        yield target.name, rate


def _one_norm(jobs: list[Job]) -> Norm:
    """Return the norm of the eps ball of all runs; raise `InputError` if they differ."""
    for job in jobs:
        if job.norm != jobs[0].norm:
            raise InputError(
                f"{job.name} was trained in the {job.norm} ball, but {jobs[0].name} in the "
                f"{jobs[0].norm} ball: give the norm to measure in with --norm"
            )
    return jobs[0].norm


def _check_finished(job: Job) -> None:
    """Raise `InputError` for a run that `fastiat train --resume` would train further."""
    if job.run is None:
        return
    config = job.run.config
    rows = [row for row in job.run.rows() if isinstance(row.get("epoch"), int)]
    epoch = max((row["epoch"] for row in rows), default=0)
    held_out = {
        row["epoch"]: row[HOLDOUT] for row in rows if isinstance(row.get(HOLDOUT), int | float)
    }
    best = min(held_out, key=lambda epoch: (held_out[epoch], epoch), default=epoch)
    stopped_early = config.patience and epoch - best >= config.patience
    if epoch < config.epochs and not stopped_early:
        raise InputError(
            f"{job.name} is unfinished, epoch {epoch} of {config.epochs}: "
            f"finish the run with fastiat train --resume --out {job.name}"
        )


def _check_same_images(first: Job, other: Job, command: str) -> None:
    """Raise `InputError` unless two runs have the same data set, classes and images.

    `command` is the command that needs this, for the message.
    """
    if other.dataset.name != first.dataset.name:
        raise InputError(
            f"{other.name} is a run on {other.dataset.name}, but {first.name} is a run on "
            f"{first.dataset.name}: {command} needs runs on one data set"
        )
    if other.card.classes != first.card.classes:
        raise InputError(
            f"{other.name} was trained on {class_names(other.card.classes)}, but {first.name} on "
            f"{class_names(first.card.classes)}: {command} needs runs with the same classes"
        )
    if other.card.image_size != first.card.image_size:
        raise InputError(
            f"{other.name} takes images of side {other.card.image_size}, but {first.name} images "
            f"of side {first.card.image_size}: {command} needs runs on images of one size"
        )
    if other.data != first.data:
        raise InputError(
            f"{other.name} is a run on other images of {other.dataset.name} than {first.name}: "
            f"name the images to attack with --dataset and --data-dir"
        )


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Map each path of a run to its last part, or to itself if last parts are the same."""
    short = [Path(name).resolve().name for name in names]
    return dict(zip(names, short if len(set(short)) == len(short) else names, strict=True))


def _transfer_table(matrix: Matrix, config: TransferConfig, split: str, eps: float) -> str:
    """Return a matrix as text, under short names of the runs if these differ."""
    names = _short_names(list(matrix))
    rows = {names[target]: list(map(str, row.values())) for target, row in matrix.items()}
    n = next(iter(next(iter(matrix.values())).values())).n
    attack = f"{config.norm} eps {eps:.4g}, PGD-{config.steps}{_own_alpha(config)}"
    heading = (
        f"{split}, {n} images, {attack}{_unusual(config)}: {UNITS}\n"
        "target down, source of the examples across"
    )
    return table(heading, list(names.values()), rows)
