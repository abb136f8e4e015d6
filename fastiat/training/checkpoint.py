"""Check that a checkpoint fits a training: all of it is checked before any of it is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastiat.runs.weights import alike
from fastiat.system.errors import DamagedError, InputError, out_of_memory
from fastiat.system.settings import validated

TENSORS = ("model", "average", "momentum", "random", "order_before_epoch", "totals")
"""The entries of a state that hold tensors; the other entries are the fields of `Position`."""


@dataclass(frozen=True)
class Position:
    """The position of a training: the entries of a checkpoint that are not tensors."""

    step: int
    """Updates so far, including skipped updates."""
    ranks: int
    """Number of processes that train together."""
    data: str
    """Fingerprint of the images, as in `fastiat.data.Loaders`."""
    best: dict[str, int] | None
    """"epoch" and "errors" (held-out images) of the best validated epoch; None before the first."""
    validated_epochs: int
    """Number of epochs whose validation has finished."""
    seconds: float
    """Seconds that the updates of the current epoch have taken."""
    skipped: int
    """Updates skipped in the current epoch because a loss or gradient was not finite."""
    skipped_in_a_row: int
    """Updates skipped consecutively, up to the last update; may span epochs."""


def checked_position(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    *,
    epochs: int,
    steps_per_epoch: int,
    generators: Mapping[str, torch.Generator],
) -> Position:
    """Check that all of `state` fits a training, and return its position.

    state: the checkpoint, as `Trainer.state_dict` returns it.
    own: the state of the training that will load the checkpoint.
    epochs, steps_per_epoch: the length of that training.
    generators: the generators whose states are in `state["random"]`.

    Raises `InputError` for a checkpoint of other data or of another number of processes, and
    `DamagedError` for a checkpoint that does not fit the network, or whose position is impossible.
    """
    names = [field.name for field in fields(Position)]
    try:
        position: Position = validated({n: state[n] for n in names if n in state}, Position)
    except InputError as error:
        raise DamagedError(f"the checkpoint is damaged: {error}") from None
    mine, theirs = (mark.partition("+") for mark in (own["data"], position.data))
    if mine[0] == theirs[0] and mine != theirs:
        raise InputError(
            "the further images are not those that this run was started with: name their file with "
            "--extra"
        )
    if mine != theirs:
        raise InputError(
            "the data set is not the one that this run was started with: name that one with "
            "--data-dir or --dataset"
        )
    if position.ranks != own["ranks"]:
        count = position.ranks
        raise InputError(
            f"it is a training of {count} process{'es' * (count != 1)}, not of {own['ranks']}: "
            f"start as many, "
            + ("without torchrun" if count == 1 else f"with torchrun --nproc-per-node {count}")
        )
    for name in TENSORS:
        if not alike(state.get(name), own[name]):
            raise DamagedError(
                f"the checkpoint is of another network: its {name} has other tensors"
            )
    for name, generator in generators.items():
        _check_generator(state["random"][name], generator.device)
    _check_generator(state["order_before_epoch"], torch.device("cpu"))
    wrong = _outside(position, epochs, steps_per_epoch)
    if wrong:
        raise DamagedError(f"the checkpoint is damaged: {wrong}")
    return position


def _check_generator(state: torch.Tensor, device: torch.device) -> None:
    """Raise `DamagedError` unless a generator of `device` accepts this state."""
    try:
        torch.Generator(device).set_state(state)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise DamagedError("the checkpoint is damaged: a generator's state is invalid") from None


def _outside(position: Position, epochs: int, steps_per_epoch: int) -> str | None:
    """Return a phrase that says which value of a position is impossible, or None."""
    epoch, best = position.step // steps_per_epoch, position.best
    if not 0 <= position.step <= epochs * steps_per_epoch:
        return "its step lies outside of the training"
    # An epoch is validated right after its last update, so validation is at most one epoch behind.
    if not 0 <= epoch - position.validated_epochs <= 1:
        return "its validated epochs do not fit its step"
    if not 0 <= position.seconds < math.inf:
        return "its seconds are not a finite time"
    if best is not None and (best.keys() != {"epoch", "errors"} or not 0 <= best["epoch"] <= epoch):
        return "its best epoch is not an epoch of the training"
    if not (0 <= position.skipped < steps_per_epoch and position.skipped_in_a_row >= 0):
        return "it has skipped more updates than an epoch has"
    return None
