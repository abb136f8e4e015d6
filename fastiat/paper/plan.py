"""What a table of the paper needs: its trainings, each a run directory, and its measurements."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastiat.config import ReproduceConfig, TrainConfig, paper
from fastiat.models import DEFAULT_WIDTH
from fastiat.paper import compare as tables
from fastiat.paper.estimate import images_of
from fastiat.paper.published import ROWS, Cell, table
from fastiat.runs.directory import CONFIG, MODEL, STATE, Run, check_free, default_out
from fastiat.system.errors import Damaged, InputError
from fastiat.system.settings import flag_of

# What a finished run may have otherwise and still be the row: where it is and what computed it.
FREE = {
    *("preset", "out", "data_dir", "resume", "eval_limit"),
    *("device", "engine", "precision", "loader", "checkpoint_every", "on_nan"),
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
    data: str | None = None
    """Fingerprint of the images that it was trained on, None before it is begun."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.config.out or "")

    @property
    def title(self) -> str:
        """The row and the seed, for a line of text."""
        return f"{ROWS[self.row].title}, seed {self.config.seed}"

    def results(self) -> list[dict[str, Any]]:
        """Return what is measured of the run, [] where there is none."""
        return tables.results(Run.open(self.path)) if (self.path / CONFIG).exists() else []


