"""Settings of the commands that measure, explain and show: field docstrings are the `--help`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastiat.system.errors import InputError
from fastiat.system.settings import (
    MOST_STEPS,
    SMALLEST_SIDE,
    Arch,
    DatasetName,
    Settings,
    check_dataset,
    check_once,
    check_ranges,
    check_unit,
    flag_of,
    steps_of,
)


@dataclass(frozen=True)
class MeasureConfig(Settings):
    """What all commands that attack trained runs share."""

    positional = ("runs",)
    groups: ClassVar[dict[str, str]] = {"alpha": "attack", "dataset": "data", "device": "machine"}

    runs: tuple[str, ...] = ()
    """Run directories, or model.safetensors files."""
    splits: tuple[str, ...] = ("test",)
    """Images to measure on: test, train (un-augmented)."""
    limit: int | None = None
    """Use this many images of a split only, a stratified draw."""
    seed: int = 0
    """Seed of the random starts and of --limit's draw."""
    alpha: float | None = None
    """Length of a PGD step, in pixels of 0 to 1 (default: the run's)."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball."""
    attack_loss: Literal["ce", "margin"] = "ce"
    """What PGD maximises: cross-entropy, or the best wrong logit minus the true one."""
    restarts: int = 1
    """Random starts of PGD; each image keeps its worst."""
    random_start: bool = True
    """Start PGD at a random point of the ball."""
    dataset: str | None = None
    """Data set, by its name or as a .beton (default: the run's)."""
    data_dir: str | None = None
    """Where the data set is (default: the run's)."""
    batch_size: int | None = None
    """Images attacked at a time; it changes the memory that is used, not the result (default: as
    many as the run's training has in an update, at most 500)."""
    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic that crafts the examples; they are always classified in fp32."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        check_ranges(self, {"limit", "restarts", "batch_size", "steps"})
        check_dataset(self.dataset)
        if self.norm == "linf":
            check_unit(self)
        steps = getattr(self, "steps", ())
        for count in steps if isinstance(steps, tuple) else (steps,):
            if count > MOST_STEPS:
                raise InputError(f"--steps is {count}: give at most {MOST_STEPS}")
        if self.restarts > 1 and not self.random_start:
            raise InputError("--restarts without a random start would all be the same one")
        for split in self.splits:
            if split not in ("test", "train"):
                raise InputError(f"unknown split {split!r}: choose from test, train")


@dataclass(frozen=True)
class EvaluateConfig(MeasureConfig):
    """Print the error rates of trained runs under white-box attacks.

    One pass crafts all numbers of PGD steps that are asked for.
    """

    groups: ClassVar[dict[str, str]] = {"attacks": "what is measured", **MeasureConfig.groups}

    attacks: tuple[str, ...] = ("none", "fgsm", "pgd-7", "pgd-20")
    """Attacks to measure: none, fgsm, pgd-K with K steps."""
    worst: bool = False
    """Only the worst case: an image counts as fooled if it is misclassified clean or under any
    attack or restart, and is attacked no more then, which is faster."""
    autoattack: bool = False
    """Add AutoAttack's four standard attacks (Croce & Hein 2020; `pip install
    fastiat[autoattack]`)."""
    eps: float | None = None
    """Radius of the ball, in pixels of 0 to 1 (default: the run's)."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        super().check()
        if not self.attacks:
            raise InputError("--attacks is empty: give at least none")
        for name in self.attacks:
            steps_of(name)


@dataclass(frozen=True)
class SweepConfig(MeasureConfig):
    """Print the PGD error of trained runs over --eps, over --steps, or over both.

    A flag without values takes the paper's: Table 6 or Table 7.
    """

    groups: ClassVar[dict[str, str]] = {"eps": "what is measured", **MeasureConfig.groups}
    bare: ClassVar[dict[str, Any]] = {
        "eps": (0.005, 0.01, 0.04, 0.05, 0.06, 0.08, 0.1, 0.2),
        "steps": (5, 10, 20, 50, 100, 1000),
    }

    eps: tuple[float, ...] = (0.02,)
    """Radii of the ball, in pixels of 0 to 1; --eps alone: 0.005 to 0.2 as in Table 6."""
    steps: tuple[int, ...] = (20,)
    """Numbers of PGD steps; --steps alone: 5 to 1000 as in Table 7."""


@dataclass(frozen=True)
class TransferConfig(MeasureConfig):
    """Attack every run with the PGD examples of every other one: Table 5 of the paper.

    A row is a target, a column the run on which the examples are crafted.
    """

    groups: ClassVar[dict[str, str]] = {"eps": "what is measured", **MeasureConfig.groups}

    eps: tuple[float, ...] = (0.01, 0.02, 0.04)
    """Radii of the ball, in pixels of 0 to 1: a matrix for each."""
    steps: int = 20
    """PGD steps."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        super().check()
        if len(set(self.runs)) < 2:
            raise InputError("transfer needs at least two runs: name the runs to attack each other")
        check_once(tuple(dict.fromkeys(self.runs)))


