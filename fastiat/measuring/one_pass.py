"""One pass over a split: which images each of several white-box attacks fools.

PGD with the largest number of steps asked for passes through the examples of all smaller numbers,
so that PGD-5, 10, 20, 50, 100 and 1000 together cost what PGD-1000 does.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastiat import data, kernels
from fastiat.attack import Starts, attack_mode, fgsm, input_gradient, start_in_ball
from fastiat.config import MeasureConfig
from fastiat.engine.device import autocast, pick_device, pick_precision
from fastiat.models import correct, to_pixels
from fastiat.runs.results import Rate
from fastiat.system.errors import InputError, out_of_memory
from fastiat.system.progress import Progress
from fastiat.system.ranks import ranks
from fastiat.system.settings import steps_of

TITLES = {"none": "No attack", "fgsm": "FGSM", "worst": "Worst", "autoattack": "AutoAttack"}


MOST_AT_A_TIME = 500
"""Images attacked at a time, unless more are asked for."""


def default_batch(side: int, batch_size: int | None = None) -> int:
    """Return how many images to attack at a time, so that it takes no more memory than training.

    side: pixels of an image's side.
    batch_size: images in an update of the training, which the processes of a job share. Without
        it, as for a model without its run, a batch has the pixels of 64 images of 64 x 64.
    """
    fitting = 64 * 64**2 // side**2 if batch_size is None else batch_size // ranks().count
    return max(min(MOST_AT_A_TIME, fitting), 1)


@contextmanager
def within_memory(command: str, batch_size: int) -> Iterator[None]:
    """Turn out-of-memory while measuring into `InputError` that names what to lower.

    command: one that measures, with its arguments; batch_size: images attacked at a time.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        mend = (
            f"measure fewer at a time with: {command} --batch-size {batch_size // 2}"
            if batch_size > 1
            else "take a device with more memory, or free some"
        )
        raise InputError(
            f"measuring {batch_size} image{'s' * (batch_size > 1)} at a time takes more memory "
            f"than there is: {mend}"
        ) from None


def title(attack: str) -> str:
    """Return an attack's name as a table has it."""
    return TITLES.get(attack, attack.upper())


def error_rates(
    model: nn.Module,
    split: data.Split,
    attacks: Sequence[str],
    *,
    eps: float,
    alpha: float,
    config: MeasureConfig,
) -> dict[str, Rate]:
    """Return the error of `model` on `split` under each of `attacks`: `fooled`, counted."""
    found = fooled(model, split, attacks, eps=eps, alpha=alpha, config=config)
    return {name: Rate(int(wrong.sum()), len(split)) for name, wrong in found.items()}


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
    """Return {attack: (N,) bool, on the CPU}: on which images of `split` it makes `model` err.

    attacks: names such as "none", "fgsm" and "pgd-20". Each finds what it would find alone: PGD's
        random starts are those of one call of `fastiat.attack.pgd` on all images, with a generator
        of the seed, whatever the number of steps and the batch size.
    eps, alpha: radius and PGD step, in pixels of 0 to 1; norm, loss, restarts, random start, seed,
        batch size, device and precision are `config`'s.
    worst: an image that was fooled is attacked no more, so that only the union of the columns has
        a meaning; the clean images are always classified then, under "none".

    Examples are crafted in the configuration's precision and classified in fp32; an image counts as
    fooled by PGD if the example of any restart fools. The ranks of a job share the batches, and
    each returns what one process would. Raises `InputError` for an unknown name.
    """
    names = tuple(dict.fromkeys(("none", *attacks) if worst else attacks))
    one_pass = _Pass(model, names, eps, alpha, config, worst)
    job, size = ranks(), config.batch_size or default_batch(split.shape[-1])
    shard = data.Shard(job.rank, job.count)
    batches = data.make_loader(split, size, device=one_pass.device, train=False, shard=shard)
    text = ", ".join(map(title, names))
    found = torch.zeros(len(names), len(split), dtype=torch.uint8, device=one_pass.device)
    place = 0
    with Progress(f"worst of {text}" if worst else text, len(split), share=job.count) as progress:
        for gap, (images, y) in zip(shard.gaps(), batches, strict=False):
            place += gap * size
            ticker = _Ticker(progress, len(y))
            with attack_mode(model, "eval"):
                one_pass.starts.batch(place)
                found[:, place : place + len(y)] = one_pass(to_pixels(images), y, ticker)
            ticker.finish()
            place += len(y)
    return dict(zip(names, job.all_reduce_sum_(found.cpu()).bool(), strict=True))


