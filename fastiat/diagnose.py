"""Explaining: is a robustness figure real? The field's checks for masked gradients.

A network masks its gradients when they do not point where its loss rises: attacks that follow them
fail, though adversarial examples are near. The checks are those of Athalye et al. 2018, section
3.1, and Carlini et al. 2019 (On Evaluating Adversarial Robustness).
"""

import os
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import __version__, data, kernels, verdicts
from fastiat.analyse import Finding, write_diagnosis
from fastiat.attack import Loss, Norm, crafting, fgsm, input_gradient, pgd, start_in_ball
from fastiat.config import DiagnoseConfig, EvaluateConfig, TrainConfig
from fastiat.errors import InputError
from fastiat.evaluate import _prepare
from fastiat.models import to_pixels
from fastiat.progress import Progress

CLIP = (0.0, 1.0)

STEPS = (1, 5, 20, 100)
"""Step counts compared; the paper's own Table 7 moves by half a point after 20."""
USUAL = 20
"""Steps of the attack that every other one is compared with: what tables usually quote."""
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


def diagnose(config: DiagnoseConfig) -> list[Finding]:
    """Check the run of `config`, print the findings and return them.

    A run directory gets them as diagnosis.json, and a row in its metrics.jsonl. Raises
    `InputError` for runs or data that are missing or do not fit each other.
    """
    config.check()
    started = time.monotonic()
    load = cache(data.load)
    measured = EvaluateConfig(
        limit=config.limit,
        seed=config.seed,
        dataset=config.dataset,
        data_dir=config.data_dir,
        device=config.device,
        eps=config.eps,
        alpha=config.alpha,
    )
    job = _prepare(config.run, measured, load)
    partner = None
    if config.partner:
        # On the run's own images: a partner that they do not fit is told so.
        own = job.run.config if job.run else TrainConfig()
        same = replace(
            measured,
            dataset=config.dataset or own.dataset,
            data_dir=config.data_dir or own.data_dir,
        )
        partner = _prepare(config.partner, same, load).model
    alpha = job.alpha
    if not job.eps:
        raise InputError(f"{config.run} was trained with eps 0: say with --eps which to check")
    if config.alpha is None:
        alpha = max(alpha, CROSSING * job.eps / USUAL)
    elif USUAL * alpha < job.eps:
        raise InputError(
            f"--alpha is {alpha:g}: {USUAL} such steps do not reach eps {job.eps:g}, "
            f"give at least {CROSSING * job.eps / USUAL:g}"
        )
    findings = examine(
        job.model,
        job.splits["test"],
        eps=job.eps,
        alpha=alpha,
        norm=config.norm,
        seed=config.seed,
        batch_size=config.batch_size,
        partner=partner,
    )
    n = len(job.splits["test"])
    text = (
        f"{config.run}: masking checks on {n} test images of {job.dataset}, "
        f"{config.norm} eps {job.eps:.4g}, alpha {alpha:.4g}\n{_page(findings)}"
    )
    if job.run is None or not os.access(job.run.path, os.W_OK):
        print(text, flush=True)
        return findings
    write_diagnosis(job.run.path, findings)
    job.run.log(
        "diagnosis",
        verdicts={finding.check: finding.verdict for finding in findings},
        dataset=job.dataset,
        n=n,
        eps=job.eps,
        alpha=alpha,
        norm=config.norm,
        partner=config.partner and str(Path(config.partner).absolute()),
        seed=config.seed,
        device=str(next(job.model.parameters()).device),
        fastiat=__version__,
        torch=torch.__version__,
        seconds=round(time.monotonic() - started, 3),
    )
    job.run.say(text)
    return findings


def examine(
    model: nn.Module,
    split: data.Split,
    *,
    eps: float = 0.03,
    alpha: float = 0.0075,
    norm: Norm = "linf",
    seed: int = 0,
    batch_size: int = 500,
    partner: nn.Module | None = None,
) -> list[Finding]:
    """Return what every check finds about `model`, which takes pixels and returns logits.

    `split` holds the images; `eps` and `alpha` are the attack's radius and step, in pixels of 0 to
    1; `partner` is another network for the same images, on the device of `model`. Everything is
    computed in fp32, as what rounds to zero is part of the question. Steps longer than `alpha` are
    taken where the ball is too large for it.
    """
    device = next(model.parameters()).device
    images = data.ResidentLoader(split, batch_size, device=device, train=False)
    probe = _Probe(model, images, len(split), eps, alpha, norm, seed)
    clean = probe.fooled("No attack", lambda x, y: x)
    single = probe.fooled("FGSM", lambda x, y: fgsm(model, x, y, eps=eps, norm=norm))
    by_steps = probe.climb(f"PGD-{max(STEPS)}", STEPS, eps)
    usual = by_steps[USUAL]
    by_eps = {eps: usual}
    for larger in probe.larger():
        title = f"PGD-{USUAL}, eps {larger:.3g}"
        by_eps[larger] = probe.climb(title, (USUAL,), larger)[USUAL]
    margin = probe.climb(f"PGD-{USUAL}, margin", (USUAL,), eps, "margin")[USUAL]
    noise_eps = telling_eps(clean, by_eps)
    return [
        verdicts.fgsm_weaker(single, usual),
        verdicts.more_steps(by_steps),
        verdicts.larger_eps(by_eps),
        verdicts.white_box(None if partner is None else probe.transfer(partner), usual),
        verdicts.noise_weaker(
            clean, probe.noise(noise_eps), by_eps[noise_eps], eps=noise_eps, points=NOISES
        ),
        verdicts.gradients(probe.gradient_norms()),
        verdicts.surface(*probe.surface(), list(FRACTIONS)),
        verdicts.cross_entropy(usual, margin),
        verdicts.autoattack_gap(None, usual),
    ]


