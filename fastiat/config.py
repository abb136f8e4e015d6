"""How a training runs: its settings, whose field docstrings are the `--help`, and the presets.

From Python as on the command line: `TrainConfig(preset="modern", eps="4/255")` has the preset's
values where none is given. `dataclasses.replace` names every field, so that it keeps them all.
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


def _filled_by_preset(kind: type[T]) -> type[T]:
    """Have the settings that a caller leaves out filled by the preset, as on the command line."""
    init: Callable[..., None] = kind.__init__

    @wraps(init)
    def __init__(self: Any, *values: Any, **given: Any) -> None:
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        for name in given.keys() - names:
            raise TypeError(f"no setting is called {name}{did_you_mean(name, names)}")
        given.update(zip(names, values, strict=False))
        preset = given.get("preset", "paper")
        left_out = names if isinstance(preset, str) and preset in PRESETS else []
        left_out = [name for name in left_out if name not in given]
        # "paper" is the fields' own defaults; a preset is itself made by naming every field.
        if left_out and preset != "paper":
            given |= {name: getattr(PRESETS[preset](), name) for name in left_out}
        init(self, **given)

    kind.__init__ = __init__  # type: ignore[method-assign]
    return kind


@_filled_by_preset
@dataclass(frozen=True)
class TrainConfig(Settings):
    """Train a robust classifier and print its errors; the defaults are the paper's recipe."""

    groups: ClassVar[dict[str, str]] = {
        "preset": "method",
        "dataset": "data",
        "epochs": "optimisation",
        "eps": "attack while training",
        "mix_alpha": "mixing",
        "device": "machine",
        "seed": "run",
    }

    preset: Preset = "paper"
    """Defaults of the other settings: "paper" (section 4.1 of the paper); "authors", the choices of
    the manifold mixup authors' published code; or "modern": stronger attack, more weight decay,
    cosine learning rate, weight averaging, early stopping, fewer epochs."""
    arch: Arch = "preact18"
    """Network."""
    width: int | None = None
    """Base channels (preact18: 64), widening factor (wrn: 10) or hidden units (mlp6: 512)."""
    variant: Literal["standard", "authors"] = "standard"
    """Details of the network: as published, with BatchNorm and ReLU before the pooling (He et al.
    2016), or as in the manifold mixup authors' code, where preact18 has no final BatchNorm and
    needs --loss bce to train, and wrn has biases and other shortcuts."""
    mix: Literal["none", "mixup", "manifold"] = "manifold"
    """Interpolation of both batches: nothing, mixup, or manifold mixup."""
    adv: Literal["none", "fgsm", "pgd"] = "pgd"
    """Attack that makes the adversarial batch; "none" trains on the clean batch alone."""
    dataset: str = "cifar10"
    """Images to train on: cifar10, svhn or fashion-mnist, which are downloaded once; digits, which
    is built in; folder, any train/CLASS/*, test/CLASS/* tree of images under --data-dir; or a file
    that `fastiat convert` has written, NAME.beton."""
    data_dir: str | None = None
    """Where the data set is or goes (default: $FASTIAT_DATA or ~/.cache/fastiat/data)."""
    train_limit: int | None = None
    """Train on this many training images only, a stratified draw by --seed."""
    class_limit: int | None = None
    """Train on at most this many images of each class, a draw by --seed."""
    loader: Literal["auto", "resident", "ffcv"] = "auto"
    """How batches are made: "resident" keeps the whole set as uint8 on the training device, "ffcv"
    reads it from a .beton, converted first (into $FASTIAT_CACHE or ~/.cache/fastiat/betons) if it
    is none; "auto" takes "ffcv", where it is installed, for a .beton and for what does not fit."""
    pad: int = 2
    """Random crops come from images padded by this many zero pixels a side; 0 is no crop."""
    flip: bool | None = None
    """Mirror images at random (default: as the paper for the data set: CIFAR-10 and folders yes,
    the others no)."""

    epochs: int = 200
    """Passes over the training set."""
    batch_size: int = 64
    """Images in a batch; each is used clean and attacked."""
    lr: float = 0.1
    """Highest learning rate."""
    schedule: Literal["step", "cosine"] = "step"
    """Learning rate over time: a tenth after 1/2 and again after 3/4 of the epochs, or a linear
    warm-up over the first tenth and a cosine down to zero."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    weight_decay: float = 1e-4
    """L2 penalty added to the gradient."""
    decay_norm: bool = True
    """Decay BatchNorm parameters and biases too."""
    loss: Literal["ce", "bce"] = "ce"
    """Training loss: cross-entropy, or binary cross-entropy of the softmax."""
    clean_weight: float = 0.5
    """Share of the clean batch in the loss; the adversarial batch has the rest."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, which is then what is
    evaluated and saved; 0 is off."""
    holdout: int | None = 0
    """Training images kept out, a stratified draw, to choose the best epoch by their PGD error;
    0 keeps the last epoch. The modern preset keeps out 1000, or a tenth where that is fewer."""
    patience: int = 0
    """Stop after this many epochs without a better held-out PGD error; 0 never stops."""

    eps: float = 0.03
    """Radius of the attack's L-infinity ball, in pixels of 0 to 1."""
    alpha: float = 0.0075
    """Length of a PGD step, in pixels of 0 to 1."""
    steps: int = 7
    """PGD steps while training."""
    random_start: bool = True
    """Start PGD at a random point of the ball."""
    attack_loss: Literal["ce", "margin"] = "ce"
    """What the attack maximises: cross-entropy, or the best wrong logit minus the true one."""
    bn: Literal["eval", "batch", "update"] = "eval"
    """BatchNorm while crafting: running statistics, the batch's, or the batch's moving the
    running ones."""

    mix_alpha: float | None = None
    """Lambda is drawn from Beta(A, A) (default: mixup 1, manifold 2)."""
    mix_layers: tuple[int, ...] | None = None
    """Mix points drawn from: 0 input, 1 and 2 after the first and second group (default: mixup 0,
    manifold 0 1 2)."""
    mix_space: Literal["standardised", "pixel"] = "standardised"
    """Whether mix point 0 lies after or before the standardisation of the image."""
    lam_per_sample: bool = False
    """Draw a lambda for every image instead of one for the batch."""
    shared_mix: bool = False
    """Mix the adversarial batch as the clean one instead of drawing afresh."""

    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one."""
    engine: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How the step is run: plain PyTorch, compiled, or compiled and captured as CUDA graphs;
    "auto" takes "graph" on CUDA and "eager" on the CPU, where compiling takes minutes."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the network: "bf16" is autocast; "auto" takes it where the device has it."""
    deterministic: bool = False
    """Use only algorithms that repeat bit for bit on the same GPU, which are slower; the CPU's
    always do."""

    seed: int = 0
    """Seed of everything random."""
    checkpoint_every: float = 300.0
    """Seconds between two checkpoints; 0 writes one after every step. The start, the end and a
    signal write one too. A resume may change it."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What follows an update whose loss or gradient is not finite: "stop" ends the training, "skip"
    leaves the update out, for which every step waits for the device. A resume may change it."""
    eval_limit: int | None = None
    """Evaluate on this many test images only, a stratified draw."""
    out: str | None = None
    """Run directory (default: runs/DATASET-ARCH-ADV-MIX-sSEED)."""
    resume: bool = False
    """Continue the run in --out where it stopped, with its own settings."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        check_ranges(
            self,
            {
                "epochs",
                "batch_size",
                "steps",
                "width",
                "eval_limit",
                "mix_alpha",
                "train_limit",
                "class_limit",
            },
        )
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
            raise InputError("--patience needs --holdout N, the images to judge by")
        if self.mix_layers is not None and (
            not self.mix_layers or not set(self.mix_layers) <= {0, 1, 2}
        ):
            raise InputError(f"--mix-layers is {self.mix_layers}: give some of 0, 1 and 2")


def paper() -> TrainConfig:
    """Section 4.1 of the paper; what it leaves open as its authors' published code has it."""
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
    """What the field has learnt since: a more robust model in fewer epochs.

    8/255 and 2/255, decay 5e-4 and padding 4 as in Rice et al. 2020, who also show why the best
    epoch on held-out images must be kept; a cosine schedule; averaged weights (Gowal et al. 2020).
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
    """Where the charts go: PATH-frobenius and PATH-spectral, each as .png and .svg (default:
    "norms" in the run, or for several runs in the folder of the first)."""

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
