"""What a table of the paper needs: its trainings, each a run directory, and its measurements."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastiat import data
from fastiat.config import ReproduceConfig, TrainConfig, paper
from fastiat.images import downloads
from fastiat.models import DEFAULT_WIDTH
from fastiat.paper.compare import Comparison, command_of, find, line
from fastiat.paper.estimate import images_of
from fastiat.paper.published import ROWS, TRAINED, Cell, table
from fastiat.runs.directory import CONFIG, MODEL, STATE, Run, check_free, default_out
from fastiat.runs.results import read_results
from fastiat.system.errors import DamagedError, InputError
from fastiat.system.settings import flag_of

# A run may differ from the row in these settings: they say where it is and what computes it.
FREE = {
    *("preset", "out", "data_dir", "resume", "eval_limit"),
    *("device", "engine", "precision", "loader", "checkpoint_every", "on_nan"),
}

# The paper says of Figure 1's networks: six layers of 512 units, Fashion-MNIST. We chose the rest.
FIGURE_ROWS: tuple[str, ...] = ("baseline", "pgd7", "iat_mixup", "iat_manifold_mixup")
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
IMAGES = {"test": "test images", "train": "training images"}


@dataclass(frozen=True)
class Job:
    """A row of the table with one seed: its run, and the progress of that run."""

    row: str
    config: TrainConfig
    step: int
    """Number of finished updates."""
    finished: bool
    data: str | None = None
    """Fingerprint of the images that it was trained on, None before training has begun."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.config.out or "")

    @property
    def title(self) -> str:
        """The row and the seed, as text."""
        return f"{ROWS[self.row].title}, seed {self.config.seed}"