@dataclass(frozen=True)
class _Probe:
    """A network, the images it is attacked on, and the attack's budget."""

    model: nn.Module
    images: data.ResidentLoader
    n: int
    eps: float
    alpha: float
    norm: Norm
    seed: int

    def batches(self, title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels and labels with the network in eval mode, and show the progress."""
        with Progress(title, self.n) as progress, crafting(self.model, "eval"):
            for images, y in self.images:
                yield to_pixels(images), y
                progress.advance(len(y))

    def fooled(self, title: str, craft: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return which images the network gets wrong after `craft`, (N,) bool."""
        return torch.cat([self.wrong(craft(x, y), y) for x, y in self.batches(title)])

    @torch.no_grad()
    def wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """Return which images the network gets wrong, (B,) bool on the CPU."""
        return (self.model(x).argmax(1) != y).cpu()

    def generator(self) -> torch.Generator:
        """Return a fresh generator, so that every attack starts from the same points."""
        return torch.Generator(self.images.device).manual_seed(self.seed)

    def larger(self) -> list[float]:
        """Return the radii beyond eps to try; in the last one's ball lies every image."""
        _, height, width, channels = self.images.images.shape
        whole = 1.0 if self.norm == "linf" else (height * width * channels) ** 0.5
        return [*(k * self.eps for k in GROWTH if k * self.eps < whole), whole]

    def climb(
        self, title: str, steps: Sequence[int], eps: float, loss: Loss = "ce"
    ) -> dict[int, Tensor]:
        """Return which images one run of PGD has fooled after so many steps, {steps: (N,) bool}."""
        step = kernels.pgd_step if self.norm == "linf" else kernels.pgd_step_l2
        alpha = max(self.alpha, CROSSING * eps / USUAL)
        generator = self.generator()
        fooled: dict[int, list[Tensor]] = {count: [] for count in steps}
        for x, y in self.batches(title):
            x_adv = start_in_ball(x, eps, self.norm, CLIP, generator)
            for taken in range(1, max(steps) + 1):
                grad = input_gradient(self.model, x_adv, y, loss)
                x_adv = step(x_adv, grad, x, eps, alpha, CLIP)
                if taken in fooled:
                    fooled[taken].append(self.wrong(x_adv, y))
        return {count: torch.cat(parts) for count, parts in fooled.items()}

    def noise(self, eps: float) -> Tensor:
        """Return which images one of `NOISES` random points in the ball fools, (N,) bool."""
        generator = self.generator()
        fooled = []
        for x, y in self.batches("Noise"):
            tries = [start_in_ball(x, eps, self.norm, CLIP, generator) for _ in range(NOISES)]
            fooled.append(torch.stack([self.wrong(at, y) for at in tries]).any(0))
        return torch.cat(fooled)

    def transfer(self, partner: nn.Module) -> Tensor:
        """Return which images the examples made for `partner` fool, (N,) bool."""
        generator = self.generator()
        return self.fooled(
            "Transfer",
            lambda x, y: pgd(
                partner,
                x,
                y,
                eps=self.eps,
                alpha=self.alpha,
                steps=USUAL,
                norm=self.norm,
                generator=generator,
            ),
        )

    def gradient_norms(self) -> Tensor:
        """Return the L2 norm of the loss's gradient at every image, (N,) float64."""
        norms = []
        for x, y in self.batches("Gradients"):
            gradient = input_gradient(self.model, x, y).double()
            norms.append(torch.linalg.vector_norm(gradient.flatten(1), dim=1))
        return torch.cat(norms).cpu()

    def surface(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss on the way to eps along the gradient and along noise, both (F, N).

        F runs over `FRACTIONS`. Third comes the linearity error at eps along the gradient: how far
        the loss misses what the gradient foretells, as a share of that (after Qin et al. 2019).
        """
        generator = self.generator()
        rise, drift, curvature = [], [], []
        for x, y in self.batches("Loss surface"):
            gradient = input_gradient(self.model, x, y)
            noise = torch.empty_like(x).normal_(generator=generator)
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
    for eps, fooled in by_eps.items():
        if verdicts.percent(fooled) - verdicts.percent(clean) >= NOISE_POINTS:
            return eps
    return max(by_eps)


def _page(findings: Sequence[Finding]) -> str:
    """Write the findings as text: verdict and check, the figures, what it means."""
    lines = []
    for finding in findings:
        figures = ", ".join(
            f"{_plain(name)} {_number(value)}{' %' * name.endswith('_percent')}"
            for name, value in finding.figures.items()
            if name not in UNSHOWN
        )
        lines.append(f"{finding.verdict:<10}{finding.check}")
        for text in (figures, finding.sentence):
            lines += textwrap.wrap(text, 90, initial_indent=INDENT, subsequent_indent=INDENT)
    counts = Counter(finding.verdict for finding in findings)
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    lines.append("A pass says that the error under attack can be believed, not that it is low.")
    return "\n".join(lines)


INDENT = " " * 10
UNSHOWN = ("n", "fractions_of_eps", "median_loss_along_gradient", "median_loss_along_random")
"""Figures for a chart, or told in the title."""


def _plain(name: str) -> str:
    return name.removesuffix("_percent").replace("_", " ")


def _number(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_number, value))
    return "none" if value is None else f"{value:.4g}"
