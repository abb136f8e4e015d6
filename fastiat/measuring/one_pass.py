"""White-box errors: one pass over a split finds the images that each of several attacks fools.

The iterates of PGD with K steps include the examples of PGD with fewer steps. So PGD-5, 10, 20, 50,
100 and 1000 together cost as much as PGD-1000 alone.
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
    name, targeted, _ = attack.partition("-targeted")
    return TITLES.get(name, name.upper()) + " targeted" * bool(targeted)


def default_batch(side: int, batch_size: int | None = None) -> int:
    """Return a batch size with which an attack takes no more memory than the training.

    side: height and width of an image in pixels.
    batch_size: batch size of the training, summed over all processes of the job. None (a model file
        without its run) gives a batch with as many pixels as 64 images of 64 x 64 pixels.
    """
    fitting = 64 * 64**2 // side**2 if batch_size is None else batch_size // ranks().count
    return max(min(MOST_AT_A_TIME, fitting), 1)


@contextmanager
def within_memory(command: str, runs: Iterable[str], batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error in the block into `InputError` that names a smaller batch size.

    `batch_size` images are attacked at a time; `command` and `runs` are for the message.
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
            else "use a device with more memory, or end other programs that use its memory"
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
    """Yield pixels (B, C, H, W) in [0, 1] and labels (B,) of a shard, on `device`; B is `size`.

    Before each batch, `starts.first` is set to the index of its first image in the split, so that
    an image's random start depends neither on the batch size nor on the rank.
    """
    loader = data.make_loader(split, size, device=device, train=False, shard=shard)
    # A shard has every `shard.ranks`-th batch of the split; only the last batch of the split may be
    # shorter than `size`.
    for number, (images, y) in zip(itertools.count(shard.rank, shard.ranks), loader, strict=False):
        starts.batch(number * size)
        yield to_pixels(images), y


@torch.no_grad()
def best_wrong_class(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the wrong class with the highest logit of each image, (B,) int64."""
    logits = model(x)
    own = torch.arange(logits.shape[1], device=y.device) == y[:, None]
    return logits.masked_fill(own, -torch.inf).argmax(1)


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

    attacks: names such as "none", "fgsm" and "pgd-20"; none changes the result of another. PGD's
        random starts are those of one call of `fastiat.attack.pgd` on all images with a generator
        of the seed, for every number of steps and batch size.
    eps, alpha: radius and PGD step size, for pixels in [0, 1].
    config: gives norm, loss, restarts, random start, seed, batch size, device and precision.
    worst: skip images that are misclassified already, so that only the union over the attacks is
        meaningful. "none" is added as the first attack.

    Attacks run in the configuration's precision; examples are classified in fp32. With several
    restarts, an image counts if the example of any restart is misclassified. The ranks of a job
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
                wrong = one_pass(x, y)
            # Outside of the context, which may undo every write to an older tensor.
            found[:, starts.first : starts.first + len(y)] = wrong
    # Each rank has filled in its own batches and left 0 elsewhere, so the sum over the ranks is the
    # whole result.
    return dict(zip(names, group.all_reduce_sum_(found.cpu()).bool(), strict=True))


class _Pass:
    """All attacks of one pass. A call attacks one batch."""

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
        # (number of PGD steps, row of the result), in rising order of steps; targeted attacks have
        # iterates of their own.
        self.stops: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for name, row in self.rows.items():
            if name not in ("none", "fgsm"):
                self.stops[name.endswith("-targeted")].append((steps_of(name), row))
        self.stops = {targeted: sorted(stops) for targeted, stops in self.stops.items() if stops}
        # PGD steps of a batch that no image drops out of.
        self.steps = config.restarts * sum(stops[-1][0] for stops in self.stops.values())
        # Of the current batch: images that the progress shows, and PGD steps that are done.
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
                norm, loss = self.config.ball, self.config.attack_loss
                with autocast(x.device, self.precision):
                    x_adv = fgsm(self.model, x[left], y[left], eps=self.eps, norm=norm, loss=loss)
                self._classify(found[self.rows["fgsm"]], x_adv, y[left], left)
        for targeted in self.stops:
            # Every kind of attack gets the same random starts, so that the result of one does not
            # depend on the other.
            self.starts.batch(self.starts.first)
            for restart in range(self.config.restarts):
                self._pgd(found, x, y, index, restart, targeted)
        self._show(len(y))
        return found

    def _pgd(
        self, found: Tensor, x: Tensor, y: Tensor, index: Tensor, restart: int, targeted: bool
    ) -> None:
        """Run PGD from one start, and classify the iterates after each number in `self.stops`."""
        config, images, steps, stops = self.config, len(y), 0, self.stops[targeted]
        target = best_wrong_class(self.model, x, y) if targeted else y
        step = kernels.pgd_step if config.ball == "linf" else kernels.pgd_step_l2
        x_adv = x
        if config.random_start:
            # Drawn for the whole batch, before images drop out: the start of an image must not
            # depend on which other images are still attacked.
            x_adv = start_in_ball(x, self.eps, config.ball, (0.0, 1.0), self.starts)
        for number, (stop, row) in enumerate(stops):
            if self.worst or restart:
                # An image drops out when the remaining steps cannot change its result: with `worst`
                # after any success, else when earlier restarts have fooled it in all remaining
                # rows.
                to_come = [later for _, later in stops[number:]]
                decided = found.any(0) if self.worst else found[to_come].all(0)
                left = ~decided[index]
                x, x_adv, y, index = x[left], x_adv[left], y[left], index[left]
                target = target[left]
            if not len(index):
                return
            # One autocast context for all steps up to `stop`, which then share the bf16 copies of
            # the weights. Classification is outside the context, in fp32.
            with autocast(x.device, self.precision):
                for _ in range(stop - steps if self.eps else 0):
                    grad = input_gradient(self.model, x_adv, target, config.attack_loss)
                    # A targeted attack goes down the loss of the target class.
                    grad = -grad if targeted else grad
                    x_adv = step(x_adv, grad, x, self.eps, self.alpha, (0.0, 1.0))
                    self.done += 1
                    # `__call__` shows the last image when the batch is complete.
                    self._show(min(images * self.done // self.steps, images - 1))
            self._classify(found[row], x_adv, y, index)
            steps = stop

    @torch.no_grad()
    def _classify(self, found: Tensor, x: Tensor, y: Tensor, index: Tensor) -> None:
        """Set `found`, (B,), to True at the images of `x` that are misclassified.

        `index` has the position in the batch of each image of `x`. True values of `found` stay
        True: a later restart does not undo a success.
        """
        found[index] |= ~correct(self.model(x), y)

    def _show(self, images: int) -> None:
        """Advance the progress to `images` images of this batch.

        During PGD, a share of the steps counts as that share of the images.
        """
        if images > self.shown:
            self.progress.advance(images - self.shown)
            self.shown = images
