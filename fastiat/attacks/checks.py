"""Checks of the arguments of attacks."""

import math
from typing import Any, Literal, get_args

from torch import Tensor

from fastiat.attacks.starts import Noise, Norm
from fastiat.engine.modes import BatchNormMode
from fastiat.mix import check_label_type
from fastiat.system.errors import InputError

Loss = Literal["ce", "margin", "kl"]
"""Loss that an attack maximises, see `fastiat.attack.attack_loss`."""


def check_settings(settings: dict[str, Any]) -> None:
    """Raise `InputError` for settings outside the ranges of `pgd`."""
    for name in ("eps", "alpha"):
        value = settings[name]
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}: give a finite number, at least 0, in pixel units")
    size = settings["start_size"]
    if size is not None and not (math.isfinite(size) and size > 0):
        raise InputError(f"start_size is {size}: give a finite number above 0, in pixel units")
    for name in ("steps", "restarts"):
        if settings[name] < 1:
            raise InputError(f"{name} is {settings[name]}: give at least 1")
    low, high = settings["clip"]
    if not low < high:
        raise InputError(f"clip is {low, high}: give the lowest pixel value, then the highest")
    for name, choices in (
        *(("norm", Norm), ("loss", Loss), ("bn", BatchNormMode), ("start_noise", Noise)),
    ):
        check_choice(name, settings[name], get_args(choices))
    if settings["loss"] == "kl" and not settings["random_start"]:
        raise InputError(
            "the loss 'kl' has no gradient at the image itself: give random_start=True"
        )
    if settings["loss"] == "kl" and settings["restarts"] > 1:
        raise InputError(
            f"the loss 'kl' is for one start, not for {settings['restarts']} restarts: give "
            f"restarts=1, or the loss 'ce' or 'margin'"
        )
    if settings["restarts"] > 1 and not settings["random_start"]:
        raise InputError(
            f"{settings['restarts']} restarts without a random start would all be the same: "
            f"give restarts=1 or random_start=True"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")


def is_soft(y: object) -> bool:
    """Return whether `y` holds class probabilities, (B, K), instead of class labels, (B,)."""
    return isinstance(y, Tensor) and y.is_floating_point() and y.dim() == 2


def check_soft(settings: dict[str, Any], target: Tensor | None) -> None:
    """Raise `InputError` for settings of an attack that class probabilities do not go with."""
    if settings["loss"] == "margin":
        raise InputError("the loss 'margin' needs class labels, not probabilities: use loss='ce'")
    if settings["restarts"] > 1 or target is not None:
        what = "a target" if settings["restarts"] == 1 else f"{settings['restarts']} restarts"
        raise InputError(f"{what} needs class labels, (B,), not probabilities, (B, K)")


def check_batch(x: Tensor, y: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {given}: an attack needs floating-point pixels, such as x / 255")
    if not is_soft(y):
        check_label_type(y)
    if x.dim() < 2 or y.shape[:1] != x.shape[:1] or (y.dim() != 1 and not is_soft(y)):
        raise InputError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: give (B, ...) and (B,)"
        )
