"""Reproduce a table of the paper: run the missing trainings and measurements, then compare.

Every training is a run directory under --out, named as `fastiat train` names it
(`runs.directory.default_out`): DATASET-ARCH-ADV-MIX-sSEED. Tables 3, 5, 6 and 7 therefore share
their runs. A run that was trained elsewhere with the same settings is used if it has that name.
"""

import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastiat.config import (
    EvaluateConfig,
    ReportConfig,
    ReproduceConfig,
    SweepConfig,
    TransferConfig,
)
from fastiat.engine.device import own_defaults
from fastiat.evaluate import evaluate, sweep, transfer
from fastiat.measuring.norms import NORMS, WeightNorms, weight_norms
from fastiat.measuring.rows import write_rows
from fastiat.page import figure1
from fastiat.paper.estimate import Speed, speed
from fastiat.paper.plan import Job, Plan
from fastiat.paper.published import ROWS, TRAINED, Cell
from fastiat.report import report
from fastiat.runs.directory import CONFIG, Run, load
from fastiat.system.errors import InputError
from fastiat.system.progress import duration
from fastiat.system.settings import steps_of
from fastiat.system.signals import TrainingInterrupt
from fastiat.system.tables import aligned
from fastiat.train import train


@own_defaults()
def reproduce(config: ReproduceConfig) -> None:
    """Train and measure the missing runs, write the comparison and the report, print the table.

    Raises `InputError`, before anything is written, if settings, data or runs do not fit. Raises
    `TrainingInterrupt` if a signal arrives; the same command continues from there.
    """
    plan = Plan(config)
    if config.dry_run:
        print(listing(plan))
        return
    try:
        _work(plan)
    except (TrainingInterrupt, KeyboardInterrupt) as error:
        number = getattr(error, "signum", int(signal.SIGINT))
        raise TrainingInterrupt(number, f"stopped; go on with: {plan.command()}") from None
    report(ReportConfig(dir=config.out))


def _work(plan: Plan) -> None:
    """Train and measure every run; after each of them, write the table as measured so far."""
    for number, job in enumerate(plan.jobs, 1):
        what = "trained already" if job.finished else "training"
        place = f"{plan.config.target}, {number} of {len(plan.jobs)}"
        print(f"{place}: {job.title}, {what}: {job.path}", flush=True)
        _train(job)
        if not plan.figure:
            _measure(plan, job)
            plan.comparison().write(plan.out)
    if plan.figure:
        print(_figure(plan), flush=True)
        return
    _transfer(plan)
    comparison = plan.comparison()
    comparison.write(plan.out)
    print(comparison.markdown(), flush=True)


def _train(job: Job) -> None:
    """Train the remaining epochs of a job, from its checkpoint if it has one."""
    if job.finished:
        return
    if (job.path / CONFIG).exists():
        own = Run.open(job.path).config
        data_dir = job.config.data_dir or own.data_dir
        train(replace(own, out=job.config.out, data_dir=data_dir, resume=True))
        return
    train(job.config)


def _measure(plan: Plan, job: Job) -> None:
    """Measure the missing white-box errors of a run; `_transfer` measures those of Table 5."""
    missing, how = plan.missing(job), _how(plan, [job])
    if not missing or plan.config.target == "table5":
        return
    if plan.config.target in ("table6", "table7"):
        eps = tuple(dict.fromkeys(cell.eps for cell in missing))
        steps = tuple(dict.fromkeys(steps_of(cell.attack) for cell in missing))
        sweep(SweepConfig(**how, eps=eps, steps=steps))
    else:
        for split in plan.splits:
            attacks = tuple(cell.attack for cell in missing if cell.split == split)
            if attacks:
                evaluate(EvaluateConfig(**how, splits=(split,), attacks=attacks))
    _check_kept(plan, [job])


def _transfer(plan: Plan) -> None:
    """Measure the missing errors of Table 5, for the runs of one seed at a time."""
    for seed in plan.seeds if plan.config.target == "table5" else ():
        jobs = [job for job in plan.jobs if job.config.seed == seed]
        eps = {cell.eps for job in jobs for cell in plan.missing(job)}
        if eps:
            transfer(TransferConfig(**_how(plan, jobs), eps=tuple(sorted(eps))))
        _check_kept(plan, jobs)


def _how(plan: Plan, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the settings that all measurements share."""
    names = ("limit", "data_dir", "device", "precision")
    return {
        "runs": tuple(str(job.path) for job in jobs),
        **{name: getattr(plan.config, name) for name in names},
    }


def _check_kept(plan: Plan, jobs: Sequence[Job]) -> None:
    """Raise `InputError` if a measurement that was just made is not among a run's results."""
    for job in jobs:
        if plan.missing(job):
            raise InputError(f"{job.path} does not store its measurements: check its permissions")


def _figure(plan: Plan) -> str:
    """Compute and store the norms of every run, write Figure 1, and return it as Markdown."""
    trainings: dict[str, list[list[WeightNorms]]] = {}
    for job in plan.jobs:
        layers = weight_norms(load(job.path))
        write_rows(job.path / NORMS, layers)
        trainings.setdefault(ROWS[job.row].title, []).append(layers)
    colours = {ROWS[row].title: number for number, row in enumerate(TRAINED)}
    caption = f"{plan.caption()} Made by `{plan.command()}`."
    return figure1.save(plan.out, trainings, colours, caption)


def listing(plan: Plan) -> str:
    """Return a line for each run: its progress, and an estimate of its remaining time here."""
    speeds: dict[tuple[str, str], Speed] = {}
    per_epoch = plan.images.train // plan.used.batch_size
    lines, total = [], 0.0
    for job in plan.jobs:
        missing, seconds, what = plan.missing(job), 0.0, "done"
        kind = job.config.adv, job.config.mix
        if missing:
            what = f"trained, to measure {len(missing)} figures"
        if not job.finished:
            done = f"resume after epoch {job.step // per_epoch}" if job.step else "train"
            what = f"to {done}, {job.config.epochs} epochs"
        if missing or not job.finished:
            if kind not in speeds:
                speeds[kind] = speed(job.config, plan.images)
            seconds = speeds[kind].measuring(_passes(plan, missing))
        if not job.finished:
            seconds += speeds[kind].training(job.config, plan.images, job.step)
        total += seconds
        lines.append((str(job.path), job.title, what, duration(seconds)))
    rows = ["  ".join(row).rstrip() for row in aligned(lines, left=4)]
    scale = "" if plan.figure else f" ({plan.comparison().caption})"
    rows.append(f"in all about {duration(total)}{scale}; nothing was trained or written")
    return "\n".join(rows)


def _passes(plan: Plan, cells: list[Cell]) -> list[tuple[str, int]]:
    """Return the attacks to run, and on how many images, to measure these cells.

    At one eps, the pass of PGD with the most steps also gives the errors after fewer steps.
    """
    longest: dict[tuple[object, ...], str] = {}
    for cell in cells:
        key = cell.split, cell.source, cell.eps, cell.attack.startswith("pgd") or cell.attack
        if key not in longest or steps_of(longest[key]) < steps_of(cell.attack):
            longest[key] = cell.attack
    return [(attack, plan.count(str(key[0]))) for key, attack in longest.items()]
