"""Settings of every command: frozen dataclasses whose field docstrings are the `--help`.

Nothing here imports torch, so that help is printed at once.
"""

import ast
import inspect
import math
import os
import re
import textwrap
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fastiat.errors import InputError

Arch = Literal["preact18", "wrn28_10", "wrn34_10", "mlp6"]
DatasetName = Literal["cifar10", "svhn", "fashion-mnist", "digits", "folder"]
Preset = Literal["paper", "modern"]
LARGEST = 2**32
"""No number of ours is larger; what is would overflow further in."""
MOST_STEPS = 999_999
"""No attack takes more steps."""


class Settings:
    """What every configuration shares: the field docstrings, readable at run time."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that are arguments of the command line, not flags."""
    groups: ClassVar[dict[str, str]] = {}
    """The headings of `--help`, each keyed by the first field under it."""
    bare: ClassVar[dict[str, Any]] = {}
    """Values of the fields whose flag can stand without any."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""

    @classmethod
    @cache
    def docs(cls) -> dict[str, str]:
        """Map every field to the docstring written under it."""
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(body, ast.ClassDef)
        shared = cls.__bases__[0]
        found = dict(shared.docs()) if issubclass(shared, Settings) else {}
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
                found[field.target.id] = " ".join(str(text.value.value).split())
        return found


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
    """Defaults of the other settings: "paper" (section 4.1 of the paper), or "modern": stronger
    attack, more decay, smooth learning rate, weight averaging, early stopping, fewer epochs."""
    arch: Arch = "preact18"
    """Network."""
    width: int | None = None
    """Base channels (preact18: 64), widening factor (wrn: 10) or hidden units (mlp6: 512)."""
    mix: Literal["none", "mixup", "manifold"] = "manifold"
    """Interpolation of both batches: nothing, mixup, or manifold mixup."""
    adv: Literal["none", "fgsm", "pgd"] = "pgd"
    """Attack that makes the adversarial batch; "none" trains on the clean batch alone."""
    dataset: DatasetName = "cifar10"
    """Images to train on; "digits" is built in, "folder" is any train/CLASS/*, test/CLASS/* tree
    of images of one size under --data-dir, the others are downloaded once."""
    data_dir: str | None = None
    """Where the data set is or goes (default: $FASTIAT_DATA or ~/.cache/fastiat/data)."""
    loader: Literal["auto", "resident"] = "auto"
    """How batches are made; "resident" keeps the whole set as uint8 on the training device."""
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
    eval_limit: int | None = None
    """Evaluate on this many test images only, a stratified draw."""
    out: str | None = None
    """Run directory (default: runs/DATASET-ARCH-ADV-MIX-sSEED)."""
    resume: bool = False
    """Continue the run in --out where it stopped, with its own settings."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        _check_ranges(self, {"epochs", "batch_size", "steps", "width", "eval_limit", "mix_alpha"})
        _check_unit(self)
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
    dataset: DatasetName | None = None
    """Data set (default: the run's)."""
    data_dir: str | None = None
    """Where the data set is (default: the run's)."""
    batch_size: int = 500
    """Images attacked at a time."""
    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic that crafts the examples; they are always judged in fp32."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        _check_ranges(self, {"limit", "restarts", "batch_size", "steps"})
        if self.norm == "linf":
            _check_unit(self)
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
        _check_once(tuple(dict.fromkeys(self.runs)))


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
        _check_ranges(self, set())
        _check_once(self.runs)


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
    dataset: DatasetName | None = None
    """Data set (default: the run's)."""
    data_dir: str | None = None
    """Where the data set is (default: the run's)."""
    batch_size: int = 500
    """Images attacked at a time."""
    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        _check_ranges(self, {"limit", "batch_size", "eps", "alpha"})
        if self.norm == "linf":
            _check_unit(self)
        if self.partner is not None:
            _check_once((self.run, self.partner))


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
    """Highest learning rate (default: 0.1; digits: 0.02; figure1: 0.01)."""

    data_dir: str | None = None
    """Where the data set is or goes (default: $FASTIAT_DATA or ~/.cache/fastiat/data)."""
    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" takes CUDA where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of training and crafting; examples are always judged in fp32."""

    def check(self) -> None:
        """Raise `InputError`, naming the flag, for a value outside its range."""
        _check_ranges(self, {"epochs", "width", "limit"})
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


def _check_ranges(config: Any, positive: set[str]) -> None:
    """Raise `InputError` unless every number is finite, sane and at least 0, or above it."""
    for field in fields(config):
        given, flag = getattr(config, field.name), flag_of(field.name)
        if given == "":
            raise InputError(f"{flag} is empty: give it a value, or leave it out")
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{flag} is {value}: give a finite number")
            if value < 0 or (value == 0 and field.name in positive):
                least = "above 0" if field.name in positive else "of at least 0"
                raise InputError(f"{flag} is {value}: give a number {least}")
            if value > LARGEST:
                raise InputError(f"{flag} is {str(value)[:20]}: give a number of at most {LARGEST}")


def _check_once(runs: tuple[str, ...]) -> None:
    """Raise `InputError` for a run that is named twice, however it is spelled."""
    places = [os.path.realpath(run) for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{run} is named twice: name different runs")


def _check_unit(config: Any) -> None:
    """Raise `InputError` for an eps or alpha that looks like one for pixels of 0 to 255."""
    for name in ("eps", "alpha"):
        given = getattr(config, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and value > 1:
                raise InputError(
                    f"--{name} is {value:g}, but pixels are in 0 to 1: give, say, {value:g}/255"
                )


def steps_of(attack: str) -> int:
    """Return the gradient steps of an attack's name: none 0, fgsm 1, pgd-K K.

    Raises `InputError` for any other name.
    """
    if attack in ("none", "fgsm"):
        return ("none", "fgsm").index(attack)
    if re.fullmatch("pgd-[1-9][0-9]{0,5}", attack):
        return int(attack.removeprefix("pgd-"))
    raise InputError(f"unknown attack {attack!r}: choose from none, fgsm, pgd-K such as pgd-20")


def paper() -> TrainConfig:
    """Section 4.1 of the paper; what it leaves open as its authors' published code has it."""
    return TrainConfig()


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


PRESETS = {"paper": paper, "modern": modern}

# At 0.1 preact18, which ends without a BatchNorm, diverges on images of 8x8 pixels.
DATASET_DEFAULTS: dict[str, dict[str, Any]] = {"digits": {"lr": 0.02}}
"""Defaults of the command line for one data set, over those of any preset."""


def flag_of(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def from_json(kind: type[Any], values: dict[str, Any]) -> Any:
    """Rebuild a configuration written as JSON, refusing fields it does not know and wrong types.

    Raises `InputError` that names the field.
    """
    known = {field.name for field in fields(kind)}
    for name in values:
        if name not in known:
            raise InputError(f"unknown setting {name!r}; was it written by another version?")
    hints = get_type_hints(kind)
    turned = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in turned.items():
        if not fits(value, hints[name]):
            raise InputError(f"setting {name!r} cannot be {repr(value)[:50]}")
    return kind(**turned)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is one that the annotation allows."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if get_args(hint):
        return any(fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint
