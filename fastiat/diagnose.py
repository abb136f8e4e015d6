"""Explaining: is a robustness figure real? The field's checks for masked gradients.

A network masks its gradients when they do not point where its loss rises: attacks that follow them
fail, though adversarial examples are near. The checks are those of Athalye et al. 2018, section
3.1, and Carlini et al. 2019 (On Evaluating Adversarial Robustness).
"""

import math
import os
import shlex
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastiat import data, loaders
from fastiat.analyse import Finding, write_diagnosis
from fastiat.ascent import Starts, gaussian_noise
from fastiat.attack import Loss, Norm, attack_mode, input_gradient, pgd, start_in_ball
from fastiat.engine.device import own_defaults, pick_device
from fastiat.evaluate import Job, data_place, open_runs, prepare
from fastiat.measuring import verdicts
from fastiat.measuring.autoattack import autoattack as run_autoattack
from fastiat.measuring.autoattack import check_classes, library_version
from fastiat.measuring.one_pass import default_batch, fooled, within_memory
from fastiat.models import correct, to_pixels
from fastiat.queries import DiagnoseConfig, EvaluateConfig
from fastiat.runs.results import provenance
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


@own_defaults()
def diagnose(config: DiagnoseConfig) -> list[Finding]:
    """Check the run of `config`, print the findings and return them.

    A run directory gets them as diagnosis.json, and a row in its metrics.jsonl. Raises
    `InputError` for runs or data that are missing or do not fit each other.
    """
    config.check()
    started = time.monotonic()
    library = {"autoattack": library_version()} if config.autoattack else {}
    job, *partners = _prepare(config)
    if config.autoattack:
        check_classes(job.name, job.card.num_classes)
    images = job.splits["test"]
    eps, alpha = _radius_and_step(job, config)
    measured = EvaluateConfig(batch_size=config.batch_size)
    size = min(one.batch_size(measured) for one in (job, *partners))
    with within_memory(f"fastiat diagnose {shlex.quote(job.name)}", size):
        findings = examine(
            job.model,
            images,
            eps=eps,
            alpha=alpha,
            norm=config.norm,
            seed=config.seed,
            batch_size=size,
            partner=partners[0].model if partners else None,
            autoattack=config.autoattack,
        )
    if job.run and os.access(job.run.path, os.W_OK):
        write_diagnosis(job.run.path, findings)
        job.run.log(
            "diagnosis",
            verdicts={finding.check: finding.verdict for finding in findings},
            dataset=job.dataset.name,
            n=len(images),
            eps=eps,
            alpha=alpha,
            norm=config.norm,
            partner=partners[0].fingerprint if partners else None,
            seed=config.seed,
            batch_size=size,
            model=job.fingerprint,
            **provenance(pick_device(config.device), time.monotonic() - started, **library),
        )
    job.log_line(
        f"{job.name}: masking checks on {len(images)} test images of {job.dataset.name}, "
        f"{config.norm} eps {eps:.4g}, alpha {alpha:.4g}\n{_page(findings)}"
    )
    return findings


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
        loader = loaders.make(self.split, self.batch_size, device=self.device, train=False)
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


def _prepare(config: DiagnoseConfig) -> list[Job]:
    """Return the run and, where there is one, its partner, with the run's images for both."""
    names = (config.run, config.partner) if config.partner else (config.run,)
    measured = EvaluateConfig(
        runs=names,
        limit=config.limit,
        seed=config.seed,
        dataset=config.dataset,
        data_dir=config.data_dir,
        device=config.device,
    )
    runs = open_runs(measured)
    if runs[0].run:
        own = runs[0].settings
        measured = replace(
            measured,
            dataset=config.dataset or own.dataset,
            data_dir=data_place(config, own),
        )
    return prepare(runs, measured)


def _radius_and_step(job: Job, config: DiagnoseConfig) -> tuple[float, float]:
    """Return the configuration's eps and alpha, else the run's, or raise `InputError`."""
    eps = job.settings.eps if config.eps is None else config.eps
    if not eps:
        raise InputError(f"{job.name} was trained with eps 0: say with --eps which to check")
    least = CROSSING * eps / USUAL_STEPS
    if config.alpha is None:
        return eps, max(job.settings.alpha, least)
    if USUAL_STEPS * config.alpha < eps:
        raise InputError(
            f"--alpha is {config.alpha:g}: {USUAL_STEPS} such steps do not reach eps {eps:g}, "
            f"give at least {least:g}"
        )
    return eps, config.alpha


def telling_eps(clean: Tensor, by_eps: dict[float, Tensor]) -> float:
    """Return the smallest eps at which PGD adds `NOISE_POINTS` of error, else the largest."""
    for eps, found in by_eps.items():
        if verdicts.percent(found) - verdicts.percent(clean) >= NOISE_POINTS:
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
            lines += textwrap.wrap(
                text,
                90,
                initial_indent=INDENT,
                subsequent_indent=INDENT,
                break_on_hyphens=False,
            )
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
