"""Checks of the arguments of attacks."""

import math
from typing import Any, Literal, get_args

from torch import Tensor

from fastiat.attacks.starts import Norm
from fastiat.engine.modes import BatchNormMode
from fastiat.mix import check_label_type
from fastiat.system.errors import InputError

Loss = Literal["ce", "margin"]
"""Loss that an attack maximises, see `fastiat.attack.attack_loss`."""


def check_settings(settings: dict[str, Any]) -> None:
    """Raise `InputError` for settings outside the ranges of `pgd`."""
    for name in ("eps", "alpha"):
        value = settings[name]
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}: give a finite number, at least 0, in pixel units")
    for name in ("steps", "restarts"):
        if settings[name] < 1:
            raise InputError(f"{name} is {settings[name]}: give at least 1")
    low, high = settings["clip"]
    if not low < high:
        raise InputError(f"clip is {low, high}: give the lowest pixel value, then the highest")
    for name, choices in (("norm", Norm), ("loss", Loss), ("bn", BatchNormMode)):
        check_choice(name, settings[name], get_args(choices))
    if settings["restarts"] > 1 and not settings["random_start"]:
        raise InputError(
            f"{settings['restarts']} restarts without a random start would all be the same: "
            f"give restarts=1 or random_start=True"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")


def check_batch(x: Tensor, y: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {given}: an attack needs floating-point pixels, such as x / 255")
    check_label_type(y)
    if x.dim() < 2 or y.shape != x.shape[:1]:
        raise InputError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}: give (B, ...) and (B,)"
        )
