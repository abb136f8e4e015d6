"""The settings of every command: one frozen dataclass each, and the presets of a training.

The docstring under a field is its `--help`. Settings are the same from Python as on the command
line: `TrainConfig(preset="modern", eps="4/255")` takes the values of the preset for all settings
that are not given. `dataclasses.replace` copies every value, so it keeps them all.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, ClassVar, Literal, TypeVar

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
    did_you_mean,
    flag_of,
    steps_of,
)

T = TypeVar("T")
Preset = Literal["paper", "authors", "modern"]
POSITIVE = {
    *("epochs", "batch_size", "steps", "width", "mix_alpha", "restarts", "quality", "max_side"),
    *("limit", "eval_limit", "train_limit", "class_limit"),
}
"""Settings that have to be above 0; all other numbers can be 0."""


# Groups of settings that several commands have in common.


class Checked(Settings):
    """Settings whose types and ranges are checked."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        check_ranges(self, POSITIVE)
        for split in getattr(self, "splits", ()):
            if split not in ("test", "train"):
                raise InputError(f"unknown split {split!r}: choose from test, train")


@dataclass(frozen=True)
class OnDevice(Checked):
    """Where a command computes."""

    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" is CUDA if there is a CUDA device."""


@dataclass(frozen=True)
class WithPrecision(OnDevice):
    """Where and in which arithmetic a command computes."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of training and attack: "bf16" is autocast; "auto" is "bf16" if the device is fast
    in it. Errors are always measured in fp32."""


@dataclass(frozen=True)
class WithDataDir(Checked):
    """Where the files of data sets are."""

    data_dir: str | None = None
    """Folder of the data set, into which it is downloaded if it is not there (default:
    $FASTIAT_DATA or ~/.cache/fastiat/data)."""


@dataclass(frozen=True)
class PGDOptions(Checked):
    """What PGD maximises, and from where."""

    attack_loss: Literal["ce", "margin"] = "ce"
    """Loss that the attack maximises: cross-entropy, or the highest wrong logit minus the true
    one."""
    random_start: bool = True
    """Start PGD at a random point of the ball."""


@dataclass(frozen=True)
class AttackOfRun(OnDevice):
    """What all commands that attack trained runs have in common."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball."""
    alpha: float | None = None
    """Length of a PGD step, in pixels of 0 to 1 (default: that of the run)."""
    dataset: str | None = None
    """Data set, by its name or as a .beton file (default: that of the run)."""
    data_dir: str | None = None
    """Folder of the data set (default: that of the run)."""
    batch_size: int | None = None
    """Images attacked at a time; this changes the memory that is used, not the result (default: the
    batch size of the run's training, at most 500)."""
    seed: int = 0
    """Seed of random starts, of noise and of the images that --limit draws."""

    def check(self) -> None:
        super().check()
        check_dataset(self.dataset)
        if self.norm == "linf":
            check_unit(self)


# The training.


def _filled_by_preset(kind: type[T]) -> type[T]:
    """Give the constructor of a configuration the values of its preset as defaults."""
    init: Callable[..., None] = kind.__init__
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]

    @wraps(init)
    def __init__(self: Any, **given: Any) -> None:
        for name in given.keys() - set(names):
            raise TypeError(f"no setting is called {name}{did_you_mean(name, names)}")
        preset = given.get("preset", "paper")
        # "paper" is the defaults of the fields. A preset is itself made by giving every field.
        if preset in ("authors", "modern") and len(given) < len(names):
            given = vars(PRESETS[preset]()) | given
        init(self, **given)

    kind.__init__ = __init__  # type: ignore[method-assign]
    return kind


