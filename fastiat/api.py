"""Train and measure a network of your own from Python: `fastiat.fit`, `fastiat.evaluate_model`.

run = fastiat.fit(model, (images, labels), (test_images, test_labels), mix="manifold",
                  mix_at=["layer1", "layer2"], eps="4/255", epochs=30, out="runs/mine")
print(run.clean_error, run.robust_error)
"""

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastiat import data
from fastiat.config import EvaluateConfig, TrainConfig
from fastiat.engine.device import own_defaults, pick_device
from fastiat.engine.graphs import prepared
from fastiat.engine.modes import attack_mode
from fastiat.images.pixels import pixels_of
from fastiat.measuring.autoattack import autoattack, check_classes, library_version
from fastiat.measuring.jobs import class_names
from fastiat.measuring.one_pass import default_batch, fooled, title
from fastiat.networks.check import check_network
from fastiat.runs.directory import Run, load
from fastiat.runs.results import Rate
from fastiat.system.errors import InputError, one_line
from fastiat.system.settings import DATASETS, did_you_mean, expanded, is_beton
from fastiat.train import train as train_run

ATTACKS = ("none", "pgd-20")
"""Attacks that `fit` measures the trained network under."""
FORMS = (
    "give a fastiat.data.Split, (images, labels), a data set of torchvision, or a name or a path "
    "as for --dataset"
)
PIXELS = "give uint8, or floats in [0, 1]"
Images = Any
"""A `fastiat.data.Split`, a pair (images, labels), a map-style data set, or a name or path."""


@dataclass(frozen=True)
class Measured:
    """The error rates of a network."""

    errors: Mapping[str, Rate]
    """The error rate under each attack, by its name, such as "none" and "pgd-20"."""
    eps: float
    """Radius of the eps ball, for pixels in [0, 1]."""
    norm: str
    """Norm of the eps ball, "linf" or "l2"."""

    @property
    def clean_error(self) -> float:
        """Error on images that are not attacked, in percent."""
        return self.errors["none"].percent

    @property
    def robust_error(self) -> float:
        """Error under the attack that fools the most images, in percent.

        Raises `InputError` if no attack was measured.
        """
        rates = [rate.percent for attack, rate in self.errors.items() if attack != "none"]
        if not rates:
            raise InputError("no attack was measured: name one in attacks, such as pgd-20")
        return max(rates)

    def __repr__(self) -> str:
        rates = ", ".join(f"{title(attack)} {rate} %" for attack, rate in self.errors.items())
        n = next(iter(self.errors.values())).n
        return f"<errors of {n} images: {rates} ({self.norm} eps {self.eps:.4g})>"


@dataclass(frozen=True, repr=False)
class Fitted(Measured):
    """A finished training: the network, its error rates and its run directory."""

    model: nn.Module
    """The trained network, in eval mode: the one that was given, or with `normalise` a network that
    holds the given one behind its normalisation."""
    path: Path
    """The run directory, which `fastiat report` and the other commands read."""
    history: tuple[dict[str, Any], ...]
    """A row of figures for each epoch, as in metrics.jsonl."""

    def __repr__(self) -> str:
        return f"<run {self.path}, {len(self.history)} epochs: {super().__repr__()[1:]}"


