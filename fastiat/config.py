"""The settings of every command, a frozen dataclass for each, and the presets of `fastiat train`.

The docstring under a field is its `--help`. The settings are the same in Python and on the command
line: `TrainConfig(preset="modern", eps="4/255")` takes each setting that is not given from the
preset. `dataclasses.replace` gives every field, so it never fills in values of a preset.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from fastiat.configs.shared import OnDevice, PGDOptions, WithDataDir, WithOwnNetwork, WithPrecision
from fastiat.configs.training import PRESETS as PRESETS
from fastiat.configs.training import TrainConfig
from fastiat.configs.training import authors as authors
from fastiat.configs.training import modern as modern
from fastiat.configs.training import paper as paper
from fastiat.configs.training import strong as strong
from fastiat.system.errors import InputError
from fastiat.system.settings import (
    MOST_STEPS,
    SMALLEST_SIDE,
    Arch,
    DatasetName,
    check_dataset,
    check_once,
    check_ranges,
    check_unit,
    flag_of,
    steps_of,
)


@dataclass(frozen=True)
class AttackOfRun(OnDevice, WithOwnNetwork):
    """The settings that all commands that attack trained runs share."""

    norm: Literal["linf", "l2"] | None = None
    """Norm of the eps ball (default: that of the run). With another norm than that of the run, the
    defaults of --eps and --alpha are those of `fastiat train` for this norm."""
    alpha: float | None = None
    """PGD step size, for pixels in [0, 1] (default: that of the run; in the L2 ball, in proportion
    to the eps of `evaluate`, `compare` and `diagnose`)."""
    dataset: str | None = None
    """Data set, by its name or as a .beton file (default: that of the run)."""
    data_dir: str | None = None
    """Folder of the data set (default: that of the run)."""
    batch_size: int | None = None
    """Images per batch; this changes the memory used, not the result (default: the batch size that
    the run was trained with, at most 500)."""
    seed: int = 0
    """Seed of random starts, of noise and of the choice of images for --limit."""

    def check(self) -> None:
        super().check()
        check_dataset(self.dataset)
        if self.norm == "linf":
            check_unit(self)

    @property
    def ball(self) -> Literal["linf", "l2"]:
        """Norm of the eps ball; "linf" where none is given or filled in."""
        return self.norm or "linf"

    def usual(self, run: "TrainConfig | None") -> "TrainConfig":
        """Return the training whose norm, eps and alpha are the defaults, see `filled`."""
        norm = self.norm or (run.norm if run else "linf")
        return run if run is not None and run.norm == norm else TrainConfig(norm=norm)

    def filled(self, run: "TrainConfig | None") -> Any:
        """Return these settings with norm, eps and alpha of a run's training where none is given.

        run: settings of the training; None (a model without its run) uses the defaults of the norm.
        """
        usual = self.usual(run)
        norm = usual.norm
        given: dict[str, Any] = {"alpha": self.alpha, "norm": norm}
        eps: Any = getattr(self, "eps", ())
        if eps is None:
            given["eps"] = usual.eps
        if self.alpha is None:
            # Otherwise few steps could not cross a ball that is larger than that of the training.
            wider = norm == "l2" and isinstance(eps, float) and eps and usual.eps
            given["alpha"] = usual.alpha * (eps / usual.eps if wider else 1)
        full = replace(self, **given)
        if norm == "linf":
            check_unit(full)
        return full


# The settings of `fastiat train`.


# The settings of the commands that measure trained runs.


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(WithPrecision, AttackOfRun, PGDOptions):
    """The settings that `evaluate`, `sweep` and `transfer` share."""

    positional = ("runs",)

    runs: tuple[str, ...] = ()
    """Run directories, or model.safetensors files."""
    splits: tuple[str, ...] = ("test",)
    """Splits to measure on: test, train (without augmentation)."""
    limit: int | None = None
    """Use this many images of a split only, a stratified sample."""
    restarts: int = 1
    """Number of random starts of PGD; for each image the worst result counts."""

    def check(self) -> None:
        super().check()
        steps = getattr(self, "steps", ())
        for count in steps if isinstance(steps, tuple) else (steps,):
            if count > MOST_STEPS:
                raise InputError(f"--steps is {count}: give at most {MOST_STEPS}")
        if self.restarts > 1 and not self.random_start:
            raise InputError(
                "--restarts would repeat the same attack without a random start: "
                "leave out --restarts or --no-random-start"
            )


@dataclass(frozen=True, kw_only=True)
class WithAttacks(MeasureConfig):
    """The settings that `evaluate` and `compare` share: the attacks, all with one radius."""

    attacks: tuple[str, ...] = ("none", "fgsm", "pgd-7", "pgd-20")
    """Attacks to measure: none, fgsm, pgd-K with K steps, and pgd-K-targeted, which lowers the loss
    of the wrong class that has the highest logit; any wrong prediction counts as an error."""
    autoattack: bool = False
    """Add AutoAttack's four standard attacks (Croce & Hein 2020; `pip install
    fastiat[autoattack]`)."""
    eps: float | None = None
    """Radius of the eps ball, for pixels in [0, 1] (default: that of the run)."""

    def check(self) -> None:
        super().check()
        if not self.attacks:
            raise InputError("--attacks is empty: give at least one attack, such as none")
        for name in self.attacks:
            steps_of(name)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(WithAttacks):
    """Print the error rates of trained runs under white-box attacks.

    All requested numbers of PGD steps are measured in one pass.
    """

    worst: bool = False
    """Only the worst case: an image counts as an error if it is misclassified without attack or
    under any attack or restart. Such an image is not attacked again, which is faster."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(WithAttacks):
    """Print one table of runs, the most robust first, and test which of their differences are real.

    All runs are measured on the same images under the same attacks. A run is more robust than
    another if McNemar's exact test on the images that only one of the two misclassifies gives a
    p-value below 0.05. The p-values of several pairs are adjusted by Holm's method. The test covers
    the choice of the images; a training with another seed may give another result.
    """

    attacks: tuple[str, ...] = ("none", "pgd-20")
    """Attacks to measure, named as in `fastiat evaluate`. Runs are compared under AutoAttack with
    --autoattack, else under the attack with the most steps."""

    def check(self) -> None:
        super().check()
        if len(self.runs) < 2:
            raise InputError("compare needs at least two runs: name the runs to compare")
        check_once(self.runs)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(MeasureConfig):
    """Print the PGD error of trained runs over --eps, over --steps, or over both.

    --eps without values takes the radii of the paper's Table 6, for --norm l2 0.1 to 3, and --steps
    without values the numbers of steps of Table 7.
    """

    L2_RADII: ClassVar[tuple[float, ...]] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)

    bare: ClassVar[dict[str, Any]] = {
        "eps": (0.005, 0.01, 0.04, 0.05, 0.06, 0.08, 0.1, 0.2),
        "steps": (5, 10, 20, 50, 100, 1000),
    }

    eps: tuple[float, ...] | None = None
    """Radii of the eps ball, for pixels in [0, 1] (default: 0.02; l2: 0.5); --eps alone: 0.005 to
    0.2 as in Table 6; l2: 0.1 to 3."""
    steps: tuple[int, ...] = (20,)
    """Numbers of PGD steps; --steps alone: 5 to 1000 as in Table 7."""

    def radii(self, norm: str) -> tuple[float, ...]:
        """Return the radii to measure at in the ball of `norm`, each once."""
        if self.eps is None:
            return (0.02,) if norm == "linf" else (0.5,)
        bare = norm == "l2" and self.eps == self.bare["eps"]
        return tuple(dict.fromkeys(self.L2_RADII if bare else self.eps))


@dataclass(frozen=True, kw_only=True)
class TransferConfig(MeasureConfig):
    """Attack every run with the PGD examples made on every other run: Table 5 of the paper.

    Rows are the attacked runs; columns are the runs that the examples are made on.
    """

    eps: tuple[float, ...] | None = None
    """Radii of the eps ball, for pixels in [0, 1]; each gives one matrix (default: 0.01 0.02 0.04;
    l2: 0.25 0.5 1)."""
    steps: int = 20
    """Number of PGD steps."""

    def check(self) -> None:
        super().check()
        if len(set(self.runs)) < 2:
            raise InputError("transfer needs at least two runs: name the runs to attack each other")
        check_once(tuple(dict.fromkeys(self.runs)))


@dataclass(frozen=True, kw_only=True)
class NormsConfig(WithOwnNetwork):
    """Print, save and plot the norms of every weight matrix of runs: the paper's Figure 1."""

    positional = ("runs",)

    runs: tuple[str, ...] = ()
    """Run directories, or model.safetensors files, of one architecture."""
    out: str | None = None
    """Path of the charts: PATH-frobenius and PATH-spectral, each as .png and .svg (default:
    "norms" in the run, or for several runs in the folder of the first)."""

    def check(self) -> None:
        super().check()
        check_once(self.runs)


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(AttackOfRun):
    """Check whether a run is robust, or only has gradients that make attacks fail."""

    positional = ("run",)

    run: str = ""
    """A run directory, or a model.safetensors file."""
    partner: str | None = None
    """Another run for the same images; its adversarial examples are tested on this run."""
    autoattack: bool = False
    """Also compare with AutoAttack, which takes minutes to hours (Croce & Hein 2020; `pip install
    fastiat[autoattack]`)."""
    limit: int = 1000
    """Use this many of the test images only, a stratified sample."""
    eps: float | None = None
    """Radius of the eps ball, for pixels in [0, 1] (default: that of the run)."""
    alpha: float | None = None
    """PGD step size, for pixels in [0, 1] (default: that of the run, or eps/8 if eps/8 is
    larger)."""

    def check(self) -> None:
        super().check()
        check_ranges(self, {"eps", "alpha"})
        if self.partner is not None:
            check_once((self.run, self.partner))


# The settings of the other commands.


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(WithPrecision, WithDataDir):
    """Train and measure the runs of a table of the paper, and write it next to the paper's.

    Existing runs and measurements are kept: after Ctrl-C or a crash the same command continues. The
    runs have the names that `fastiat train` gives, so runs of `fastiat train` are used too. For a
    smaller machine, give fewer --epochs, a smaller --width and a --limit.
    """

    positional = ("target",)

    target: Literal[
        "table1", "table2", "table3", "table4", "table5", "table6", "table7", "figure1"
    ] = "table3"
    """Table or figure to reproduce: table1 to table4 are white-box errors, table5 is transfer
    attacks, table6 errors by eps, table7 errors by steps, and figure1 the norms of the weights."""

    out: str = "runs"
    """Folder of the runs, DATASET-ARCH-ADV-MIX-sSEED each, and of the table."""
    dry_run: bool = False
    """List the runs with their estimated time, measured on a few updates; train nothing and write
    nothing."""
    seeds: tuple[int, ...] | None = None
    """Seeds to train every row with; the errors of several seeds are averaged (default: 0; figure1:
    0 1 2)."""
    epochs: int | None = None
    """Passes over the training set (default: 200; figure1: 50)."""
    width: int | None = None
    """Base channels (preact18: 64), widening factor (wrn: 10) or hidden units (mlp6: 512)."""
    limit: int | None = None
    """Measure on this many images of a split only, a stratified sample."""
    splits: tuple[str, ...] = ("test", "train")
    """Splits that Tables 1 to 4 are measured on; the paper gives train errors in parentheses."""
    arch: Arch | None = None
    """Network (default: the paper's)."""
    dataset: DatasetName | None = None
    """Images (default: the paper's)."""
    lr: float | None = None
    """Highest learning rate (default: 0.1; figure1: 0.01)."""

    def check(self) -> None:
        super().check()
        for name in ("seeds", "splits"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise InputError(f"{flag_of(name)} names a value twice: give each value once")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(WithOwnNetwork):
    """Write one self-contained HTML page, and a PNG of the curves, for one or more runs."""

    positional = ("dir",)

    dir: str = ""
    """A run directory, or a folder of them."""
    out: str | None = None
    """Name of the page (default: DIR/report.html; the curves are written next to it)."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(OnDevice, WithDataDir):
    """Print what this machine has, and which engine, loader and precision a run would use."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(WithDataDir):
    """Write a data set or an image tree to one FFCV file (.beton) to train on.

    DATASET is the name of a data set, or a folder that holds train/CLASS/* and test/CLASS/*, with
    images of any size.
    """

    positional = ("dataset", "out")

    dataset: str = ""
    """cifar10, cifar100, svhn, fashion-mnist, digits, a .beton file, or the folder of an image
    tree."""
    out: str = ""
    """The file to write, NAME.beton."""
    format: Literal["raw", "jpeg"] = "raw"
    """How images are stored: "raw" is lossless and the fastest to read; "jpeg" takes a tenth of
    the space."""
    quality: int = 95
    """Quality of the JPEGs, from 1 to 100."""
    max_side: int | None = None
    """Largest side of the images in pixels: every image is cropped to a square, and all are resized
    to one side, at most this (default: none if all images are squares of one size, else 224)."""
    force: bool = False
    """Replace the file if it exists."""

    def check(self) -> None:
        super().check()
        if not self.out.endswith(".beton"):
            raise InputError(f"{self.out!r} is not the name of a .beton file: end it with .beton")
        if self.quality > 100:
            raise InputError(f"--quality is {self.quality}: give at most 100")
        if self.max_side is not None and self.max_side < SMALLEST_SIDE:
            raise InputError(f"--max-side is {self.max_side}: give at least {SMALLEST_SIDE}")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(WithOwnNetwork):
    """Write the network of a run to a file that runs without fastiat.

    OUT is model.onnx for ONNX runtimes or model.pt2 for `torch.export.load`. The program takes
    pixels in [0, 1], for any batch size, and returns logits.
    """

    positional = ("run", "out")

    run: str = ""
    """A run directory, or a model.safetensors file."""
    out: str = ""
    """The file to write, NAME.onnx or NAME.pt2."""
    force: bool = False
    """Replace the file if it exists."""

    def check(self) -> None:
        super().check()
        if not self.out.endswith((".onnx", ".pt2")):
            raise InputError(f"{self.out!r} is no name of an export: end it with .onnx or .pt2")


@dataclass(frozen=True, kw_only=True)
class RobustBenchConfig(WithOwnNetwork):
    """Print what an entry in RobustBench needs: the code of the network, and its JSON metadata."""

    positional = ("run",)

    run: str = ""
    """A run directory."""