@_filled_by_preset
@dataclass(frozen=True, kw_only=True)
class TrainConfig(WithPrecision, WithDataDir, PGDOptions):
    """Train a robust classifier and print its errors.

    The defaults are the paper's recipe.
    """

    preset: Preset = "paper"
    """Defaults of the other settings: "paper" (section 4.1 of the paper); "authors", the choices of
    the manifold mixup authors' published code; or "modern": stronger attack, more weight decay,
    cosine learning rate, averaged weights, early stopping, fewer epochs."""
    arch: Arch = "preact18"
    """Network."""
    width: int | None = None
    """Base channels (preact18: 64), widening factor (wrn: 10) or hidden units (mlp6: 512)."""
    variant: Literal["standard", "authors"] = "standard"
    """Details of the network: as published, with BatchNorm and ReLU before the pooling (He et al.
    2016), or as in the manifold mixup authors' code, where preact18 has no final BatchNorm and
    needs --loss bce to train, and wrn has biases and other shortcuts."""
    mix: Literal["none", "mixup", "manifold"] = "manifold"
    """Interpolation of the clean and the adversarial batch: none, mixup, or manifold mixup."""
    adv: Literal["none", "fgsm", "pgd"] = "pgd"
    """Attack that makes the adversarial batch; "none" trains on the clean batch alone."""
    dataset: str = "cifar10"
    """Images to train on: cifar10, svhn or fashion-mnist, which are downloaded once; digits, which
    is built in; folder, a tree of images train/CLASS/*, test/CLASS/* in --data-dir; or a file that
    `fastiat convert` has written, NAME.beton."""
    train_limit: int | None = None
    """Train on this many training images only, a stratified draw by --seed."""
    class_limit: int | None = None
    """Train on at most this many images of each class, a draw by --seed."""
    loader: Literal["auto", "resident", "ffcv"] = "auto"
    """How batches are made: "resident" keeps the whole data set as uint8 on the training device;
    "ffcv" reads it from a .beton file, and first converts a data set that is none (into
    $FASTIAT_CACHE or ~/.cache/fastiat/betons); "auto" is "ffcv", if it is installed, for a .beton
    file and for a data set that does not fit."""
    pad: int = 2
    """Random crops are cut from images padded by this many zero pixels on each side; 0 is no
    crop."""
    flip: bool | None = None
    """Mirror images at random (default: as in the paper for the data set: CIFAR-10 and folders yes,
    the others no)."""

    epochs: int = 200
    """Passes over the training set."""
    batch_size: int = 64
    """Images in a batch; each is used once clean and once attacked."""
    lr: float = 0.1
    """Highest learning rate."""
    schedule: Literal["step", "cosine"] = "step"
    """Learning rate over time: divided by 10 after 1/2 and after 3/4 of the epochs, or a linear
    warm-up over the first tenth followed by a cosine down to zero."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    weight_decay: float = 1e-4
    """L2 penalty added to the gradient."""
    decay_norm: bool = True
    """Apply the weight decay to BatchNorm parameters and biases too."""
    loss: Literal["ce", "bce"] = "ce"
    """Training loss: cross-entropy, or binary cross-entropy of the softmax."""
    clean_weight: float = 0.5
    """Weight of the clean batch in the loss, from 0 to 1; the adversarial batch has the rest."""
    ema: float = 0.0
    """Decay per update of an exponential moving average of the weights; the averaged weights are
    then evaluated and saved. 0 is off."""
    holdout: int | None = 0
    """Training images that are not trained on, a stratified draw, to choose the epoch with the
    lowest PGD error; 0 keeps the last epoch. The modern preset holds out 1000, or a tenth of the
    training set if that is fewer."""
    patience: int = 0
    """Stop after this many epochs without a lower PGD error on the --holdout images; 0 never
    stops."""

    eps: float = 0.03
    """Radius of the attack's L-infinity ball, in pixels of 0 to 1."""
    alpha: float = 0.0075
    """Length of a PGD step, in pixels of 0 to 1."""
    steps: int = 7
    """PGD steps while training."""
    bn: Literal["eval", "batch", "update"] = "eval"
    """BatchNorm during the attack: with running statistics, with those of the batch, or with those
    of the batch, which also update the running statistics."""

    mix_alpha: float | None = None
    """Lambda is drawn from Beta(A, A) (default: mixup 1, manifold 2)."""
    mix_layers: tuple[int, ...] | None = None
    """Mix points to draw from: 0 is the input, 1 and 2 are after the first and second group of
    blocks (default: mixup 0, manifold 0 1 2)."""
    mix_space: Literal["standardised", "pixel"] = "standardised"
    """Whether mix point 0 is after or before the standardisation of the image."""
    lam_per_sample: bool = False
    """Draw a lambda for every image instead of one for the batch."""
    shared_mix: bool = False
    """Mix the adversarial batch with the clean batch's lambda, pairs and mix point instead of a new
    draw."""

    engine: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How an update is run: plain PyTorch, compiled, or compiled and captured as CUDA graphs;
    "auto" is "graph" on CUDA and "eager" on the CPU, where compiling takes minutes."""
    deterministic: bool = False
    """Use only algorithms that repeat bit for bit on the same GPU; they are slower. On the CPU all
    algorithms repeat."""

    seed: int = 0
    """Seed of everything random."""
    checkpoint_every: float = 300.0
    """Seconds between two checkpoints; 0 writes one after every update. The start, the end and a
    signal also write one. A resume can change this setting."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do with an update whose loss or gradient is not finite: "stop" ends the training;
    "skip" does not apply the update, and makes every update wait for the device. A resume can
    change this setting."""
    eval_limit: int | None = None
    """Evaluate on this many test images only, a stratified draw."""
    out: str | None = None
    """Run directory (default: runs/DATASET-ARCH-ADV-MIX-sSEED)."""
    resume: bool = False
    """Continue the run in --out where it stopped, with its own settings."""

    def check(self) -> None:
        super().check()
        check_unit(self)
        check_dataset(self.dataset)
        for name in ("ema", "momentum"):
            if getattr(self, name) >= 1:
                raise InputError(f"{flag_of(name)} is {getattr(self, name)}: give less than 1")
        if self.clean_weight > 1:
            raise InputError(f"--clean-weight is {self.clean_weight}: give a number from 0 to 1")
        if self.nesterov and not self.momentum:
            raise InputError("--nesterov needs a --momentum above 0; add --no-nesterov")
        if self.patience and self.holdout == 0:
            raise InputError("--patience needs --holdout N, the images to measure the error on")
        if self.mix_layers is not None and (
            not self.mix_layers or not set(self.mix_layers) <= {0, 1, 2}
        ):
            raise InputError(f"--mix-layers is {self.mix_layers}: give some of 0, 1 and 2")


def paper() -> TrainConfig:
    """Section 4.1 of the paper; what it leaves open is as in its authors' published code."""
    return TrainConfig()