@dataclass(frozen=True)
class NormsConfig(Settings):
    """Print, keep and chart the norms of every weight matrix of runs: the paper's Figure 1."""

    positional = ("runs",)

    runs: tuple[str, ...] = ()
    """Run directories, or model.safetensors files, of one architecture."""
    out: str | None = None
    """Where the chart goes, as PATH.png and PATH.svg (default: "norms" in the run, or for several
    runs in the folder of the first)."""

    def check(self) -> None:
        """Raise `InputError` for a run that is named twice."""
        check_ranges(self, set())
        check_once(self.runs)


@dataclass(frozen=True)
class DiagnoseConfig(Settings):
    """Check whether a run's robustness is real, or its gradients only lead attacks astray."""

    positional = ("run",)
    groups: ClassVar[dict[str, str]] = {
        "partner": "what is checked",
        "eps": "attack",
        "dataset": "data",
        "device": "machine",
    }

    run: str = ""
    """A run directory, or a model.safetensors file."""
    partner: str | None = None
    """Another run for the same images, whose adversarial examples are tried on this one."""
    autoattack: bool = False
    """Compare with AutoAttack too, which takes minutes to hours (Croce & Hein 2020; `pip install
    fastiat[autoattack]`)."""
    limit: int = 1000
    """Use this many of the test images only, a stratified draw."""
    seed: int = 0
    """Seed of the random starts, the noise and --limit's draw."""
    eps: float | None = None
    """Radius of the ball, in pixels of 0 to 1 (default: the run's)."""
    alpha: float | None = None
    """Length of a PGD step, in pixels of 0 to 1 (default: the run's, or eps/8 if that is more)."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball."""
    dataset: str | None = None
    """Data set, by its name or as a .beton (default: the run's)."""
    data_dir: str | None = None
    """Where the data set is (default: the run's)."""
    batch_size: int | None = None
    """Images attacked at a time; it changes the memory that is used, not the result (default: as
    many as the run's training has in an update, at most 500)."""
    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        check_ranges(self, {"limit", "batch_size", "eps", "alpha"})
        check_dataset(self.dataset)
        if self.norm == "linf":
            check_unit(self)
        if self.partner is not None:
            check_once((self.run, self.partner))


