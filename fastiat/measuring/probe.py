"""Measurements for `fastiat diagnose`: the attacks that its checks compare.

What the measurements mean is `fastiat.measuring.verdicts`'.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import data
from fastiat.attack import (
    Loss,
    Norm,
    Starts,
    attack_mode,
    gaussian_noise,
    input_gradient,
    pgd,
    start_in_ball,
)
from fastiat.config import EvaluateConfig
from fastiat.measuring import verdicts
from fastiat.measuring.autoattack import autoattack as run_autoattack
from fastiat.measuring.one_pass import default_batch, fooled
from fastiat.measuring.verdicts import Finding
from fastiat.models import correct, to_pixels
from fastiat.system.errors import InputError
from fastiat.system.progress import Progress

CLIP = (0.0, 1.0)

STEPS = (1, 5, 20, 100)
"""Step counts compared; the paper's own Table 7 moves by half a point after 20."""
USUAL_STEPS = 20
"""Steps of the attack that every other one is compared with: what tables usually quote."""
USUAL = f"pgd-{USUAL_STEPS}"
CROSSING = 2.5
"""Steps are so long that together they cross the radius this often (Madry et al. 2018, app.)."""
GROWTH = (2, 4, 8)
"""Multiples of eps that are tried before the ball holds every image there is."""
NOISES = 10
"""Random points tried per image; an image counts as fooled if one of them fools it."""
FRACTIONS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Where on the way to eps the loss is looked at."""

NOISE_POINTS = 10.0
"""Noise is compared at the smallest eps where PGD adds this much error: less is no measure."""


def examine(
    model: nn.Module,
    split: data.Split,
    *,
    eps: float = 0.03,
    alpha: float = 0.0075,
    norm: Norm = "linf",
    seed: int = 0,
    batch_size: int | None = None,
    partner: nn.Module | None = None,
    autoattack: bool = False,
) -> list[Finding]:
    """Return what every check finds about `model`, which takes pixels and returns logits.

    split: images to attack, on the device of `model`.
    eps, alpha: radius and PGD step, in pixels of 0 to 1; where the ball is too large for `alpha`,
        longer steps are taken.
    batch_size: images attacked at a time, None as many as `one_pass.default_batch` takes of their
        size; the findings do not depend on it.
    partner: another network for the same images, on the same device.
    autoattack: run AutoAttack too, which needs pyautoattack and at least 4 classes.

    Everything is computed in fp32, as what rounds to zero is part of the question. Raises
    `InputError` for settings that no attack takes.
    """
    size = batch_size or default_batch(split.shape[-1])
    probe = _Probe(model, split, eps, alpha, norm, seed, size)
    if eps >= probe.whole:
        raise InputError(
            f"eps {eps:g} allows every image there is, so that no network could be robust: "
            f"give less than {probe.whole:.4g}"
        )
    names = [f"pgd-{steps}" for steps in STEPS]
    found = probe.fooled(["none", "fgsm", *names], eps)
    clean, usual = found["none"], found[USUAL]
    by_eps = {eps: usual}
    for larger in probe.larger():
        by_eps[larger] = probe.fooled([USUAL], larger)[USUAL]
    noise_eps = telling_eps(clean, by_eps)
    auto = None
    if autoattack:
        auto = run_autoattack(model, split, eps=eps, config=probe.config).fooled
    return [
        verdicts.fgsm_weaker(found["fgsm"], usual),
        verdicts.more_steps({steps: found[f"pgd-{steps}"] for steps in STEPS}),
        verdicts.larger_eps(by_eps),
        verdicts.white_box(None if partner is None else probe.transfer(partner), usual),
        verdicts.noise_weaker(
            clean, probe.noise(noise_eps), by_eps[noise_eps], eps=noise_eps, points=NOISES
        ),
        verdicts.gradients(probe.gradient_norms()),
        verdicts.surface(*probe.surface(), list(FRACTIONS)),
        verdicts.cross_entropy(usual, probe.fooled([USUAL], eps, "margin")[USUAL]),
        verdicts.autoattack_gap(auto, usual),
    ]


@dataclass(frozen=True)
class _Probe:
    """A network, the images it is attacked on, and the attack's budget."""

    model: nn.Module
    split: data.Split
    eps: float
    alpha: float
    norm: Norm
    seed: int
    batch_size: int

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def config(self) -> EvaluateConfig:
        """The settings of the attacks, as `fastiat evaluate` has them."""
        return EvaluateConfig(
            norm=self.norm,
            seed=self.seed,
            batch_size=self.batch_size,
            device=str(self.device),
            precision="fp32",
        )

    def fooled(self, attacks: list[str], eps: float, loss: Loss = "ce") -> dict[str, Tensor]:
        """Return which images the attacks fool, {attack: (N,) bool}; PGDs share one run."""
        alpha = self.alpha
        if eps > self.eps:
            alpha = max(alpha, CROSSING * eps / USUAL_STEPS)
        config = replace(self.config, attack_loss=loss)
        return fooled(self.model, self.split, attacks, eps=eps, alpha=alpha, config=config)

    def larger(self) -> list[float]:
        """Return the radii beyond eps to try; in the last one's ball lies every image."""
        return [*(k * self.eps for k in GROWTH if k * self.eps < self.whole), self.whole]

    @property
    def whole(self) -> float:
        """The radius of a ball around any image that holds every image."""
        return 1.0 if self.norm == "linf" else math.prod(self.split.shape) ** 0.5

    def batches(self, title: str, starts: Starts) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels and labels with the network in eval mode, and show the progress.

        `starts` is put to the images of every batch.
        """
        loader = data.make_loader(self.split, self.batch_size, device=self.device, train=False)
        with Progress(title, len(self.split)) as progress, attack_mode(self.model, "eval"):
            for number, (images, y) in enumerate(loader):
                starts.batch(number * self.batch_size)
                yield to_pixels(images), y
                progress.advance(len(y))

    def starts(self) -> Starts:
        """Return fresh random starts, so that every attack has the same points."""
        return Starts(self.seed, self.device)

    @torch.no_grad()
    def wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """Return which images the network gets wrong, (B,) bool on the CPU."""
        return (~correct(self.model(x), y)).cpu()

    def noise(self, eps: float) -> Tensor:
        """Return which images one of `NOISES` random points in the ball fools, (N,) bool."""
        starts = self.starts()
        found = []
        for x, y in self.batches("Noise", starts):
            tries = [start_in_ball(x, eps, self.norm, CLIP, starts) for _ in range(NOISES)]
            found.append(torch.stack([self.wrong(at, y) for at in tries]).any(0))
        return torch.cat(found)

    def transfer(self, partner: nn.Module) -> Tensor:
        """Return which images the examples made for `partner` fool, (N,) bool."""
        starts = self.starts()
        craft = partial(
            pgd, partner, eps=self.eps, alpha=self.alpha, steps=USUAL_STEPS, norm=self.norm,
            generator=starts,
        )  # fmt: skip
        batches = self.batches("Transfer", starts)
        return torch.cat([self.wrong(craft(x, y), y) for x, y in batches])

    def gradient_norms(self) -> Tensor:
        """Return the L2 norm of the loss's gradient at every image, (N,) float64."""
        norms = []
        for x, y in self.batches("Gradients", self.starts()):
            gradient = input_gradient(self.model, x, y).double()
            norms.append(torch.linalg.vector_norm(gradient.flatten(1), dim=1))
        return torch.cat(norms).cpu()

    def surface(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss on the way to eps along the gradient and along noise, both (F, N).

        F runs over `FRACTIONS`. Third comes the linearity error at eps along the gradient: how far
        the loss misses what the gradient foretells, as a share of that (after Qin et al. 2019).
        """
        starts = self.starts()
        rise, drift, curvature = [], [], []
        for x, y in self.batches("Loss surface", starts):
            gradient = input_gradient(self.model, x, y)
            noise = gaussian_noise(x, starts.draw(x), starts.first)
            uphill, aside = (
                [(x + part * self.eps * self._unit(way)).clamp(*CLIP) for part in FRACTIONS]
                for way in (gradient, noise)
            )
            rise.append(torch.stack([precise_loss(self.model(at), y) for at in uphill]))
            drift.append(torch.stack([precise_loss(self.model(at), y) for at in aside]))
            foretold = (gradient.double() * (uphill[-1] - x)).flatten(1).sum(1)
            gained = rise[-1][-1] - rise[-1][0]
            curvature.append((gained - foretold).abs() / foretold.abs())
        return torch.cat(rise, 1).cpu(), torch.cat(drift, 1).cpu(), torch.cat(curvature).cpu()

    def _unit(self, direction: Tensor) -> Tensor:
        """Return the longest step of radius 1 along `direction`; zero where that is zero."""
        direction = direction.nan_to_num()
        if self.norm == "linf":
            return direction.sign()
        length = torch.linalg.vector_norm(direction.flatten(1), dim=1).clamp_min(1e-30)
        return direction / length.view(-1, *[1] * (direction.dim() - 1))


@torch.no_grad()
def precise_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each image, (B,) float64, exact where a float32 one is 0.

    With m the log-sum-exp of the wrong logits less the true logit, it is log(1 + exp(m)).
    """
    logits, label = logits.double(), y[:, None]
    wrong = logits.scatter(1, label, -torch.inf).logsumexp(1)
    return F.softplus(wrong - logits.gather(1, label).squeeze(1))


def telling_eps(clean: Tensor, by_eps: dict[float, Tensor]) -> float:
    """Return the smallest eps at which PGD adds `NOISE_POINTS` of error, else the largest."""
    for eps, found in by_eps.items():
        if verdicts.percent(found) - verdicts.percent(clean) >= NOISE_POINTS:
            return eps
    return max(by_eps)