def authors() -> TrainConfig:
    """What the published code of the manifold mixup authors does where the paper leaves it open.

    (vikasverma1077/manifold_mixup; the IAT paper shares its first author.) Binary cross-entropy of
    the softmax, no final BatchNorm in preact18, its own wide ResNet, attack sizes given as 8 and 2
    of 255, and at most 7,325 training images of a class, which leaves 62,156 of SVHN's 73,257.
    """
    return replace(
        paper(),
        preset="authors",
        variant="authors",
        loss="bce",
        class_limit=7325,
        eps=8 / 255,
        alpha=2 / 255,
    )


def modern() -> TrainConfig:
    """What was found out since the paper: a more robust model in fewer epochs.

    8/255 and 2/255, decay 5e-4 and padding 4 as in Rice et al. 2020, who also show why the best
    epoch on held-out images has to be kept; a cosine schedule; averaged weights (Gowal et al.
    2020).
    """
    return replace(
        paper(),
        preset="modern",
        eps=8 / 255,
        alpha=2 / 255,
        weight_decay=5e-4,
        pad=4,
        batch_size=128,
        schedule="cosine",
        epochs=40,
        ema=0.995,
        holdout=None,
        patience=10,
    )


PRESETS = {"paper": paper, "authors": authors, "modern": modern}


# The measurements of trained runs.


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(WithPrecision, AttackOfRun, PGDOptions):
    """What `evaluate`, `sweep` and `transfer` have in common."""

    positional = ("runs",)

    runs: tuple[str, ...] = ()
    """Run directories, or model.safetensors files."""
    splits: tuple[str, ...] = ("test",)
    """Images to measure on: test, train (without augmentation)."""
    limit: int | None = None
    """Use this many images of a split only, a stratified draw."""
    restarts: int = 1
    """Number of random starts of PGD; for each image the worst result counts."""

    def check(self) -> None:
        super().check()
        steps = getattr(self, "steps", ())
        for count in steps if isinstance(steps, tuple) else (steps,):
            if count > MOST_STEPS:
                raise InputError(f"--steps is {count}: give at most {MOST_STEPS}")
        if self.restarts > 1 and not self.random_start:
            raise InputError("--restarts without a random start would repeat the same attack")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MeasureConfig):
    """Print the error rates of trained runs under white-box attacks.

    All numbers of PGD steps that are asked for are measured in one pass.
    """

    attacks: tuple[str, ...] = ("none", "fgsm", "pgd-7", "pgd-20")
    """Attacks to measure: none, fgsm, pgd-K with K steps."""
    worst: bool = False
    """Only the worst case: an image counts as an error if it is misclassified without attack or
    under any attack or restart. It is then not attacked any more, which is faster."""
    autoattack: bool = False
    """Add AutoAttack's four standard attacks (Croce & Hein 2020; `pip install
    fastiat[autoattack]`)."""
    eps: float | None = None
    """Radius of the ball, in pixels of 0 to 1 (default: that of the run)."""

    def check(self) -> None:
        super().check()
        if not self.attacks:
            raise InputError("--attacks is empty: give at least none")
        for name in self.attacks:
            steps_of(name)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(MeasureConfig):
    """Print the PGD error of trained runs over --eps, over --steps, or over both.

    A flag without values takes those of the paper's Table 6 or Table 7.
    """

    bare: ClassVar[dict[str, Any]] = {
        "eps": (0.005, 0.01, 0.04, 0.05, 0.06, 0.08, 0.1, 0.2),
        "steps": (5, 10, 20, 50, 100, 1000),
    }

    eps: tuple[float, ...] = (0.02,)
    """Radii of the ball, in pixels of 0 to 1; --eps alone: 0.005 to 0.2 as in Table 6."""
    steps: tuple[int, ...] = (20,)
    """Numbers of PGD steps; --steps alone: 5 to 1000 as in Table 7."""


