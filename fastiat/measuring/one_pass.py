"""White-box errors: one pass over a split gives the images that each of several attacks fools.

The iterates of PGD with K steps include the examples of every smaller number of steps. So PGD-5,
10, 20, 50, 100 and 1000 together cost as much as PGD-1000 alone.
"""

import itertools
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastiat import data, kernels
from fastiat.attack import Starts, attack_mode, fgsm, input_gradient, start_in_ball
from fastiat.config import MeasureConfig
from fastiat.engine.device import autocast, pick_device, pick_precision
from fastiat.models import correct, to_pixels
from fastiat.system.errors import InputError, out_of_memory
from fastiat.system.progress import Progress
from fastiat.system.ranks import ranks
from fastiat.system.settings import steps_of

TITLES = {"none": "No attack", "fgsm": "FGSM", "worst": "Worst", "autoattack": "AutoAttack"}
MOST_AT_A_TIME = 500
"""Largest batch that is attacked, unless --batch-size asks for a larger one."""


def title(attack: str) -> str:
    """Return an attack's name as tables show it, such as "PGD-20"."""
    return TITLES.get(attack, attack.upper())


def default_batch(side: int, batch_size: int | None = None) -> int:
    """Return how many images to attack at a time, so that it takes no more memory than training.

    side: height and width of an image in pixels.
    batch_size: batch size of the training, which all processes of the job share. None, for a model
        file without its run, gives a batch with as many pixels as 64 images of 64 x 64.
    """
    fitting = 64 * 64**2 // side**2 if batch_size is None else batch_size // ranks().count
    return max(min(MOST_AT_A_TIME, fitting), 1)


@contextmanager
def within_memory(command: str, runs: Iterable[str], batch_size: int) -> Iterator[None]:
    """Turn out-of-memory in the block into `InputError` that names a smaller batch size.

    command, runs: the command's name and the runs it measures; batch_size: images at a time.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        again = f"fastiat {command} {shlex.join(runs)} --batch-size {batch_size // 2}"
        remedy = (
            f"measure fewer at a time with: {again}"
            if batch_size > 1
            else "take a device with more memory, or free some"
        )
        raise InputError(
            f"measuring {batch_size} image{'s' * (batch_size > 1)} at a time takes more memory "
            f"than there is: {remedy}"
        ) from None


def batches(
    split: data.Split,
    size: int,
    device: torch.device,
    starts: Starts,
    shard: data.Shard = data.WHOLE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pixels (B, C, H, W) in [0, 1] and labels (B,) of a shard, on `device`.

    Before each batch, `starts` is set to the batch's place in the split (`starts.first`), so that
    an image's random start depends neither on the batch size nor on the rank that attacks it.
    """
    loader = data.make_loader(split, size, device=device, train=False, shard=shard)
    # A shard has every `shard.ranks`-th batch; only the last of all is shorter.
    for number, (images, y) in zip(itertools.count(shard.rank, shard.ranks), loader, strict=False):
        starts.batch(number * size)
        yield to_pixels(images), y


def fooled(
    model: nn.Module,
    split: data.Split,
    attacks: Sequence[str],
    *,
    eps: float,
    alpha: float,
    config: MeasureConfig,
    worst: bool = False,
) -> dict[str, Tensor]:
    """Return {attack: which images of `split` are misclassified under it, (N,) bool on the CPU}.

    attacks: names such as "none", "fgsm" and "pgd-20". The result of each is the same as if it were
        the only one. PGD's random starts are those of one call of `fastiat.attack.pgd` on all
        images with a generator of the seed, for every number of steps and every batch size.
    eps, alpha: radius and PGD step size, in pixels of [0, 1]. Norm, loss, restarts, random start,
        seed, batch size, device and precision are taken from `config`.
    worst: skip images that are misclassified already. Then only the union over the attacks has a
        meaning. "none" is always among the attacks, and comes first.

    Attacks run in the configuration's precision; examples are classified in fp32. With several
    restarts an image counts if the example of any restart is misclassified. The ranks of a job
    share the batches, and every rank returns the whole result. Raises `InputError` for an unknown
    attack.
    """
    names = tuple(dict.fromkeys(("none", *attacks) if worst else attacks))
    group, size = ranks(), config.batch_size or default_batch(split.shape[-1])
    text = ", ".join(map(title, names))
    with Progress(f"worst of {text}" if worst else text, len(split), share=group.count) as progress:
        one_pass = _Pass(model, names, eps, alpha, config, worst, progress)
        device, starts = one_pass.device, one_pass.starts
        found = torch.zeros(len(names), len(split), dtype=torch.uint8, device=device)
        for x, y in batches(split, size, device, starts, data.Shard(group.rank, group.count)):
            with attack_mode(model, "eval"):
                found[:, starts.first : starts.first + len(y)] = one_pass(x, y)
    # Each rank has filled in its own batches and left 0 elsewhere: the sum is the union.
    return dict(zip(names, group.all_reduce_sum_(found.cpu()).bool(), strict=True))


