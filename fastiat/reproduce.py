"""Reproducing: a table of the paper from its trainings to the comparison, as far as it is missing.

Every training is a run directory under --out, named as `fastiat train` names it
(`run.default_out`): DATASET-ARCH-ADV-MIX-sSEED. So Tables 3, 5, 6 and 7 share theirs.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastiat import tables
from fastiat.config import (
    DATASET_DEFAULTS,
    EvaluateConfig,
    ReportConfig,
    ReproduceConfig,
    TrainConfig,
    flag_of,
    paper,
)
from fastiat.errors import InputError
from fastiat.estimate import Images, Speed, images_of, speed
from fastiat.evaluate import evaluate
from fastiat.models import DEFAULT_WIDTH
from fastiat.paper import ROWS, Cell, Table, table
from fastiat.progress import duration
from fastiat.report import report
from fastiat.run import CONFIG, LOG, METRICS, MODEL, STATE, Run, check_free, default_out
from fastiat.train import Interrupted, train

# What a finished run may have otherwise and still be the row: where it is and what computed it.
FREE = {
    *("preset", "out", "data_dir", "resume", "eval_limit"),
    *("device", "engine", "precision", "loader"),
}

# The paper says of Figure 1's networks: six layers of 512 units, Fashion-MNIST. The rest is ours.
FIGURE_ROWS = ("baseline", "pgd7", "iat_mixup", "iat_manifold_mixup")
FIGURE = replace(
    paper(),
    arch="mlp6",
    dataset="fashion-mnist",
    epochs=50,
    lr=0.01,
    weight_decay=0.0,
    eps=0.1,
    alpha=0.025,
    pad=0,
)


@dataclass(frozen=True)
class Job:
    """A row of the table with one seed: the run that it needs, and how far that is."""

    row: str
    config: TrainConfig
    step: int
    """Updates that are done."""
    finished: bool

    @property
    def path(self) -> Path:
        """The run directory."""
        assert self.config.out
        return Path(self.config.out)


def reproduce(config: ReproduceConfig) -> None:
    """Train and measure what is missing, write the comparison and the report, and print the table.

    Raises `InputError` before anything is written for settings, data or runs that do not fit, and
    `Interrupted` when a signal ends it; the same command goes on from there.
    """
    config.check()
    images = images_of(_used(config).dataset, config.data_dir)
    jobs = _jobs(config)
    if config.dry_run:
        print(_listing(config, jobs, images))
        return
    try:
        _work(config, jobs, images)
    except (Interrupted, KeyboardInterrupt) as error:
        number = getattr(error, "signum", signal.SIGINT)
        raise Interrupted(number, f"stopped; go on with: {_command(config)}") from None
    report(ReportConfig(dir=config.out))


def _work(config: ReproduceConfig, jobs: list[Job], images: Images) -> None:
    for number, job in enumerate(jobs, 1):
        what = "trained already" if job.finished else "training"
        print(f"{config.target}, {number} of {len(jobs)}: {_title(job)}: {what}", flush=True)
        _train(job)
        if config.target != "figure1":
            _measure(config, job, images)
            _compare(config, jobs, images).write(Path(config.out))
    if config.target == "figure1":
        _figure(config, jobs)
        return
    if config.target == "table5":
        _transfer(config, jobs, images)
    comparison = _compare(config, jobs, images)
    comparison.write(Path(config.out))
    print(comparison.markdown())


def _recipe(config: ReproduceConfig) -> TrainConfig:
    """Return how the paper trains the networks of the table, whatever the row."""
    if config.target == "figure1":
        return FIGURE
    of = table(config.target)
    return replace(paper(), arch=of.arch, dataset=of.dataset)


def _used(config: ReproduceConfig) -> TrainConfig:
    """Return the recipe with what was asked for instead."""
    recipe = _recipe(config)
    names = ("epochs", "width", "arch", "dataset", "lr", "data_dir", "device", "precision")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    own = {} if config.target == "figure1" else DATASET_DEFAULTS.get(given.get("dataset", ""), {})
    return replace(recipe, **{**own, **given}, eval_limit=config.limit)


def _seeds(config: ReproduceConfig) -> tuple[int, ...]:
    return config.seeds or ((0, 1, 2) if config.target == "figure1" else (0,))


def _rows(config: ReproduceConfig) -> tuple[str, ...]:
    """Return the rows that are trained."""
    rows = FIGURE_ROWS if config.target == "figure1" else table(config.target).rows
    return tuple(row for row in rows if ROWS[row].adv is not None)


def _jobs(config: ReproduceConfig) -> list[Job]:
    """Return a job for every row and seed; raise `InputError` for a run that is another's."""
    jobs = []
    for row in _rows(config):
        for seed in _seeds(config):
            of: Any = {"adv": ROWS[row].adv, "mix": ROWS[row].mix}
            wanted = replace(_used(config), **of, seed=seed)
            path = Path(config.out) / default_out(wanted).name
            jobs.append(_job(row, replace(wanted, out=str(path))))
            jobs[-1].config.check()
    return jobs