@dataclass(frozen=True)
class ReproduceConfig(Settings):
    """Train and measure what a table of the paper needs, and write it beside the paper's.

    What is trained or measured already is kept: after Ctrl-C or a crash the same command goes on.
    The runs are named as `fastiat train` names them, so that those are taken over too.
    """

    positional = ("target",)
    groups: ClassVar[dict[str, str]] = {
        "out": "run",
        "epochs": "scale, for machines and times smaller than the paper's",
        "data_dir": "machine",
    }

    target: Literal[
        "table1", "table2", "table3", "table4", "table5", "table6", "table7", "figure1"
    ] = "table3"
    """What to reproduce: Tables 1 to 4 are white-box errors, 5 is transfer attacks, 6 errors by
    eps, 7 by steps; Figure 1 is the norms of the weights."""

    out: str = "runs"
    """Folder of the runs, DATASET-ARCH-ADV-MIX-sSEED each, and of the table."""
    dry_run: bool = False
    """List the runs with the time they would take, measured on a few updates; train and write
    nothing."""
    seeds: tuple[int, ...] | None = None
    """Seeds to train every row with; several are averaged (default: 0; figure1: 0 1 2)."""

    epochs: int | None = None
    """Passes over the training set (default: 200; figure1: 50)."""
    width: int | None = None
    """Base channels (preact18: 64), widening factor (wrn: 10) or hidden units (mlp6: 512)."""
    limit: int | None = None
    """Measure on this many images of a split only, a stratified draw."""
    splits: tuple[str, ...] = ("test", "train")
    """Images that Tables 1 to 4 are measured on; the paper has train in parentheses."""
    arch: Arch | None = None
    """Network (default: the paper's)."""
    dataset: DatasetName | None = None
    """Images (default: the paper's)."""
    lr: float | None = None
    """Highest learning rate (default: 0.1; figure1: 0.01)."""

    data_dir: str | None = None
    """Where the data set is or goes (default: $FASTIAT_DATA or ~/.cache/fastiat/data)."""
    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of training and crafting; examples are always classified in fp32."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        check_ranges(self, {"epochs", "width", "limit"})
        for split in self.splits:
            if split not in ("test", "train"):
                raise InputError(f"unknown split {split!r}: choose from test, train")
        for name in ("seeds", "splits"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise InputError(f"{flag_of(name)} names one twice: give each once")


@dataclass(frozen=True)
class ReportConfig(Settings):
    """One self-contained HTML page, and a PNG of the curves, for a run or a folder of runs."""

    positional = ("dir",)

    dir: str = ""
    """A run directory, or a folder of them."""
    out: str | None = None
    """Where the page goes (default: DIR/report.html; the curves go beside it)."""


@dataclass(frozen=True)
class DoctorConfig(Settings):
    """What this machine has, and which engine, loader and precision a run would take."""

    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one."""
    data_dir: str | None = None
    """Where data sets are looked for (default: $FASTIAT_DATA or ~/.cache/fastiat/data)."""


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """Write a data set or an image tree to one FFCV file (.beton) to train on.

    DATASET is a data set's name, or a folder with train/CLASS/* and test/CLASS/* in it, of images
    of any size.
    """

    positional = ("dataset", "out")

    dataset: str = ""
    """cifar10, svhn, fashion-mnist, digits, a .beton, or the folder of an image tree."""
    out: str = ""
    """The file to write, NAME.beton."""
    data_dir: str | None = None
    """Where the data set is or goes (default: $FASTIAT_DATA or ~/.cache/fastiat/data)."""
    format: Literal["raw", "jpeg"] = "raw"
    """How images are stored: "raw" keeps every bit and is read fastest, "jpeg" takes a tenth of the
    space."""
    quality: int = 95
    """Of the JPEGs, from 1 to 100."""
    max_side: int | None = None
    """Largest side of the images, which are resized and cut square to it (default: none where all
    images are squares of one size, else 224)."""
    force: bool = False
    """Replace the file if it is there."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        check_ranges(self, {"quality", "max_side"})
        if not self.out.endswith(".beton"):
            raise InputError(f"{self.out!r} is no name for the file: let it end in .beton")
        if self.quality > 100:
            raise InputError(f"--quality is {self.quality}: give at most 100")
        if self.max_side is not None and self.max_side < SMALLEST_SIDE:
            raise InputError(f"--max-side is {self.max_side}: give at least {SMALLEST_SIDE}")