class _Pass:
    """All attacks of one pass, applied to one batch after the other."""

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        eps: float,
        alpha: float,
        config: MeasureConfig,
        worst: bool,
        progress: Progress,
    ) -> None:
        self.model, self.eps, self.alpha, self.config, self.worst = model, eps, alpha, config, worst
        self.device = pick_device(config.device)
        self.starts = Starts(config.seed, self.device)
        self.precision = pick_precision(config.precision, self.device)
        self.rows = {name: row for row, name in enumerate(names)}
        # PGD's numbers of steps in rising order, each with its row of the result.
        self.stops = sorted(
            (steps_of(name), row) for name, row in self.rows.items() if name not in ("none", "fgsm")
        )
        self.progress, self.shown, self.done = progress, 0, 0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return (attacks, B) bool: which images of the batch each attack fools."""
        self.shown = self.done = 0
        found = torch.zeros(len(self.rows), len(y), dtype=torch.bool, device=y.device)
        index = torch.arange(len(y), device=y.device)
        if "none" in self.rows:
            self._classify(found[self.rows["none"]], x, y, index)
        if "fgsm" in self.rows:
            left = index[~found.any(0)] if self.worst else index
            if len(left):
                self._fgsm(found[self.rows["fgsm"]], x[left], y[left], left)
        for restart in range(self.config.restarts if self.stops else 0):
            self._pgd(found, x, y, index, restart)
        self._show(len(y))
        return found

    def _fgsm(self, found: Tensor, x: Tensor, y: Tensor, index: Tensor) -> None:
        norm, loss = self.config.norm, self.config.attack_loss
        with autocast(x.device, self.precision):
            x_adv = fgsm(self.model, x, y, eps=self.eps, norm=norm, loss=loss)
        self._classify(found, x_adv, y, index)

    def _pgd(self, found: Tensor, x: Tensor, y: Tensor, index: Tensor, restart: int) -> None:
        """Take PGD's steps from one start, and classify at every number of steps asked for."""
        config, images, steps = self.config, len(y), 0
        step = kernels.pgd_step if config.norm == "linf" else kernels.pgd_step_l2
        all_steps = self.stops[-1][0] * config.restarts
        x_adv = x
        if config.random_start:
            # Drawn for the whole batch before images drop out: the start of an image must not
            # depend on which of the others are still attacked.
            x_adv = start_in_ball(x, self.eps, config.norm, (0.0, 1.0), self.starts)
        for number, (stop, row) in enumerate(self.stops):
            if self.worst or restart:
                # An image drops out once nothing that is still to come can change its result: with
                # `worst` after any success, else when all remaining rows have been fooled by
                # earlier restarts.
                to_come = [later for _, later in self.stops[number:]]
                decided = found.any(0) if self.worst else found[to_come].all(0)
                left = ~decided[index]
                x, x_adv, y, index = x[left], x_adv[left], y[left], index[left]
            if not len(index):
                return
            # One autocast context per stretch of steps keeps the bf16 copies of the weights for all
            # of them. Classification is outside of it, in fp32.
            with autocast(x.device, self.precision):
                for _ in range(stop - steps if self.eps else 0):
                    grad = input_gradient(self.model, x_adv, y, config.attack_loss)
                    x_adv = step(x_adv, grad, x, self.eps, self.alpha, (0.0, 1.0))
                    self.done += 1
                    # The last image is shown when the batch is complete.
                    self._show(min(images * self.done // all_steps, images - 1))
            self._classify(found[row], x_adv, y, index)
            steps = stop

    @torch.no_grad()
    def _classify(self, found: Tensor, x: Tensor, y: Tensor, index: Tensor) -> None:
        """Set `found`, (B,), at `index` where `x` is misclassified; `index` has an entry per image.

        True values stay, so that a later restart cannot take back a success.
        """
        found[index] |= ~correct(self.model(x), y)

    def _show(self, images: int) -> None:
        """Advance the progress to `images` of this batch: a share of the steps counts as images."""
        if images > self.shown:
            self.progress.advance(images - self.shown)
            self.shown = images
