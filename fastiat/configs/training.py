"""The settings of `fastiat train`, and its presets."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, Literal, TypeVar

from fastiat.configs.combinations import check_method
from fastiat.configs.shared import PGDOptions, WithDataDir, WithPrecision
from fastiat.system.errors import InputError
from fastiat.system.settings import (
    ARCHS,
    LARGEST_SIDE,
    MOST_STEPS,
    SMALLEST_SIDE,
    check_arch,
    check_dataset,
    check_unit,
    converted,
    did_you_mean,
    fits,
    flag_of,
    is_own_arch,
    norm_name,
)

T = TypeVar("T")
Preset = Literal["paper", "authors", "modern", "strong"]


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
        check_method(self)
        if self.nesterov and not self.momentum:
            raise InputError("--nesterov needs a --momentum above 0; add --no-nesterov")
        if self.patience and self.holdout == 0:
            raise InputError("--patience needs --holdout N, the images to measure the error on")


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