class Plan:
    """The jobs of a table or of Figure 1, and their missing measurements.

    Raises `InputError` if data are missing, or if a directory holds another run.
    """

    def __init__(self, config: ReproduceConfig) -> None:
        config.check()
        self.config = config
        self.out = Path(config.out)
        self.figure = config.target == "figure1"
        self.table = None if self.figure else table(config.target)
        self.recipe, rows = FIGURE, FIGURE_ROWS
        if self.table:
            self.recipe = replace(paper(), arch=self.table.arch, dataset=self.table.dataset)
            rows = tuple(row for row in self.table.rows if row in TRAINED)
        self.seeds = config.seeds or ((0, 1, 2) if self.figure else (0,))
        names = ("epochs", "width", "arch", "dataset", "lr", "data_dir", "device", "precision")
        asked: Any = {name: getattr(config, name) for name in names}
        given = {name: value for name, value in asked.items() if value is not None}
        self.used = replace(self.recipe, **given, eval_limit=config.limit)
        self.used.check()
        if config.dataset is None and config.data_dir is not None:
            # A folder of downloaded data sets may be that of several tables.
            kept = downloads.held(Path(config.data_dir))
            data.check_folder(self.used.dataset, config.data_dir, chosen=bool(kept))
        self.images = images_of(self.used.dataset, config.data_dir)
        if self.images.train < self.used.batch_size:
            raise InputError(
                f"{self.used.dataset} has {self.images.train} training images, and the paper's "
                f"recipe takes {self.used.batch_size} at a time: give it more images"
            )
        of_table = self.table.cells if self.table else ()
        all_splits = dict.fromkeys(cell.split for cell in of_table)
        # The splits that the paper's table is measured on and that the settings ask for.
        self.splits = [split for split in all_splits if split in config.splits]
        self.left_out = [split for split in all_splits if split not in config.splits]
        if self.table and not self.splits:
            raise InputError(
                f"{config.target} is measured on the {' and '.join(all_splits)} images: "
                f"name these with --splits, or leave --splits out"
            )
        self._cells = [cell for cell in of_table if cell.split in self.splits]
        self.jobs = [self._job(row, seed) for row in rows for seed in self.seeds]

    def _job(self, row: str, seed: int) -> Job:
        """Return the job of a row; raise `InputError` if its directory holds another training."""
        flags: Any = {"adv": ROWS[row].adv, "mix": ROWS[row].mix, "seed": seed}
        wanted = replace(self.used, **flags)
        path = self.out / default_out(wanted).name
        wanted = replace(wanted, out=str(path))
        if not (path / CONFIG).exists():
            check_free(path)
            return Job(row, wanted, 0, False)
        run = Run.open(path)
        for field in fields(TrainConfig):
            mine, theirs = _setting(wanted, field.name), _setting(run.config, field.name)
            if field.name not in FREE and mine != theirs:
                raise InputError(
                    f"{path} was trained with {flag_of(field.name)} {theirs}, not {mine}: "
                    f"use that setting, move the run away, or choose another --out"
                )
        if run.has_state():
            step, validated, mark = run.load_state(_position)
            return Job(row, wanted, step, validated >= wanted.epochs, mark)
        if not (path / MODEL).exists():
            return Job(row, wanted, 0, False)
        # Without the checkpoint metrics.jsonl still says how far the model was trained.
        epochs = [of.get("epoch") for of in run.rows() if of.get("kind") == "epoch"]
        last = max((epoch for epoch in epochs if isinstance(epoch, int)), default=0)
        if last < wanted.epochs:
            raise InputError(
                f"{path} stopped after epoch {last} and has lost its {STATE}, so it cannot be "
                f"resumed: restore that file, or move the run away"
            )
        return Job(row, wanted, 0, True)

    def count(self, split: str) -> int:
        """Return how many images of a split are measured."""
        there: int = getattr(self.images, split)
        return min(self.config.limit or there, there)

    def _result(
        self, cell: Cell, job: Job, found: Sequence[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Return the measurement of a cell among those of a job's run, or None."""
        crafted_on = cell.source, job.config.seed
        return find(
            cell,
            found,
            n=self.count(cell.split),
            alpha=job.config.alpha,
            dataset=job.config.dataset,
            data=job.data,
            precision=self.config.precision,
            run=job.path,
            source=next(of.path for of in self.jobs if (of.row, of.config.seed) == crafted_on),
        )

    def missing(self, job: Job) -> list[Cell]:
        """Return the cells that a job's run is not measured for yet."""
        found = read_results(job.path)
        cells = [cell for cell in self._cells if cell.row == job.row]
        return [cell for cell in cells if self._result(cell, job, found) is None]

    def comparison(self) -> Comparison:
        """Return the paper's table with the measurements made so far next to it."""
        assert self.table is not None
        found = {job.path: read_results(job.path) for job in self.jobs}
        lines = []
        for cell in self._cells:
            jobs = [job for job in self.jobs if job.row == cell.row]
            lines.append(line(cell, [self._result(cell, job, found[job.path]) for job in jobs]))
        caption = f"Error in %, difference in points. {self.caption()}"
        return Comparison(self.table.name, self.table.title, caption, self.command(), tuple(lines))

    def caption(self) -> str:
        """Return sentences: which seeds were used, and what was scaled down from the recipe."""
        used, recipe, width = self.used, self.recipe, DEFAULT_WIDTH[self.used.arch]
        titles = {
            "dataset": "data set", "arch": "network", "epochs": "epochs", "lr": "learning rate",
        }  # fmt: skip
        parts = []
        for name, title in titles.items():
            mine, theirs = getattr(used, name), getattr(recipe, name)
            if mine != theirs:
                parts.append(f"{title} {mine} instead of {theirs}")
        if used.width not in (None, width):
            parts.append(f"width {used.width} instead of {width}")
        for split in self.splits:
            n, of = self.count(split), getattr(self.images, split)
            if n < of:
                parts.append(f"measured on {n} of the {of} {IMAGES[split]}")
        parts += [f"not measured on the {IMAGES[split]}" for split in self.left_out]
        seeds = ", ".join(map(str, self.seeds))
        seeded = f"One seed ({seeds})" if len(self.seeds) == 1 else f"Mean over seeds {seeds}"
        scaled = f"Scaled: {'; '.join(parts)}" if parts else "At the scale of the paper's recipe"
        return f"{seeded}. {scaled}."

    def command(self) -> str:
        """Return the command line that makes or completes this table."""
        config = replace(self.config, dry_run=False)
        return command_of("reproduce", config, ReproduceConfig(target=self.config.target))


def _position(state: dict[str, Any]) -> tuple[int, int, str]:
    """Return the finished updates, the validated epochs, and the fingerprint of the images.

    Raises `DamagedError` for a checkpoint that lacks one of them.
    """
    step, epochs, mark = state.get("step"), state.get("validated_epochs"), state.get("data")
    if not isinstance(step, int) or not isinstance(epochs, int) or not isinstance(mark, str):
        raise DamagedError("it is not a checkpoint of fastiat")
    return step, epochs, mark


def _setting(config: TrainConfig, name: str) -> Any:
    """Return a setting; for a width of None, the default width of the network."""
    if name == "width" and config.width is None:
        return DEFAULT_WIDTH[config.arch]
    return getattr(config, name)
