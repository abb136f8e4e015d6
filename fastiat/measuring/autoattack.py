"""AutoAttack (Croce & Hein 2020) with the code of its authors, from the package pyautoattack.

The standard version has four attacks: APGD-CE, targeted APGD-DLR, targeted FAB and Square. Each
attack runs only on the images that the attacks before it have not fooled.
"""

import copy
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from fastiat import data
from fastiat.config import MeasureConfig
from fastiat.engine.device import pick_device
from fastiat.measuring.one_pass import default_batch
from fastiat.models import correct, to_pixels
from fastiat.system.errors import InputError, optional
from fastiat.system.progress import Progress
from fastiat.system.ranks import ranks

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETS = 9
"""Largest number of wrong classes that the targeted attacks try."""


@dataclass
class Outcome:
    """The result of AutoAttack on a split."""

    fooled: Tensor
    """(N,) bool, on the CPU: images misclassified without an attack or after any attack."""
    errors_after: dict[str, int] = field(default_factory=dict)
    """Number of images fooled by each attack or an attack before it; "none" is without attack."""
    warnings: list[str] = field(default_factory=list)
    """The library's warnings about the model, each once."""


def library_version() -> str:
    """Return the library's name and version; raise `InputError` if it is not installed."""
    return f"pyautoattack {optional('pyautoattack', 'autoattack').__version__}"


def check_classes(name: str, classes: int) -> None:
    """Raise `InputError` for fewer than 4 classes: the targeted DLR loss is not defined there.

    `name` is the run, for the message.
    """
    if classes < 4:
        raise InputError(
            f"--autoattack needs at least 4 classes, but {name} has {classes}: "
            f"use --attacks pgd-100 --restarts 5 --worst instead"
        )


def autoattack(
    model: nn.Module,
    split: data.Split,
    *,
    eps: float,
    config: MeasureConfig,
    skip: Tensor | None = None,
) -> Outcome:
    """Run the four attacks with radius `eps` on `model`, in fp32, and return their outcome.

    eps: radius of the ball, for pixels in [0, 1]; 0 runs no attack.
    config: gives norm, seed, batch size and device.
    skip: (N,) bool, on the CPU: images that are counted as fooled and not attacked.

    The examples are the same as those of one call of the library on all images with this batch
    size. The ranks of a job share the batches. Raises `InputError` if the library is not installed.
    """
    pyautoattack = optional("pyautoattack", "autoattack")
    from pyautoattack.checks import check_square_sr

    device = pick_device(config.device)
    # The library calls `view`, which needs contiguous tensors.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    model = model.eval().requires_grad_(False)
    norm = {"linf": "Linf", "l2": "L2"}[config.ball]
    group, size = ranks(), config.batch_size or default_batch(split.shape[-1])

    def pixels(index: Tensor) -> Tensor:
        images = split.take(index).images.permute(0, 3, 1, 2)
        return to_pixels(images).to(device).contiguous()

    outcome = Outcome(torch.zeros(len(split), dtype=torch.bool) if skip is None else skip.clone())
    cuda = [device] if device.type == "cuda" else []
    # The library seeds PyTorch's global generators: `fork_rng` restores their states.
    with _warnings() as warned, torch.random.fork_rng(cuda):
        adversary = pyautoattack.AutoAttack(
            model, norm=norm, eps=eps, seed=config.seed, device=device, version="standard"
        )
        for name in ("none", *(ATTACKS if eps else ())):
            left = (~outcome.fooled).nonzero()[:, 0]
            adversary.attacks_to_run = [name]
            text = "AutoAttack" if name == "none" else f"AutoAttack, {name}"
            if name == "none" and len(left):
                targets = min(TARGETS, model(pixels(left[:1])).shape[1] - 1)
                adversary.apgd_targeted.n_target_classes = targets
                adversary.fab.n_target_classes = targets
            # `split` of an empty tensor gives one empty batch, which the library cannot attack.
            batches = left.split(size) if len(left) else ()
            wrong = torch.zeros(len(split), dtype=torch.uint8)
            with Progress(text, len(left), share=group.count) as progress:
                # The library seeds the generators again for every batch, so that the result of a
                # batch does not depend on the rank that attacks it.
                for index in batches[group.rank :: group.count]:
                    x, y = pixels(index), split.labels[index].to(device)
                    if name != "none":
                        x, _ = adversary.run_standard_evaluation(x, y, batch_size=len(y))
                    with torch.no_grad():
                        wrong[index] = (~correct(model(x), y)).to("cpu", torch.uint8)
                    progress.advance(len(y))
            outcome.fooled |= group.all_reduce_sum_(wrong).bool()
            outcome.errors_after[name] = int(outcome.fooled.sum())
        accuracy = {name: 1 - n / len(split) for name, n in outcome.errors_after.items()}
        check_square_sr(accuracy, logger=logging.getLogger("auto-attack"))
    # Every rank has the warnings of its own batches. The lists are joined in the order of the
    # ranks, so that all ranks keep the same warnings.
    gathered = [json.loads(text) for text in group.gather(json.dumps(warned))]
    # Warnings of different batches differ only in their numbers: keep the first of each.
    unique: dict[str, str] = {}
    for warning in chain.from_iterable(gathered):
        unique.setdefault(re.sub(r"\d+", "", warning), warning)
    outcome.warnings = list(unique.values())
    return outcome


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings that the library would print after every batch."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage().partition(" See flags_doc.md")[0])

    logger, handler = logging.getLogger("auto-attack"), Collect(logging.WARNING)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
