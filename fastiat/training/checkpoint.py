"""Whether a checkpoint fits a training: checked as a whole before any of it is taken over."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastiat.runs.weights import alike
from fastiat.system.errors import Damaged, InputError, out_of_memory
from fastiat.system.settings import validated

TENSORS = ("model", "average", "momentum", "random", "order_before_epoch", "totals")
"""The parts of a state that are tensors or dictionaries of tensors; `Position` is the rest."""


@dataclass(frozen=True)
class Position:
    """Where a training is: the values of a checkpoint that are no tensors."""

    step: int
    """Updates done."""
    ranks: int
    """Processes that train together."""
    data: str
    """Fingerprint of the data set."""
    best: dict[str, int] | None
    """"epoch" and "errors" of the best validated epoch."""
    validated_epochs: int
    seconds: float
    """Time that the updates of the current epoch took."""
    skipped: int
    """Updates left out in the current epoch because a loss or gradient was not finite."""
    skipped_in_a_row: int


def checked_position(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    *,
    epochs: int,
    steps_per_epoch: int,
    generators: Mapping[str, torch.Generator],
) -> Position:
    """Return where the training of a checkpoint is, once all of `state` is found to fit.

    own: the state of the training that is to take it over.
    generators: those of `state["random"]`.

    Raises `InputError` for a checkpoint of other data or another number of processes, and
    `Damaged` for one that does not fit the network or lies outside of the training.
    """
    names = [field.name for field in fields(Position)]
    try:
        position: Position = validated({n: state[n] for n in names if n in state}, Position)
    except InputError as error:
        raise Damaged(f"the checkpoint is damaged: {error}") from None
    if position.data != own["data"]:
        raise InputError("the data set is not the one that this run was started with")
    if position.ranks != own["ranks"]:
        count = position.ranks
        raise InputError(
            f"it is a training of {count} process{'es' * (count != 1)}, not of {own['ranks']}: "
            f"start as many, "
            + ("without torchrun" if count == 1 else f"say torchrun --nproc-per-node {count}")
        )
    for name in TENSORS:
        if not alike(state.get(name), own[name]):
            raise Damaged(f"the checkpoint is not of this network: its {name} has another form")
    for name, generator in generators.items():
        _check_generator(state["random"][name], generator.device)
    _check_generator(state["order_before_epoch"], torch.device("cpu"))
    wrong = _outside(position, epochs, steps_per_epoch)
    if wrong:
        raise Damaged(f"the checkpoint is damaged: {wrong}")
    return position


def _check_generator(state: torch.Tensor, device: torch.device) -> None:
    """Raise `Damaged` unless a generator takes this state."""
    try:
        torch.Generator(device).set_state(state)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise Damaged("the checkpoint is damaged: a generator's state is none") from None


def _outside(position: Position, epochs: int, steps_per_epoch: int) -> str | None:
    """Say which value of a position is impossible, or return None."""
    epoch, best = position.step // steps_per_epoch, position.best
    if not 0 <= position.step <= epochs * steps_per_epoch:
        return "its step lies outside of the training"
    # Validation follows the last update of an epoch, so that it is one epoch behind at most.
    if not 0 <= epoch - position.validated_epochs <= 1:
        return "its validated epochs do not fit its step"
    if not 0 <= position.seconds < math.inf:
        return "its seconds are no time"
    if best is not None and (best.keys() != {"epoch", "errors"} or not 0 <= best["epoch"] <= epoch):
        return "its best epoch is none of the training's"
    if not (0 <= position.skipped < steps_per_epoch and position.skipped_in_a_row >= 0):
        return "it has skipped more updates than an epoch has"
    return None
