"""AutoAttack (Croce & Hein 2020) by its authors' code, as the package pyautoattack has it.

Its standard version: APGD-CE, targeted APGD-DLR, targeted FAB and Square, each on the images that
the ones before left standing.
"""

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastiat import data
from fastiat.device import pick_device
from fastiat.errors import InputError
from fastiat.models import to_pixels
from fastiat.progress import Progress
from fastiat.queries import MeasureConfig

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETS = 9
"""Wrong classes that the targeted attacks try, where there are as many."""


@dataclass
class Outcome:
    """What AutoAttack did to a split."""

    fooled: Tensor
    """(N,) bool, on the CPU: misclassified as they are, or after any attack."""
    errors_after: dict[str, int] = field(default_factory=dict)
    """Misclassified images after each attack and those before it; "none" is the clean error."""
    warnings: list[str] = field(default_factory=list)
    """What the library found suspicious about the model."""


def library_version() -> str:
    """Return the library's name and version; raise `InputError` where it is missing."""
    try:
        import pyautoattack
    except ImportError:
        raise InputError(
            "--autoattack needs a library that is not installed: pip install fastiat[autoattack]"
        ) from None
    return f"pyautoattack {pyautoattack.__version__}"


def check_classes(name: str, classes: int) -> None:
    """Raise `InputError` for a network that the targeted DLR loss is not defined for."""
    if classes < 4:
        raise InputError(
            f"--autoattack needs at least 4 classes, and {name} has {classes}: "
            f"measure it without, say with --attacks pgd-100 --restarts 5 --worst"
        )


def autoattack(
    model: nn.Module,
    split: data.Split,
    *,
    eps: float,
    config: MeasureConfig,
    skip: Tensor | None = None,
) -> Outcome:
    """Return what the standard attacks of radius `eps` do to `model` on `split`, in fp32.

    skip: (N,) bool, on the CPU: images to count as fooled without an attack.
    The norm, seed, batch size and device are `config`'s; examples are those of one call of the
    library on all images with this batch size.
    """
    library_version()
    import pyautoattack
    from pyautoattack.checks import check_square_sr

    device = pick_device(config.device)
    # The library takes views, for which everything must be in torch's default layout.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    model = model.eval().requires_grad_(False)
    norm = {"linf": "Linf", "l2": "L2"}[config.norm]
    outcome = Outcome(torch.zeros(len(split), dtype=torch.bool) if skip is None else skip.clone())
    cuda = [device] if device.type == "cuda" else []
    with _warnings() as warned, torch.random.fork_rng(cuda):  # it seeds torch's own generator
        adversary = pyautoattack.AutoAttack(
            model, norm=norm, eps=eps, seed=config.seed, device=device, version="standard"
        )
        for name in ("none", *(ATTACKS if eps else ())):
            left = (~outcome.fooled).nonzero()[:, 0]
            adversary.attacks_to_run = [name]
            text = "AutoAttack" if name == "none" else f"AutoAttack, {name}"
            with Progress(text, len(left)) as progress:
                # Splitting no images would give one batch of none, which the library cannot take.
                for index in left.split(config.batch_size) if len(left) else ():
                    images = split.take(index).images.permute(0, 3, 1, 2)
                    x = to_pixels(images).to(device).contiguous()
                    y = split.labels[index].to(device)
                    if name == "none":
                        targets = min(TARGETS, model(x[:1]).shape[1] - 1)
                        adversary.apgd_targeted.n_target_classes = targets
                        adversary.fab.n_target_classes = targets
                    else:
                        x, _ = adversary.run_standard_evaluation(x, y, batch_size=len(y))
                    with torch.no_grad():
                        outcome.fooled[index] = (model(x).argmax(1) != y).cpu()
                    progress.advance(len(y))
            outcome.errors_after[name] = int(outcome.fooled.sum())
        accuracy = {name: 1 - n / len(split) for name, n in outcome.errors_after.items()}
        check_square_sr(accuracy, logger=logging.getLogger("auto-attack"))
    outcome.warnings = warned
    return outcome


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what the library would print to stderr once a batch: each of its warnings once."""
    found: dict[str, str] = {}

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().partition(" See flags_doc.md")[0]
            found.setdefault(re.sub(r"\d+", "", text), text)

    logger, handler = logging.getLogger("auto-attack"), Collect(logging.WARNING)
    warned: list[str] = []
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield warned
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
        warned.extend(found.values())