@own_defaults(keep_device=True)
def fit(
    model: nn.Module,
    train: Images,
    test: Images = None,
    *,
    mix: str = "manifold",
    mix_at: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    **settings: Any,
) -> Fitted:
    """Train `model` by Interpolated Adversarial Training, measure it, and return the run.

    model: any `nn.Module` from pixels in [0, 1], (B, C, H, W), to logits, (B, K). It is trained in
        place and left on the training's device, in eval mode, with the weights of the kept epoch.
    train, test: images and labels, as a `fastiat.data.Split`; a pair of NumPy arrays or tensors,
        uint8 or floats in [0, 1] (which are rounded to uint8), (N, H, W, C), (N, C, H, W) or
        (N, H, W), with integer labels; a map-style data set, such as torchvision's, of PIL images
        or tensors, with its own transform applied once to every image; or a name or a path as for
        `--dataset`. For a name or a path, `test` may be None: its own test images.
    mix, mix_at: interpolation, and the names of the modules to mix at; see `fastiat train --help`.
    classes: names of the classes in the order of the logits; by default those of the data set, or
        their numbers.
    settings: every other setting of `fastiat train`, such as eps, epochs, norm, normalise, out and
        resume; see `fastiat.config.TrainConfig`. Images are flipped at random unless flip=False.

    Raises `InputError` (a `ValueError`), before anything is written, for wrong settings, images or
    networks, and the errors of `fastiat.train.train`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: give an nn.Module")
    names = {field.name for field in fields(TrainConfig)} - {"arch", "dataset", "data_dir", "mix"}
    for name in settings.keys() - names:
        raise TypeError(f"fit has no setting {name}{did_you_mean(name, names)}")
    kind = type(model)
    arch = f"{kind.__module__}:{kind.__name__}"
    if isinstance(settings.get("device"), torch.device):
        settings["device"] = str(settings["device"])
    given = {"mix": mix, "mix_at": mix_at, "arch": arch, "dataset": data.IN_PYTHON} | settings
    config = TrainConfig(**given)
    if _is_name(train):
        config = replace(config, **_dataset_of(train))
    config.check()
    dataset = _dataset(model, train, test, classes, config)
    with prepared(pick_device(config.device)):
        path = train_run(config, model, dataset)
    trained = load(path, _device_of(model), model=model)
    measured = evaluate_model(
        trained,
        dataset.test,
        ATTACKS,
        eps=config.eps,
        alpha=config.alpha,
        norm=config.norm,
        limit=config.eval_limit,
        precision=config.precision,
    )
    rows = tuple(row for row in Run.open(path).rows() if row["kind"] == "epoch")
    return Fitted(measured.errors, config.eps, config.norm, trained, path, rows)


@own_defaults(keep_device=True)
def evaluate_model(
    model: nn.Module,
    test: Images,
    attacks: Sequence[str] = ("none", "fgsm", "pgd-7", "pgd-20"),
    *,
    eps: float | str | None = None,
    alpha: float | str | None = None,
    **settings: Any,
) -> Measured:
    """Return the error rates of `model` on `test` under each attack.

    model: any `nn.Module` from pixels in [0, 1] to logits, measured on its own device. Its flags
        and weights stay as they are.
    test: images and labels, as for `fit`; for a name or a path, its test images.
    attacks: names such as "none", "fgsm", "pgd-20" and "autoattack"; "none" is always measured.
    eps, alpha: radius and step size for pixels in [0, 1]; the defaults are those of `fit`.
    settings: norm, attack_loss, restarts, random_start, limit, batch_size, precision and seed, as
        for `fastiat evaluate`.

    Raises `InputError` (a `ValueError`) for wrong settings, images or networks.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: give an nn.Module")
    given = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    names = tuple(dict.fromkeys(("none", *(name for name in given if name != "autoattack"))))
    allowed = {field.name for field in fields(EvaluateConfig)} - {"runs", "splits", "arch", "worst"}
    for name in settings.keys() - allowed:
        raise TypeError(f"evaluate_model has no setting {name}{did_you_mean(name, allowed)}")
    device = str(_device_of(model))
    own: dict[str, Any] = {"attacks": names, "eps": eps, "alpha": alpha, "device": device}
    config = EvaluateConfig(**own | settings)
    config.check()
    config = config.filled(None)
    radius, step = config.eps, config.alpha
    assert radius is not None and step is not None
    split = data.load(**_load_options(test)).test if _is_name(test) else as_split(test)
    count = _logits(model, split) or int(split.labels.max()) + 1
    attacked = len(names) > 1 or "autoattack" in given or config.autoattack
    check_network(model, split.shape, count, trained=False, attacked=attacked)
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= count:
        raise InputError(
            f"labels run from {low} to {high}, but the network has {count} classes: number the "
            f"classes from 0"
        )
    if config.limit is not None and config.limit < len(split):
        split = data.draw(split, config.limit, config.seed)
    config = replace(config, batch_size=config.batch_size or default_batch(split.shape[-1]))
    with prepared(_device_of(model)):
        found = fooled(model, split, names, eps=radius, alpha=step, config=config)
        if "autoattack" in given or config.autoattack:
            library_version()
            check_classes(type(model).__name__, count)
            with attack_mode(model, "eval"):
                found["autoattack"] = autoattack(model, split, eps=radius, config=config).fooled
    errors = {name: Rate(int(wrong.sum()), len(wrong)) for name, wrong in found.items()}
    return Measured(errors, radius, config.norm or "linf")


