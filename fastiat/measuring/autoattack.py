"""AutoAttack (Croce & Hein 2020) by its authors' code, as the package pyautoattack has it.

Its standard version: APGD-CE, targeted APGD-DLR, targeted FAB and Square, each on the images that
the ones before left standing.
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
from fastiat.system.errors import InputError
from fastiat.system.progress import Progress
from fastiat.system.ranks import ranks

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
    library on all images with this batch size. The ranks of a job share the batches.
    """
    library_version()
    import pyautoattack
    from pyautoattack.checks import check_square_sr

    device = pick_device(config.device)
    # The library takes views, for which everything must be in torch's default layout.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    model = model.eval().requires_grad_(False)
    norm = {"linf": "Linf", "l2": "L2"}[config.norm]
    job, size = ranks(), config.batch_size or default_batch(split.shape[-1])

    def pixels(index: Tensor) -> Tensor:
        images = split.take(index).images.permute(0, 3, 1, 2)
        return to_pixels(images).to(device).contiguous()

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
            if name == "none" and len(left):
                targets = min(TARGETS, model(pixels(left[:1])).shape[1] - 1)
                adversary.apgd_targeted.n_target_classes = targets
                adversary.fab.n_target_classes = targets
            # Splitting no images would give one batch of none, which the library cannot take.
            batches = left.split(size) if len(left) else ()
            wrong = torch.zeros(len(split), dtype=torch.uint8)
            with Progress(text, len(left), share=job.count) as progress:
                # Each is attacked from the seed, so that it does not matter who has which.
                for index in batches[job.rank :: job.count]:
                    x, y = pixels(index), split.labels[index].to(device)
                    if name != "none":
                        x, _ = adversary.run_standard_evaluation(x, y, batch_size=len(y))
                    with torch.no_grad():
                        wrong[index] = (~correct(model(x), y)).to("cpu", torch.uint8)
                    progress.advance(len(y))
            outcome.fooled |= job.all_reduce_sum_(wrong).bool()
            outcome.errors_after[name] = int(outcome.fooled.sum())
        accuracy = {name: 1 - n / len(split) for name, n in outcome.errors_after.items()}
        check_square_sr(accuracy, logger=logging.getLogger("auto-attack"))
    said = [json.loads(text) for text in job.gather(json.dumps(warned))]
    first: dict[str, str] = {}
    for warning in chain.from_iterable(said):
        first.setdefault(_words(warning), warning)
    outcome.warnings = list(first.values())
    return outcome


def _words(text: str) -> str:
    """Return what a warning says, whatever its numbers."""
    return re.sub(r"\d+", "", text)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what the library would print to stderr once a batch: each of its warnings once."""
    found: dict[str, str] = {}

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().partition(" See flags_doc.md")[0]
            found.setdefault(_words(text), text)

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
