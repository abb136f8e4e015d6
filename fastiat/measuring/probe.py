"""The measurements of `fastiat diagnose`: attacks, noise and the loss surface around the images.

`fastiat.measuring.verdicts` turns these measurements into findings.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import data
from fastiat.attack import Norm, Starts, attack_mode, input_gradient, per_image, pgd, start_in_ball
from fastiat.attacks.starts import gaussian_noise
from fastiat.config import EvaluateConfig
from fastiat.measuring import verdicts
from fastiat.measuring.autoattack import autoattack as run_autoattack
from fastiat.measuring.one_pass import batches, default_batch, fooled
from fastiat.measuring.verdicts import Finding
from fastiat.models import correct
from fastiat.system.errors import InputError
from fastiat.system.progress import Progress

CLIP = (0.0, 1.0)
STEPS = (1, 5, 20, 100)
"""Numbers of PGD steps that are compared. In the paper's Table 7, errors grow by half a point after
20 steps."""
USUAL_STEPS = 20
"""Steps of the usual attack, which papers report most often; other attacks are compared with it."""
USUAL = f"pgd-{USUAL_STEPS}"
CROSSING = 2.5
"""All steps together are at least this many times eps long (Madry et al. 2018, appendix)."""
GROWTH = (2, 4, 8)
"""Multiples of eps that are tested before the radius whose ball contains every image."""
NOISES = 10
"""Random points per image; an image counts as fooled if any of its points is misclassified."""
FRACTIONS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Fractions of eps at which the loss is computed."""
NOISE_POINTS = 10.0
"""Noise and PGD are compared at the smallest eps at which PGD adds this many percentage points of
error: with fewer points, the ratio of the two added errors means little."""


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
    """Return the findings of all checks on `model`, which takes pixels and returns logits.

    split: images to attack; batches are moved to the device of `model`.
    eps, alpha: radius in `norm`, "linf" or "l2", and PGD step size, for pixels in [0, 1]. In balls
        larger than `eps`, the step size grows if PGD with `alpha` would not cross the ball.
    seed: seed of the random starts and of the noise.
    batch_size: images attacked at a time, which changes no finding; None: `default_batch`.
    partner: another network for the same images, on the same device; None omits the transfer check.
    autoattack: run AutoAttack too, which needs pyautoattack and at least 4 classes.

    Everything is computed in fp32, because gradients that round to zero are a sign of masked
    gradients. Raises `InputError` if the ball of radius `eps` contains every image.
    """
    size = batch_size or default_batch(split.shape[-1])
    device = str(next(model.parameters()).device)
    config = EvaluateConfig(norm=norm, seed=seed, batch_size=size, device=device, precision="fp32")
    probe = _Probe(model, split, eps, alpha, config)
    if eps >= probe.whole:
        raise InputError(
            f"eps {eps:g} allows every image there is, so no network could be robust: "
            f"give less than {probe.whole:.4g}"
        )
    names = [f"pgd-{steps}" for steps in STEPS]
    found = probe.fooled(["none", "fgsm", *names], eps)
    clean, usual = found["none"], found[USUAL]

    def added(fooled: Tensor) -> float:
        """Return the error that an attack adds to the clean error, in percentage points."""
        return verdicts.percent(fooled) - verdicts.percent(clean)

    by_eps = {eps: usual}
    for larger in (*(k * eps for k in GROWTH if k * eps < probe.whole), probe.whole):
        by_eps[larger] = probe.fooled([USUAL], larger)[USUAL]
    noise_eps = next((e for e in by_eps if added(by_eps[e]) >= NOISE_POINTS), max(by_eps))
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
    """A network, the images to attack, and the settings of the attacks."""

    model: nn.Module
    split: data.Split
    eps: float
    alpha: float
    config: EvaluateConfig

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.model.parameters()).device

    def fooled(
        self, attacks: list[str], eps: float, loss: Literal["ce", "margin"] = "ce"
    ) -> dict[str, Tensor]:
        """Return which images each attack fools, {attack: (N,) bool}, from one pass."""
        crossing = CROSSING * eps / USUAL_STEPS if eps > self.eps else 0.0
        alpha = max(self.alpha, crossing)
        config = replace(self.config, attack_loss=loss)
        return fooled(self.model, self.split, attacks, eps=eps, alpha=alpha, config=config)

    @property
    def whole(self) -> float:
        """The radius of a ball that contains every image, for any centre in the pixel range."""
        return 1.0 if self.config.ball == "linf" else math.prod(self.split.shape) ** 0.5

    def batches(self, title: str, starts: Starts) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels and labels, with the network in eval mode, and show the progress."""
        size = self.config.batch_size
        assert size
        with Progress(title, len(self.split)) as progress, attack_mode(self.model, "eval"):
            for x, y in batches(self.split, size, self.device, starts):
                yield x, y
                progress.advance(len(y))

    def starts(self) -> Starts:
        """Return new random starts with the same seed: every attack starts at the same points."""
        return Starts(self.config.seed, self.device)

    @torch.no_grad()
    def wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """Return which images are misclassified, (B,) bool on the CPU."""
        return (~correct(self.model(x), y)).cpu()

    def noise(self, eps: float) -> Tensor:
        """Return which images are wrong at any of `NOISES` random points, (N,) bool."""
        starts, norm = self.starts(), self.config.ball
        found = []
        for x, y in self.batches("Noise", starts):
            points = (start_in_ball(x, eps, norm, CLIP, starts) for _ in range(NOISES))
            found.append(torch.stack([self.wrong(at, y) for at in points]).any(0))
        return torch.cat(found)

    def transfer(self, partner: nn.Module) -> Tensor:
        """Return which images `model` misclassifies after an attack on `partner`, (N,) bool."""
        starts = self.starts()
        attack = partial(
            pgd, partner, eps=self.eps, alpha=self.alpha, steps=USUAL_STEPS,
            norm=self.config.ball, generator=starts,
        )  # fmt: skip
        images = self.batches("Transfer", starts)
        return torch.cat([self.wrong(attack(x, y), y) for x, y in images])

    def gradient_norms(self) -> Tensor:
        """Return the L2 norm of the loss gradient at every image, (N,) float64 on the CPU."""
        norms = []
        for x, y in self.batches("Gradients", self.starts()):
            gradient = input_gradient(self.model, x, y).double()
            norms.append(torch.linalg.vector_norm(gradient.flatten(1), dim=1))
        return torch.cat(norms).cpu()

    def surface(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments of `verdicts.surface`, which documents them, at `FRACTIONS` of eps.

        They are float64 on the CPU. The linearity error is after Qin et al. 2019.
        """
        starts = self.starts()
        along, aside, linearity = [], [], []
        for x, y in self.batches("Loss surface", starts):
            gradient = input_gradient(self.model, x, y)
            noise = gaussian_noise(x, starts.draw(x), starts.first)
            points, others = (
                [(x + part * self.eps * self._unit(way)).clamp(*CLIP) for part in FRACTIONS]
                for way in (gradient, noise)
            )
            along.append(torch.stack([precise_loss(self.model(at), y) for at in points]))
            aside.append(torch.stack([precise_loss(self.model(at), y) for at in others]))
            predicted = (gradient.double() * (points[-1] - x)).flatten(1).sum(1)
            rise = along[-1][-1] - along[-1][0]
            linearity.append((rise - predicted).abs() / predicted.abs())
        return torch.cat(along, 1).cpu(), torch.cat(aside, 1).cpu(), torch.cat(linearity).cpu()

    def _unit(self, direction: Tensor) -> Tensor:
        """Return each image's step of norm 1 with the largest product with `direction`, or zero."""
        direction = direction.nan_to_num()
        if self.config.ball == "linf":
            return direction.sign()
        length = torch.linalg.vector_norm(direction.flatten(1), dim=1).clamp_min(1e-30)
        return direction / per_image(length, direction)


@torch.no_grad()
def precise_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each image, (B,) float64, also if it would round to 0 in float32.

    With m = logsumexp(wrong logits) - true logit, the loss is log(1 + exp(m)).
    """
    logits, label = logits.double(), y[:, None]
    wrong = logits.scatter(1, label, -torch.inf).logsumexp(1)
    return F.softplus(wrong - logits.gather(1, label).squeeze(1))