def as_split(images: Images) -> data.Split:
    """Return images and labels in one of the forms that `fit` takes, but no name, as a split.

    Raises `InputError` for other things, and for images and labels that do not fit each other.
    """
    if isinstance(images, data.Split):
        _check_square(*images.shape[1:])
        return images
    # A list of two tuples is a data set of two items.
    items = isinstance(images, list) and all(isinstance(item, tuple) for item in images)
    if isinstance(images, tuple | list) and len(images) == 2 and not items:
        return data.Split(_pixels(images[0]), _labels(images[1]))
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return _split_of_items(images)
    raise InputError(f"images are a {type(images).__name__}: {FORMS}")


def _split_of_items(items: Any) -> data.Split:
    """Return the split of a map-style data set, whose items are (image, label)."""
    if not len(items):
        raise InputError("the data set is empty: give at least one image of each class")
    pictures: list[Tensor] = []
    labels: list[int] = []
    for index in range(len(items)):
        try:
            item = items[index]
        except Exception as error:
            # The data set is the user's code: it may raise anything.
            raise InputError(
                f"item {index} of the data set cannot be read: {type(error).__name__}: "
                f"{one_line(error)[:150]}"
            ) from error
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise InputError(f"item {index} of the data set is no (image, label): {FORMS}")
        picture, label = item[0], item[1]
        if isinstance(picture, Image.Image):
            picture = pixels_of(picture, f"image {index}")
        picture = _tensor(picture, f"image {index} is", PIXELS)
        if pictures and picture.shape != pictures[0].shape:
            raise InputError(
                f"image {index} has shape {tuple(picture.shape)} and image 0 "
                f"{tuple(pictures[0].shape)}: give the data set a transform that resizes and crops "
                f"all images to one size"
            )
        pictures.append(picture)
        try:
            labels.append(operator.index(label))
        except (TypeError, ValueError):
            raise InputError(
                f"label {index} is {one_line(repr(label))[:50]}: give the number of a class"
            ) from None
    return data.Split(_pixels(torch.stack(pictures)), torch.tensor(labels))


def _pixels(images: Any) -> Tensor:
    """Return images as contiguous uint8, (N, H, W, C)."""
    pixels = _tensor(images, "images are", PIXELS)
    if pixels.dim() == 3:
        pixels = pixels[..., None]
    if pixels.dim() != 4 or not len(pixels):
        raise InputError(
            f"images have shape {tuple(pixels.shape)}: give (N, H, W, C), (N, C, H, W) or (N, H, W)"
        )
    first, last = pixels.shape[1] <= 4, pixels.shape[3] <= 4
    if first == last:
        raise InputError(
            f"images of shape {tuple(pixels.shape)} are neither (N, H, W, C) nor (N, C, H, W) with "
            f"1 to 4 channels C: give one of these"
        )
    if first:
        pixels = pixels.permute(0, 2, 3, 1)
    _, height, width, _ = pixels.shape
    _check_square(height, width)
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.is_floating_point():
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"pixels run from {low:.3g} to {high:.3g}: give floats in [0, 1] that are not "
                f"normalised (see normalise), or uint8"
            )
        pixels = (pixels * 255).round()
    elif pixels.dtype == torch.bool or low < 0 or high > 255:
        raise InputError(f"pixels are {pixels.dtype} from {low:.3g} to {high:.3g}: {PIXELS}")
    return pixels.to(torch.uint8).contiguous()


