"""The settings of every command, a frozen dataclass for each, and the presets of `fastiat train`.

The docstring under a field is its `--help`. The settings are the same in Python and on the command
line: `TrainConfig(preset="modern", eps="4/255")` takes each setting that is not given from the
preset. `dataclasses.replace` gives every field, so it never fills in values of a preset.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, ClassVar, Literal, TypeVar

from fastiat.system.errors import InputError
from fastiat.system.settings import (
    ARCHS,
    LARGEST_SIDE,
    MOST_STEPS,
    SMALLEST_SIDE,
    Arch,
    DatasetName,
    Settings,
    check_arch,
    check_dataset,
    check_once,
    check_ranges,
    check_unit,
    converted,
    did_you_mean,
    fits,
    flag_of,
    is_own_arch,
    norm_name,
    steps_of,
)

T = TypeVar("T")
Preset = Literal["paper", "authors", "modern", "strong"]
POSITIVE = {
    *("epochs", "batch_size", "steps", "width", "mix_alpha", "restarts", "quality", "max_side"),
    *("limit", "eval_limit", "train_limit", "class_limit", "image_size", "extra_fraction"),
}
"""Settings that must be greater than 0; all other numeric settings may be 0."""


# Groups of settings that several commands share.


class Checked(Settings):
    """Settings whose types and ranges are checked."""

    def check(self) -> None:
        """Raise `InputError`, which names the flag, for a value of wrong type or out of range."""
        check_ranges(self, POSITIVE)
        for split in getattr(self, "splits", ()):
            if split not in ("test", "train"):
                raise InputError(f"unknown split {split!r}: choose from test, train")


@dataclass(frozen=True)
class OnDevice(Checked):
    """The device that a command uses."""

    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" is CUDA if a CUDA device is available."""


@dataclass(frozen=True)
class WithPrecision(OnDevice):
    """The device and the precision that a command uses."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of training and attack: "bf16" is bf16 autocast; "auto" is "bf16" on a device with
    fast bf16, else "fp32". Errors are always measured in fp32."""


@dataclass(frozen=True)
class WithDataDir(Checked):
    """The folder that holds the files of a data set."""

    data_dir: str | None = None
    """Folder of the data set; a missing data set is downloaded into it (default: $FASTIAT_DATA
    or ~/.cache/fastiat/data)."""


@dataclass(frozen=True)
class PGDOptions(Checked):
    """The loss that PGD maximises, and its starting point."""

    attack_loss: Literal["ce", "margin"] = "ce"
    """Loss that the attack maximises: "ce" is cross-entropy; "margin" is the highest logit of a
    wrong class minus the logit of the true class."""
    random_start: bool = True
    """Start PGD at a random point of the eps ball instead of at the image."""


@dataclass(frozen=True)
class WithOwnNetwork(Checked):
    """The function of a network of the user's own, which a run does not name by itself."""

    arch: str | None = None
    """Function of your own network, MODULE:FUNCTION, for runs that trained one: a file of a run
    never says which code to import."""

    def check(self) -> None:
        super().check()
        if self.arch is not None and not is_own_arch(self.arch):
            raise InputError(
                f"--arch {self.arch}: a run knows its network; --arch is for a network of your "
                f"own, MODULE:FUNCTION or FILE.py:FUNCTION"
            )
        check_arch(self.arch)


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