class Plan:
    """The jobs of a table or of Figure 1, and what is still to be measured of them.

    Raises `InputError` for data that are not there, and for a directory that holds another run.
    """

    def __init__(self, config: ReproduceConfig) -> None:
        config.check()
        self.config = config
        self.out = Path(config.out)
        self.figure = config.target == "figure1"
        self.recipe = FIGURE
        if not self.figure:
            self.table = table(config.target)
            self.recipe = replace(paper(), arch=self.table.arch, dataset=self.table.dataset)
        self.seeds = config.seeds or ((0, 1, 2) if self.figure else (0,))
        self.used = self._used()
        self.used.check()
        self.images = images_of(self.used.dataset, config.data_dir)
        if self.images.train < self.used.batch_size:
            raise InputError(
                f"{self.used.dataset} has {self.images.train} training images, and the paper's "
                f"recipe takes {self.used.batch_size} at a time: give it more images"
            )
        if not self.figure and not self.splits:
            raise InputError(
                f"{config.target} is measured on the {' and '.join(self._all_splits)} images: "
                f"name these with --splits, or leave it out"
            )
        self.jobs = self._jobs()

    def _used(self) -> TrainConfig:
        """Return the recipe with what was asked for instead."""
        names = ("epochs", "width", "arch", "dataset", "lr", "data_dir", "device", "precision")
        asked = {name: getattr(self.config, name) for name in names}
        given = {name: value for name, value in asked.items() if value is not None}
        return replace(self.recipe, **given, eval_limit=self.config.limit)

    def _jobs(self) -> list[Job]:
        rows = FIGURE_ROWS if self.figure else self.table.rows
        jobs = []
        for row in (row for row in rows if ROWS[row].adv is not None):
            for seed in self.seeds:
                flags: Any = {"adv": ROWS[row].adv, "mix": ROWS[row].mix, "seed": seed}
                wanted = replace(self.used, **flags)
                out = self.out / default_out(wanted).name
                jobs.append(_job(row, replace(wanted, out=str(out))))
        return jobs

    @property
    def splits(self) -> tuple[str, ...]:
        """The images that are measured: of those that the paper's table has, the ones asked for."""
        return tuple(split for split in self._all_splits if split in self.config.splits)

    @cached_property
    def _all_splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.split for cell in self.table.cells))

    def count(self, split: str) -> int:
        """Return how many images of a split are measured."""
        there: int = getattr(self.images, split)
        return min(self.config.limit or there, there)

    def cells(self, row: str) -> list[Cell]:
        """Return the paper's figures of a row on the images that are measured."""
        cells = () if self.figure else self.table.cells
        return [cell for cell in cells if cell.row == row and cell.split in self.splits]

    def source(self, cell: Cell, job: Job) -> Path:
        """Return the run of a job's seed that a cell's examples are crafted on."""
        wanted = cell.source, job.config.seed
        return next(other.path for other in self.jobs if (other.row, other.config.seed) == wanted)

    def result(self, cell: Cell, job: Job, found: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the measurement of a cell among those of a job's run, or None."""
        return tables.find(
            cell,
            found,
            n=self.count(cell.split),
            alpha=job.config.alpha,
            dataset=job.config.dataset,
            data=job.data,
            precision=self.config.precision,
            run=job.path,
            source=self.source(cell, job),
        )

    def missing(self, job: Job) -> list[Cell]:
        """Return the cells that a job's run is still to be measured for."""
        found = job.results()
        return [cell for cell in self.cells(job.row) if self.result(cell, job, found) is None]

    def comparison(self) -> tables.Comparison:
        """Put what is measured so far beside the paper's table."""
        found = {job.path: job.results() for job in self.jobs}
        lines = []
        for row in self.table.rows:
            jobs = [job for job in self.jobs if job.row == row]
            for cell in self.cells(row):
                measured = [self.result(cell, job, found[job.path]) for job in jobs]
                lines.append(tables.line(cell, measured))
        limits = {split: (self.count(split), getattr(self.images, split)) for split in self.splits}
        left_out = [split for split in self._all_splits if split not in self.splits]
        return tables.Comparison(
            self.table.name,
            self.table.title,
            f"Error in %, difference in points. {self.caption(limits, left_out)}",
            self.command(),
            tuple(lines),
        )

    def caption(
        self, limits: dict[str, tuple[int, int]] | None = None, left_out: list[str] | None = None
    ) -> str:
        """Say what was scaled down from the recipe, and with which seeds.

        `limits` has for every split the images measured and all there are; `left_out` the splits
        of the paper that are not measured.
        """
        used, recipe, width = self.used, self.recipe, DEFAULT_WIDTH[self.used.arch]
        parts = []
        for name, title in {
            "dataset": "data set",
            "arch": "network",
            "epochs": "epochs",
            "lr": "learning rate",
        }.items():
            mine, theirs = getattr(used, name), getattr(recipe, name)
            if mine != theirs:
                parts.append(f"{title} {mine} instead of {theirs}")
        if used.width not in (None, width):
            parts.append(f"width {used.width} instead of {width}")
        names = {"test": "test images", "train": "training images"}
        for split, (n, of) in (limits or {}).items():
            if n < of:
                parts.append(f"measured on {n} of the {of} {names[split]}")
        parts += [f"not measured on the {names[split]}" for split in left_out or ()]
        seeds = ", ".join(map(str, self.seeds))
        seeded = f"One seed ({seeds})" if len(self.seeds) == 1 else f"Mean over seeds {seeds}"
        scaled = f"Scaled: {'; '.join(parts)}" if parts else "At the scale of the paper's recipe"
        return f"{seeded}. {scaled}."

    def command(self) -> str:
        """Return the command line that makes, or completes, this table."""
        config = replace(self.config, dry_run=False)
        return tables.command_of("reproduce", config, ReproduceConfig(target=self.config.target))


def _job(row: str, wanted: TrainConfig) -> Job:
    """Look how far the run of a row is; raise `InputError` if it is another training."""
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
    last = 0
    for line in run.rows():
        if line.get("kind") == "epoch" and isinstance(line.get("epoch"), int):
            last = line["epoch"]
    complete = last >= wanted.epochs and (path / MODEL).exists()
    if run.has_state():
        try:
            step, epochs, mark = run.load_state(_position)
        except InputError:
            # Only a resume needs the checkpoint, and an earlier version wrote it otherwise.
            if complete:
                return Job(row, wanted, 0, True)
            raise
        return Job(row, wanted, step, epochs >= wanted.epochs, mark)
    if (path / MODEL).exists() and not complete:
        raise InputError(
            f"{path} stopped after epoch {last} and has lost its {STATE}, so that it cannot go on: "
            f"put that back, or move the run away"
        )
    return Job(row, wanted, 0, complete)


def _position(state: dict[str, Any]) -> tuple[int, int, str]:
    """Return the updates that are done, the epochs that are measured, and the images' mark."""
    step, epochs, mark = state.get("step"), state.get("validated_epochs"), state.get("data")
    if not isinstance(step, int) or not isinstance(epochs, int) or not isinstance(mark, str):
        raise Damaged("it is not a checkpoint of fastiat")
    return step, epochs, mark


def _setting(config: TrainConfig, name: str) -> Any:
    if name == "width" and config.width is None:
        return DEFAULT_WIDTH[config.arch]
    return getattr(config, name)