class _Pass:
    """The attacks of one pass, applied to one batch after the other."""

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        eps: float,
        alpha: float,
        config: MeasureConfig,
        worst: bool,
    ) -> None:
        self.model, self.eps, self.alpha, self.config, self.worst = model, eps, alpha, config, worst
        self.device = pick_device(config.device)
        self.precision = pick_precision(config.precision, self.device)
        self.starts = Starts(config.seed, self.device)
        self.rows = {name: row for row, name in enumerate(names)}
        # PGD's numbers of steps, from the smallest, and the row of each.
        self.counts = sorted(
            (steps_of(name), row) for name, row in self.rows.items() if name not in ("none", "fgsm")
        )

    def __call__(self, x: Tensor, y: Tensor, tick: Callable[[float], None]) -> Tensor:
        """Return (attacks, B) bool: which images each fools; `tick` is told each share of work."""
        found = torch.zeros(len(self.rows), len(y), dtype=torch.bool, device=y.device)
        everyone = torch.arange(len(y), device=y.device)
        if "none" in self.rows:
            self._judge(found[self.rows["none"]], x, y, everyone)
        if "fgsm" in self.rows:
            index = everyone[~found.any(0)] if self.worst else everyone
            if len(index):
                examples = self._fgsm(x[index], y[index])
                self._judge(found[self.rows["fgsm"]], examples, y[index], index)
        for restart in range(self.config.restarts if self.counts else 0):
            self._pgd(found, x, y, everyone, restart, tick)
        return found

    def _fgsm(self, x: Tensor, y: Tensor) -> Tensor:
        norm, loss = self.config.norm, self.config.attack_loss
        with autocast(self.device, self.precision):
            return fgsm(self.model, x, y, eps=self.eps, norm=norm, loss=loss)

    def _pgd(
        self,
        found: Tensor,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        restart: int,
        tick: Callable[[float], None],
    ) -> None:
        """Step from one start and judge after every number of steps that is asked for."""
        config, done = self.config, 0
        take = kernels.pgd_step if config.norm == "linf" else kernels.pgd_step_l2
        x_adv = x
        if config.random_start:
            # Drawn for the whole batch, so that an image's start does not depend on the others.
            x_adv = start_in_ball(x, self.eps, config.norm, (0.0, 1.0), self.starts)
        for number, (count, row) in enumerate(self.counts):
            if self.worst or restart:
                # An image drops out when nothing that is still to come can change its outcome.
                to_come = [row for _, row in self.counts[number:]]
                decided = found.any(0) if self.worst else found[to_come].all(0)
                left = ~decided[index]
                x, x_adv, y, index = x[left], x_adv[left], y[left], index[left]
            if not len(index):
                return
            # Judged outside autocast, whose copies of the weights serve a stretch of steps.
            with autocast(self.device, self.precision):
                for _ in range(count - done if self.eps else 0):
                    grad = input_gradient(self.model, x_adv, y, config.attack_loss)
                    x_adv = take(x_adv, grad, x, self.eps, self.alpha, (0.0, 1.0))
                    tick(1 / (self.counts[-1][0] * config.restarts))
            self._judge(found[row], x_adv, y, index)
            done = count

    @torch.no_grad()
    def _judge(self, found: Tensor, x: Tensor, y: Tensor, index: Tensor) -> None:
        """Mark in `found`, (B,), which of the images at `index` are misclassified as `x`."""
        found[index] |= ~correct(self.model(x), y)


class _Ticker:
    """Turns shares of the work on a batch into whole images of progress."""

    def __init__(self, progress: Progress, images: int) -> None:
        self.progress, self.images = progress, images
        self.share, self.told = 0.0, 0

    def __call__(self, more: float) -> None:
        self.share += more
        # The last image waits until the batch is done.
        self._tell(min(int(self.share * self.images), self.images - 1))

    def finish(self) -> None:
        """Tell the rest of the batch."""
        self._tell(self.images)

    def _tell(self, whole: int) -> None:
        if whole > self.told:
            self.progress.advance(whole - self.told)
            self.told = whole