@dataclass(frozen=True, kw_only=True)
class TransferConfig(MeasureConfig):
    """Attack every run with the PGD examples made on every other run: Table 5 of the paper.

    A row is the run that is attacked, a column the run on which the examples are made.
    """

    eps: tuple[float, ...] = (0.01, 0.02, 0.04)
    """Radii of the ball, in pixels of 0 to 1: a matrix for each."""
    steps: int = 20
    """PGD steps."""

    def check(self) -> None:
        super().check()
        if len(set(self.runs)) < 2:
            raise InputError("transfer needs at least two runs: name the runs to attack each other")
        check_once(tuple(dict.fromkeys(self.runs)))


@dataclass(frozen=True, kw_only=True)
class NormsConfig(Checked):
    """Print, save and plot the norms of every weight matrix of runs: the paper's Figure 1."""

    positional = ("runs",)

    runs: tuple[str, ...] = ()
    """Run directories, or model.safetensors files, of one architecture."""
    out: str | None = None
    """Where the charts go: PATH-frobenius and PATH-spectral, each as .png and .svg (default:
    "norms" in the run, or for several runs in the folder of the first)."""

    def check(self) -> None:
        super().check()
        check_once(self.runs)


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(AttackOfRun):
    """Check whether a run is robust, or whether its gradients only make attacks fail."""

    positional = ("run",)

    run: str = ""
    """A run directory, or a model.safetensors file."""
    partner: str | None = None
    """Another run for the same images, whose adversarial examples are tried on this one."""
    autoattack: bool = False
    """Compare with AutoAttack too, which takes minutes to hours (Croce & Hein 2020; `pip install
    fastiat[autoattack]`)."""
    limit: int = 1000
    """Use this many of the test images only, a stratified draw."""
    eps: float | None = None
    """Radius of the ball, in pixels of 0 to 1 (default: that of the run)."""
    alpha: float | None = None
    """Length of a PGD step, in pixels of 0 to 1 (default: that of the run, or eps/8 if that is
    more)."""

    def check(self) -> None:
        super().check()
        check_ranges(self, {"eps", "alpha"})
        if self.partner is not None:
            check_once((self.run, self.partner))


# The other commands.


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(WithPrecision, WithDataDir):
    """Train and measure what a table of the paper needs, and write it next to the paper's.

    Trainings and measurements that exist are kept: after Ctrl-C or a crash the same command
    continues. The runs have the names that `fastiat train` gives, so its runs are used too. With
    fewer --epochs, a smaller --width and a --limit it fits smaller machines.
    """

    positional = ("target",)

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
    """Seeds to train every row with; the errors of several seeds are averaged (default: 0; figure1:
    0 1 2)."""
    epochs: int | None = None
    """Passes over the training set (default: 200; figure1: 50)."""
    width: int | None = None
    """Base channels (preact18: 64), widening factor (wrn: 10) or hidden units (mlp6: 512)."""
    limit: int | None = None
    """Measure on this many images of a split only, a stratified draw."""
    splits: tuple[str, ...] = ("test", "train")
    """Images that Tables 1 to 4 are measured on; the paper gives train in parentheses."""
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
                raise InputError(f"{flag_of(name)} names one twice: give each once")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Checked):
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
    """cifar10, svhn, fashion-mnist, digits, a .beton file, or the folder of an image tree."""
    out: str = ""
    """The file to write, NAME.beton."""
    format: Literal["raw", "jpeg"] = "raw"
    """How images are stored: "raw" keeps every bit and is read fastest, "jpeg" takes a tenth of the
    space."""
    quality: int = 95
    """Quality of the JPEGs, from 1 to 100."""
    max_side: int | None = None
    """Largest side of the images in pixels: every image is cut square and resized to one side, at
    most this (default: none if all images are squares of one size, else 224)."""
    force: bool = False
    """Replace the file if it exists."""

    def check(self) -> None:
        super().check()
        if not self.out.endswith(".beton"):
            raise InputError(f"{self.out!r} is no name for the file: let it end in .beton")
        if self.quality > 100:
            raise InputError(f"--quality is {self.quality}: give at most 100")
        if self.max_side is not None and self.max_side < SMALLEST_SIDE:
            raise InputError(f"--max-side is {self.max_side}: give at least {SMALLEST_SIDE}")