def _job(row: str, wanted: TrainConfig) -> Job:
    path = Path(wanted.out or "")
    if not (path / CONFIG).exists():
        check_free(path)
        return Job(row, wanted, 0, False)
    run = Run.open(path)
    for field in fields(TrainConfig):
        mine, theirs = _setting(wanted, field.name), _setting(run.config, field.name)
        if field.name not in FREE and mine != theirs:
            raise InputError(
                f"{path} was trained with {flag_of(field.name)} {theirs}, not {mine}: "
                f"ask for that, move the run away, or choose another --out"
            )
    if (path / STATE).exists():
        state = run.load_state()
        step, epochs = state.get("step"), state.get("judged")
        if not isinstance(step, int) or not isinstance(epochs, int):
            raise InputError(f"{path / STATE} is not a checkpoint of fastiat: move the run away")
        return Job(row, wanted, step, epochs >= wanted.epochs)
    last = max((row["epoch"] for row in run.rows() if row.get("kind") == "epoch"), default=0)
    if (path / MODEL).exists() and last < wanted.epochs:
        raise InputError(
            f"{path} stopped after epoch {last} and has lost its {STATE}, so that it cannot go on: "
            f"put that back, or move the run away"
        )
    return Job(row, wanted, 0, last >= wanted.epochs)


def _setting(config: TrainConfig, name: str) -> Any:
    if name == "width" and config.width is None:
        return DEFAULT_WIDTH[config.arch]
    return getattr(config, name)


def _train(job: Job) -> None:
    """Train what a job lacks, from its checkpoint where it has one."""
    if job.finished:
        return
    if (job.path / STATE).exists():
        own = Run.open(job.path).config
        data_dir = job.config.data_dir or own.data_dir
        train(replace(own, out=job.config.out, data_dir=data_dir, resume=True))
        return
    # Killed before its first checkpoint: nothing in it is worth keeping.
    for name in (CONFIG, METRICS, LOG, "events.out.tfevents.*"):
        for file in job.path.glob(name):
            file.unlink()
    train(job.config)


def _measure(config: ReproduceConfig, job: Job, images: Images) -> None:
    """Measure the figures of a run that are missing, those of one eps and split at a time."""
    for (split, eps), attacks in _missing(config, job, images).items():
        evaluate(
            EvaluateConfig(
                runs=(str(job.path),),
                attacks=attacks,
                splits=(split,),
                limit=config.limit,
                eps=eps,
                data_dir=config.data_dir,
                device=config.device,
                precision=config.precision,
            )
        )
    if _missing(config, job, images):
        raise InputError(f"{job.path} does not keep what is measured: check its permissions")


def _missing(
    config: ReproduceConfig, job: Job, images: Images
) -> dict[tuple[str, float], tuple[str, ...]]:
    """Return the attacks that a run is still to be measured under: {(split, eps): attacks}."""
    found = tables.results(Run.open(job.path)) if (job.path / CONFIG).exists() else []
    groups: dict[tuple[str, float], tuple[str, ...]] = {}
    for cell in _cells(config, job.row):
        if cell.source == cell.row and not _find(config, cell, job, found, images):
            key = cell.split, cell.eps or job.config.eps
            groups[key] = (*groups.get(key, ()), cell.attack)
    return groups