def _l2_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the default radius and step size of the L2 ball, if `given` chooses it, else {}.

    Radius 0.5 is that of RobustBench's L2 models (Croce et al. 2021), and PGD with K steps of
    length 2.5 eps / K can cross the ball (Madry et al. 2018).
    """
    if norm_name(given.get("norm")) != "l2":
        return {}
    eps, steps = (
        converted(given.get(name, default), float) for name, default in (("eps", 0.5), ("steps", 7))
    )
    if not (fits(eps, float) and fits(steps, float) and steps > 0):
        return {}  # `check` refuses these values
    return {"eps": eps, "alpha": 2.5 * eps / steps}


def _awp_warmup(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the warm-up of AWP that a preset's `values` mean for the settings in `given`.

    It is at most a tenth of the epochs, and 0 without AWP.
    """
    epochs = converted(given.get("epochs", values["epochs"]), int)
    if not converted(given.get("awp", values["awp"]), float) or not fits(epochs, int):
        return {"awp_warmup": 0}
    return {"awp_warmup": min(values["awp_warmup"], max(epochs // 10, 0))}


def _filled_by_preset(kind: type[T]) -> type[T]:
    """Make the constructor of a settings class use the values of the given preset as defaults."""
    init: Callable[..., None] = kind.__init__
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]

    @wraps(init)
    def __init__(self: Any, **given: Any) -> None:
        for name in given.keys() - set(names):
            raise TypeError(f"no setting is called {name}{did_you_mean(name, names)}")
        preset = converted(given.get("preset", "paper"), Preset)
        # The preset "paper" is the field defaults. A call that gives every field needs no preset;
        # `PRESETS[preset]()` makes such a call in `replace`, so there is no endless recursion.
        if fits(preset, Preset) and preset != "paper" and len(given) < len(names):
            values = vars(PRESETS[preset]())
            given = values | _awp_warmup(values, given) | _l2_defaults(given) | given
        elif len(given) < len(names):
            given = _l2_defaults(given) | given
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
    the manifold mixup authors' published code; "modern": stronger attack, more weight decay,
    cosine learning rate, averaged weights, early stopping, fewer epochs; or "strong": the same with
    TRADES and AWP, without mixing, for more epochs."""
    arch: str = "preact18"
    """Network: preact18, wrn28_10, wrn34_10, mlp6, torchvision:NAME, timm:NAME, or a function of
    your own that returns an nn.Module, MODULE:FUNCTION or FILE.py:FUNCTION; it is called with
    num_classes, and with in_channels and image_size where it takes them."""
    pretrained: bool = False
    """Start from the default weights of torchvision or timm, which are downloaded once."""
    init: str | None = None
    """Start from these weights: a run, or a .safetensors file of the same network. A classifier for
    another number of classes keeps its initial weights."""
    width: int | None = None
    """Base channels (preact18: 64), widening factor (wrn: 10) or hidden units (mlp6: 512)."""
    activation: Literal["relu", "silu"] = "relu"
    """Activation of preact18, wrn28_10 and wrn34_10; SiLU is smooth (Gowal et al. 2020)."""
    variant: Literal["standard", "authors"] = "standard"
    """Details of the network: "standard" is as published, with BatchNorm and ReLU before the
    pooling (He et al. 2016); "authors" is as in the manifold mixup authors' code, where preact18
    has no final BatchNorm and needs --loss bce to train, and wrn has biases and different
    shortcuts."""
    normalise: tuple[str, ...] | None = None
    """First layer of the network, behind the attack: "image" standardises every image, as in the
    paper; "imagenet" uses the mean and standard deviation of ImageNet's channels; "none" changes
    nothing; otherwise a mean and then a standard deviation for each channel, such as six numbers
    (default: image; that of their weights for torchvision and timm; none for your own)."""
    mix: Literal["none", "mixup", "manifold", "cutmix"] = "manifold"
    """Interpolation of the clean and the adversarial batch: none, mixup, manifold mixup, or CutMix,
    which pastes a box of another image (Yun et al. 2019)."""
    adv: Literal["none", "fgsm", "pgd", "n-fgsm"] = "pgd"
    """Attack that makes the adversarial batch; "none" trains on the clean batch alone. "n-fgsm" is
    one step of length --eps from a random point, and the result may lie outside of the ball (de
    Jorge et al. 2022); every epoch, PGD-10 and FGSM on 1000 training images that are held out, or a
    tenth if that is fewer, show whether the training has overfitted to it."""
    objective: Literal["at", "trades", "mart"] = "at"
    """Loss of an update: "at" is Algorithm 1 of the paper, the mean of the losses of the clean and
    the adversarial batch; "trades" is the clean loss plus --beta times the divergence of the
    adversarial predictions, which is what the attack raises (Zhang et al. 2019); "mart" weighs the
    divergence by the clean error (Wang et al. 2020). Their attack starts from normal noise of
    standard deviation 0.001, and both batches are mixed by the same draw."""
    beta: float = 6.0
    """Weight of the divergence of --objective trades and mart."""
    awp: float = 0.0
    """Adversarial weight perturbation: the gradient of the adversarial loss is taken at weights
    that one ascent step of this length, relative to the norm of each layer, has changed (Wu et al.
    2020: 0.01, with trades 0.005); 0 turns it off."""
    awp_warmup: int = 0
    """Epochs before --awp begins, fewer than --epochs. That of a preset is at most a tenth of
    --epochs."""
    attack_mixed: bool = False
    """Mix the clean images first and attack the mixed images with their mixed labels; the clean
    batch has no loss."""
    noise: float = 2.0
    """Radius of the random start of --adv n-fgsm, as a multiple of --eps."""
    dataset: str = "cifar10"
    """Images to train on: cifar10, cifar100, svhn or fashion-mnist, downloaded once; digits, which
    is built in; folder, a tree of images train/CLASS/*, test/CLASS/* in --data-dir; or a file that
    `fastiat convert` has written, NAME.beton."""
    train_limit: int | None = None
    """Train on this many training images only, a stratified sample drawn with --seed."""
    class_limit: int | None = None
    """Train on at most this many images of each class, a random sample drawn with --seed."""
    image_size: int | None = None
    """Side of the images, in pixels, that the network gets. The images of a folder may then have
    any sizes and shapes: the shorter side is resized to 8/7 of N, and the centre square of side N
    is cut out, as in torchvision's recipe for ImageNet; other data sets are resized to N (default:
    the images' own side)."""
    augment: Literal["crop", "resized-crop", "none"] = "crop"
    """Random changes of training images: "crop" shifts them by up to --pad pixels and flips;
    "resized-crop" cuts out a part of 25 to 100 % of the area, resizes it to the size of the images
    and flips; "none" changes nothing."""
    loader: Literal["auto", "resident", "ffcv"] = "auto"
    """How batches are made: "resident" keeps the whole data set as uint8 on the training device;
    "ffcv" reads a .beton file, and first converts any other data set to such a file (in
    $FASTIAT_CACHE or ~/.cache/fastiat/betons); "auto" is "ffcv", if FFCV is installed, for a .beton
    file and for a data set that does not fit into memory, else "resident"."""
    pad: int = 2
    """Zero pixels added on each side of an image before a random crop; 0 turns random crops off."""
    flip: bool | None = None
    """Flip images horizontally at random (default: as in the paper for the data set: yes for
    CIFAR-10 and folders, no for the others)."""
    extra: str | None = None
    """Further training images, such as generated ones: a .npz file with image, (N, H, W, C) uint8,
    and label, (N,) whole numbers (Gowal et al. 2021, Wang et al. 2023). Every batch takes a fixed
    share of them, each equally often; an epoch still uses every image of the data set once."""
    extra_fraction: float = 0.7
    """Share of the images of a batch that come from --extra, above 0 and below 1."""

    epochs: int = 200
    """Passes over the training set."""
    batch_size: int = 64
    """Images per batch; each image is used once clean and once attacked."""
    lr: float = 0.1
    """Highest learning rate."""
    schedule: Literal["step", "cosine"] = "step"
    """Learning rate schedule: "step" divides by 10 after 1/2 and after 3/4 of the epochs; "cosine"
    is a linear warm-up over the first tenth, then a cosine decay to zero."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty added to the gradient."""
    decay_norm: bool = True
    """Apply the weight decay to BatchNorm parameters and biases too."""
    loss: Literal["ce", "bce"] = "ce"
    """Training loss: "ce" is cross-entropy; "bce" is binary cross-entropy of the softmax."""
    smoothing: float = 0.0
    """Label smoothing, from 0 to 1: the weight of the uniform distribution in the labels of the
    training loss (Szegedy et al. 2016). The attack uses the true labels."""
    clean_weight: float = 0.5
    """Weight of the clean batch in the loss, from 0 to 1; the adversarial batch has 1
    minus this weight."""
    ema: float = 0.0
    """Decay per update of an exponential moving average of the weights; if the decay is above 0,
    the averaged weights are evaluated and saved. 0 turns averaging off."""
    holdout: int | None = 0
    """Training images to hold out, a stratified sample, on which the epoch with the lowest PGD
    error is chosen; 0 keeps the last epoch. The modern preset holds out 1000, or a tenth of the
    training set if that is fewer."""
    patience: int = 0
    """Stop after this many epochs without a lower PGD error on the --holdout images; 0 never
    stops."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the attack's eps ball: "linf" or "l2", the Euclidean norm of each image."""
    eps: float = 0.03
    """Radius of the attack's eps ball, for pixels in [0, 1]; with --norm l2 the default is 0.5."""
    alpha: float = 0.0075
    """PGD step size, for pixels in [0, 1]; with --norm l2 the default is 2.5 eps / steps."""
    steps: int = 7
    """Number of PGD steps during training."""
    bn: Literal["eval", "batch", "update"] = "eval"
    """BatchNorm during the attack: "eval" uses the running statistics; "batch" uses the batch
    statistics; "update" uses the batch statistics and updates the running statistics."""

    mix_alpha: float | None = None
    """Lambda is drawn from Beta(A, A) (default: mixup 1, manifold 2)."""
    mix_at: tuple[str, ...] | None = None
    """Places to choose from at random, at which the batch is mixed: "input" or 0, numbers of the
    network's own mix points (1 and 2 are after the first and second group of blocks), or names of
    modules, whose output is mixed (default: mixup 0; manifold all of the network's own)."""
    mix_space: Literal["standardised", "pixel"] = "standardised"
    """Whether the input is mixed after ("standardised") or before ("pixel") the network's
    normalisation."""
    lam_per_sample: bool = False
    """Draw a lambda for every image instead of one for the batch."""
    shared_mix: bool = False
    """Mix the adversarial batch with the clean batch's lambda, pairs and mix point instead of a new
    draw."""

    engine: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How an update is run: "eager" is plain PyTorch; "compile" is torch.compile; "graph" is
    torch.compile with CUDA graphs; "auto" is "graph" on CUDA and "eager" on the CPU, where
    compiling takes minutes."""
    deterministic: bool = False
    """Use only deterministic algorithms: the same GPU gives bitwise equal results, more slowly. On
    the CPU all algorithms are deterministic."""

    seed: int = 0
    """Seed of all random numbers."""
    checkpoint_every: float = 300.0
    """Seconds between two checkpoints; 0 saves a checkpoint after every update. A checkpoint is
    also saved at the start, at the end and after a signal. A resume can change this setting."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Reaction to an update whose loss or gradient is not finite: "stop" ends the training; "skip"
    discards the update, and makes every update wait for the device. A resume can change this
    setting."""
    eval_limit: int | None = None
    """Evaluate on this many test images only, a stratified sample."""
    out: str | None = None
    """Run directory (default: runs/DATASET-ARCH-ADV-MIX-sSEED; DATASET of a folder of images is
    "folder-" and its name; with another method than Algorithm 1, its name stands in place of ADV,
    such as trades-awp)."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with the settings of that run."""

    @property
    def method_name(self) -> str:
        """Name of what is trained besides the mixing: for Algorithm 1, the attack."""
        parts: list[str] = [self.adv if self.objective == "at" else self.objective]
        if self.objective != "at" and self.adv != "pgd":
            parts.append(self.adv)
        parts += ["mixed"] * self.attack_mixed + ["awp"] * (self.awp > 0)
        return "-".join(parts)

    def check(self) -> None:
        super().check()
        check_arch(self.arch)
        if self.steps > MOST_STEPS:
            raise InputError(f"--steps is {self.steps}: give at most {MOST_STEPS}")
        if self.activation != "relu" and (self.arch not in ARCHS or self.arch == "mlp6"):
            raise InputError(
                f"--activation is for preact18, wrn28_10 and wrn34_10, not for --arch {self.arch}"
            )
        if self.arch not in ARCHS and (self.width is not None or self.variant != "standard"):
            flag = "--variant" if self.width is None else "--width"
            raise InputError(f"{flag} is for the networks of fastiat, not for --arch {self.arch}")
        if self.pretrained and (self.arch in ARCHS or is_own_arch(self.arch)):
            raise InputError(
                f"--pretrained is for networks of torchvision and timm, not for --arch "
                f"{self.arch}: give a file of weights with --init"
            )
        if self.pretrained and self.init:
            raise InputError("--pretrained and --init both give initial weights: leave one out")
        if self.norm == "linf":
            check_unit(self)
        check_dataset(self.dataset)
        if self.image_size is not None and not SMALLEST_SIDE <= self.image_size <= LARGEST_SIDE:
            raise InputError(
                f"--image-size is {self.image_size}: give {SMALLEST_SIDE} to {LARGEST_SIDE}"
            )
        if self.augment == "none" and self.flip:
            raise InputError("--augment none and --flip contradict each other: leave one out")
        if self.extra is None and self.extra_fraction != TrainConfig.extra_fraction:
            raise InputError("--extra-fraction needs --extra FILE, the images to take")
        for name in ("ema", "momentum", "extra_fraction"):
            if getattr(self, name) >= 1:
                raise InputError(f"{flag_of(name)} is {getattr(self, name)}: give less than 1")
        for name in ("clean_weight", "smoothing"):
            if getattr(self, name) > 1:
                raise InputError(
                    f"{flag_of(name)} is {getattr(self, name)}: give a number from 0 to 1"
                )
        self._check_method()
        if self.nesterov and not self.momentum:
            raise InputError("--nesterov needs a --momentum above 0; add --no-nesterov")
        if self.patience and self.holdout == 0:
            raise InputError("--patience needs --holdout N, the images to measure the error on")

    def _check_method(self) -> None:
        """Raise `InputError` for settings of the method that cannot go together."""
        usual = {f.name: f.default for f in fields(self)}
        joint = self.objective != "at"
        chosen = f"--objective {self.objective}"

        def refuse(wrong: bool, first: str, second: str, why: str) -> None:
            if wrong:
                raise InputError(f"{first} and {second} cannot go together: {why}")

        changed = {name for name in usual if getattr(self, name) != usual[name]}
        if joint:
            refuse(self.adv == "none", chosen, "--adv none", "it compares with adversarial images")
            refuse(
                "clean_weight" in changed, chosen, "--clean-weight",
                "--beta is the weight of its terms",
            )  # fmt: skip
            refuse(
                self.shared_mix, chosen, "--shared-mix", "its batches are mixed by one draw always"
            )
        if self.objective == "trades":
            why = "the divergence has no gradient at the image itself"
            refuse(self.adv == "fgsm", chosen, "--adv fgsm", why)
            refuse(not self.random_start, chosen, "--no-random-start", why)
            refuse(self.adv == "n-fgsm" and not self.noise, chosen, "--noise 0", why)
            refuse(
                self.attack_loss != "ce", chosen, f"--attack-loss {self.attack_loss}",
                "its attack raises the divergence",
            )  # fmt: skip
        if self.objective == "mart":
            why = "its loss is defined for cross-entropy and labels of one class"
            refuse(self.loss != "ce", chosen, f"--loss {self.loss}", why)
            refuse(self.smoothing > 0, chosen, "--smoothing", why)
        refuse(
            "beta" in changed and not joint, "--beta", "--objective at",
            "Algorithm 1 has no divergence; use --clean-weight",
        )  # fmt: skip
        if self.attack_mixed:
            mixes = f"--mix {self.mix}"
            refuse(self.mix == "none", "--attack-mixed", mixes, "use --mix mixup or cutmix")
            refuse(
                self.mix == "manifold", "--attack-mixed", mixes,
                "an attack changes pixels; use --mix mixup or cutmix",
            )  # fmt: skip
            refuse(self.adv == "none", "--attack-mixed", "--adv none", "it needs an attack")
            refuse(joint, "--attack-mixed", chosen, "its loss has no clean batch")
            why = "its loss has no clean batch"
            refuse("clean_weight" in changed, "--attack-mixed", "--clean-weight", why)
            refuse(self.shared_mix, "--attack-mixed", "--shared-mix", why)
            refuse(
                self.mix_space != "standardised", "--attack-mixed", "--mix-space",
                "it mixes pixels always",
            )  # fmt: skip
            refuse(self.mix_at is not None, "--attack-mixed", "--mix-at", "it mixes pixels always")
            refuse(
                self.attack_loss != "ce", "--attack-mixed", f"--attack-loss {self.attack_loss}",
                "the margin is not defined for mixed labels",
            )  # fmt: skip
        refuse(
            self.mix == "cutmix" and self.mix_at not in (None, ("input",), ("0",)),
            "--mix cutmix", "--mix-at", "boxes are pasted into images",
        )  # fmt: skip
        refuse(
            self.awp > 0 and self.adv == "none", "--awp", "--adv none",
            "the weights are perturbed along the adversarial loss",
        )  # fmt: skip
        refuse(
            self.awp_warmup > 0 and not self.awp, "--awp-warmup", "--awp 0", "nothing would begin"
        )
        refuse(
            self.awp > 0 and self.awp_warmup >= self.epochs, f"--awp-warmup {self.awp_warmup}",
            f"--epochs {self.epochs}", "--awp would not begin before the training ends",
        )  # fmt: skip
        for name in ("mix_at", "mix_alpha", "mix_space", "lam_per_sample", "shared_mix"):
            refuse(
                self.mix == "none" and name in changed, flag_of(name), "--mix none",
                "nothing is mixed",
            )  # fmt: skip
        refuse(
            "noise" in changed and self.adv != "n-fgsm", "--noise", f"--adv {self.adv}",
            "it is for --adv n-fgsm",
        )  # fmt: skip
        refuse(
            self.adv == "n-fgsm" and not self.random_start, "--adv n-fgsm", "--no-random-start",
            "use --noise 0 or --adv fgsm",
        )  # fmt: skip


def paper() -> TrainConfig:
    """Return the recipe of section 4.1 of the paper, completed from its authors' published code."""
    return TrainConfig()


def authors() -> TrainConfig:
    """Return the paper's recipe with the choices of the manifold mixup authors' published code.

    The code is vikasverma1077/manifold_mixup; the IAT paper shares its first author. The choices
    are binary cross-entropy of the softmax, no final BatchNorm in preact18, a different wide
    ResNet, eps 8/255, alpha 2/255, and at most 7,325 training images of a class, which leaves
    62,156 of SVHN's 73,257.
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
    """Return a recipe from later papers, which gives a more robust model in fewer epochs.

    Eps 8/255, alpha 2/255, weight decay 5e-4 and padding 4 are as in Rice et al. 2020, who also
    show why the best epoch on held-out images has to be kept. The schedule is a cosine, and the
    weights are averaged (Gowal et al. 2020).
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


def strong() -> TrainConfig:
    """Return a recipe for the lowest robust error: TRADES with AWP on top of `modern`.

    TRADES with beta 6, 10 attack steps and AWP 0.005 after 10 epochs is the published recipe of Wu
    et al. 2020. RobustBench lists their WRN-34-10 at an error of 43.8 % under AutoAttack, and that
    of TRADES alone at 46.9 %. AWP delays overfitting to the attack, so longer training pays: 100
    epochs, of which the best on held-out images is kept. The weights are averaged (Gowal et al.
    2020). No mixing: AWP is a regulariser already, and that CutMix adds to it (Rebuffi et al. 2021)
    is shown for wide networks and averaged weights alone. These choices are the papers', not
    measured here.
    """
    return replace(
        modern(),
        preset="strong",
        mix="none",
        objective="trades",
        beta=6.0,
        steps=10,
        awp=0.005,
        awp_warmup=10,
        epochs=100,
        patience=0,
    )


PRESETS = {"paper": paper, "authors": authors, "modern": modern, "strong": strong}


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