def _tensor(values: Any, what: str, remedy: str) -> Tensor:
    """Return an array or tensor of real numbers as a tensor on the CPU.

    `what` and `remedy` begin and end the message of the `InputError` for other values.
    """
    if isinstance(values, Tensor):
        plain = values.layout == torch.strided and not (values.is_quantized or values.is_meta)
        if not plain or values.is_complex():
            kind = "on the meta device" if values.is_meta else f"{values.layout} {values.dtype}"
            raise InputError(f"{what} {kind}: {remedy}")
        wide = values.dtype in (torch.uint16, torch.uint32, torch.uint64)
        return values.detach().cpu().to(torch.int64 if wide else values.dtype)
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} no array: {one_line(error)[:100]}: {remedy}") from None
    if array.dtype.kind not in "buif":
        raise InputError(f"{what} {array.dtype}: {remedy}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)  # PyTorch has few operators for uint16 to uint64
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


def _names(classes: Any) -> tuple[str, ...]:
    """Return names of classes; raise `InputError` unless each is given once."""
    try:
        names = tuple(map(str, classes))
    except TypeError:
        raise InputError(f"classes is {classes!r:.50}: give the name of each class") from None
    if len(set(names)) < len(names):
        raise InputError(f"classes has a name twice: {', '.join(names)[:100]}")
    return names


def _check_square(height: int, width: int) -> None:
    if height != width:
        raise InputError(
            f"images of {height}x{width} pixels are not square: crop or resize them to a square"
        )


def _labels(labels: Any) -> Tensor:
    """Return labels as int64, (N,)."""
    given = _tensor(labels, "labels are", "give one whole number for each image, (N,)")
    if given.dim() != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise InputError(
            f"labels are {given.dtype} of shape {tuple(given.shape)}: give one whole number for "
            f"each image, (N,), such as labels.argmax(1) for one-hot rows"
        )
    return given.to(torch.int64)


def _dataset(
    model: nn.Module,
    train: Images,
    test: Images,
    classes: Sequence[str] | None,
    config: TrainConfig,
) -> data.Dataset:
    """Return the data set of a training; the network's logits say how many classes there are."""
    testing = tested = None
    if test is not None:
        options = _load_options(test) | {"image_size": config.image_size} if _is_name(test) else {}
        tested = data.load(**options) if options else None
        testing = _resized(tested.test if tested else as_split(test), config)
    if _is_name(train):
        loaded = data.load(
            **_load_options(train),
            loader=config.loader,
            image_size=config.image_size,
            context=config.augment == "resized-crop",
        )
        names = _names(classes or loaded.classes)
        if testing is None:
            return replace(loaded, classes=names)
        if tested is not None and tested.classes != loaded.classes:
            raise InputError(
                f"train has {class_names(loaded.classes)}, but test has "
                f"{class_names(tested.classes)}: give images of the same classes"
            )
        return replace(loaded, classes=names, test=testing, known_fingerprint="")
    if testing is None:
        raise InputError("test is None: give the images to measure on, in any form of train")
    training = _resized(as_split(train), config)
    names = _names(classes or getattr(train, "classes", None) or ())
    if not names:
        most = int(max(training.labels.max(), testing.labels.max())) + 1
        names = tuple(map(str, range(max(_logits(model, training) or most, most))))
    return data.Dataset(data.IN_PYTHON, names, training, testing, flip=True)


def _resized(split: data.Split, config: TrainConfig) -> data.Split:
    return split if config.image_size is None else data.resized(split, config.image_size)


def _logits(model: nn.Module, split: data.Split) -> int | None:
    """Return the number of logits of `model`; None if it fails, which `check_network` explains."""
    x = torch.rand(2, *split.shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), attack_mode(model, "eval"), torch.random.fork_rng(devices=[]):
            logits = model(x.to(_device_of(model)))
        return int(logits.shape[1])
    except Exception:  # the network is the user's code: it may raise anything
        return None


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of the network's first parameter; the CPU for a network without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _is_name(images: Images) -> bool:
    return isinstance(images, str | os.PathLike)


def _dataset_of(images: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings `dataset` and `data_dir` for a name or a path."""
    text = str(expanded(images))
    if text in DATASETS or is_beton(text):
        return {"dataset": text}
    if os.path.isdir(text):
        return {"dataset": "folder", "data_dir": text}
    raise InputError(
        f"there is no data set or folder {text}: {FORMS}{did_you_mean(text, DATASETS)}"
    )


def _load_options(images: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the arguments of `data.load` for a name or a path."""
    options = _dataset_of(images)
    return {"name": options["dataset"], "data_dir": options.get("data_dir")}