def _cells(config: ReproduceConfig, row: str) -> list[Cell]:
    """Return the figures of a row on the images that are measured."""
    if config.target == "figure1":
        return []
    return [
        cell
        for cell in table(config.target).cells
        if cell.row == row and (cell.split in config.splits or len(_splits(config)) == 1)
    ]


def _splits(config: ReproduceConfig) -> tuple[str, ...]:
    """Return the images that the paper's table is measured on."""
    return tuple(dict.fromkeys(cell.split for cell in table(config.target).cells))


def _find(
    config: ReproduceConfig,
    cell: Cell,
    job: Job,
    found: list[dict[str, Any]],
    images: Images,
    source: Path | None = None,
) -> dict[str, Any] | None:
    n = _count(config, images, cell.split)
    return tables.find(cell, found, n, job.config.alpha, source)


def _count(config: ReproduceConfig, images: Images, split: str) -> int:
    """Return how many images of a split are measured."""
    there: int = getattr(images, split)
    return min(config.limit or there, there)


def _compare(config: ReproduceConfig, jobs: list[Job], images: Images) -> tables.Comparison:
    """Put what is measured so far beside the paper's table."""
    of = table(config.target)
    found = {job.path: tables.results(Run.open(job.path)) for job in jobs if _exists(job)}
    lines = []
    for row in of.rows:
        mine = [job for job in jobs if job.row == row]
        for cell in _cells(config, row):
            lines.append(
                tables.line(cell, [_result(config, cell, job, jobs, found, images) for job in mine])
            )
    splits = _splits(config)
    measured = [split for split in splits if split in config.splits or len(splits) == 1]
    limits = {split: (_count(config, images, split), getattr(images, split)) for split in measured}
    caption = tables.caption(
        _used(config),
        _recipe(config),
        seeds=_seeds(config),
        limits=limits,
        left_out=[split for split in splits if split not in measured],
    )
    return tables.Comparison(of.name, of.title, caption, _command(config), tuple(lines))


def _result(
    config: ReproduceConfig,
    cell: Cell,
    job: Job,
    jobs: list[Job],
    found: dict[Path, list[dict[str, Any]]],
    images: Images,
) -> dict[str, Any] | None:
    """Return a run's measurement of a cell, its examples crafted on the cell's source."""
    source = None
    if cell.source != cell.row:
        source = next(
            other.path
            for other in jobs
            if (other.row, other.config.seed) == (cell.source, job.config.seed)
        )
        if not (source / MODEL).exists():
            return None
    return _find(config, cell, job, found.get(job.path, []), images, source)


def _exists(job: Job) -> bool:
    return (job.path / CONFIG).exists()


def _title(job: Job) -> str:
    return f"{ROWS[job.row].title}, seed {job.config.seed}, {job.path}"


def _command(config: ReproduceConfig) -> str:
    return tables.command_of(
        "reproduce", replace(config, dry_run=False), ReproduceConfig(target=config.target)
    )


def _listing(config: ReproduceConfig, jobs: list[Job], images: Images) -> str:
    """Return the runs and the times that they would take, measured on a few of their updates."""
    speeds: dict[tuple[str, str], Speed] = {}
    lines, total = [], 0.0
    for job in jobs:
        seconds, what = 0.0, "done"
        measurements = [
            # PGD with fewer steps comes along with the longest.
            (attack, _count(config, images, split))
            for (split, _), attacks in _missing(config, job, images).items()
            for attack in _longest(attacks)
        ]
        if not job.finished or measurements:
            kind = job.config.adv, job.config.mix
            if kind not in speeds:
                speeds[kind] = speed(job.config, images)
            seconds = speeds[kind].measuring(measurements)
        if not job.finished:
            seconds += speeds[kind].training(job.config, images, job.step)
            epoch = job.step // (images.train // job.config.batch_size)
            what = f"resume after epoch {epoch}" if job.step else "train"
            what += f", {job.config.epochs} epochs"
        elif measurements:
            what = "measure"
        total += seconds
        lines.append((str(job.path), ROWS[job.row].title, what, duration(seconds)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join([*rows, f"in all about {duration(total)}; nothing was trained or written"])
