"""Explaining: the norms of weight matrices (Figure 1), and reading what a diagnosis found.

`fastiat norms` leaves norms.json in a run directory and `fastiat diagnose` (`fastiat.analyse`)
diagnosis.json; `read_norms` and `read_diagnosis` give both back as dataclasses.
"""

import io
import json
import math
import os
import shlex
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
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
from fastiat.config import DiagnoseConfig, EvaluateConfig, NormsConfig
from fastiat.engine.device import own_defaults, pick_device
from fastiat.evaluate import Job, data_place, open_runs, prepare
from fastiat.measuring import verdicts
from fastiat.measuring.autoattack import autoattack as run_autoattack
from fastiat.measuring.autoattack import check_classes, library_version
from fastiat.measuring.one_pass import default_batch, fooled, within_memory
from fastiat.models import ModelCard, correct, to_pixels
from fastiat.page.figures import drawable
from fastiat.runs.directory import Run, load_with_card
from fastiat.runs.results import provenance
from fastiat.system.errors import InputError, printable
from fastiat.system.files import check_place, write
from fastiat.system.progress import Progress
from fastiat.system.settings import expanded
from fastiat.system.untrusted import read_as

NORMS, DIAGNOSIS = "norms.json", "diagnosis.json"
Verdict = Literal["pass", "warn", "fail", "not done"]
T = TypeVar("T")


@dataclass(frozen=True)
class WeightNorms:
    """The norms of one weight; norms.json is a list of these."""

    name: str
    """Parameter, such as "groups.0.0.conv1.weight"."""
    shape: tuple[int, ...]
    """(out, in) of a linear layer, (out, in, kh, kw) of a convolution."""
    matrix: tuple[int, int]
    """What the norms are of: (out, in), or (out, in * kh * kw) for a convolution."""
    frobenius: float
    """Root of the sum of squares."""
    spectral: float
    """Largest singular value."""


@dataclass(frozen=True)
class Finding:
    """What one check for masked gradients found; diagnosis.json is a list of these."""

    check: str
    """Name of the check, such as "FGSM weaker than PGD"."""
    verdict: Verdict
    figures: dict
    """What was measured, by name with its unit: numbers, lists of numbers, text or None."""
    sentence: str
    """What it means, for a newcomer."""


@own_defaults()
def norms(config: NormsConfig) -> dict[str, list[WeightNorms]]:
    """Print the norms of every run of `config`, write their norms.json, and chart them together.

    Returns them as {run: norms}. A model file has no directory to write norms.json to, nor has
    somebody else's run. Raises `InputError` for runs that are missing or not comparable.
    """
    config.check()
    found: dict[str, list[WeightNorms]] = {}
    cards: dict[str, ModelCard] = {}
    for name in config.runs:
        model, cards[name] = load_with_card(name)
        if Path(name).is_dir():
            Run.open(Path(name))
        found[name] = _check(name, weight_norms(model))
    _check_comparable(found, cards)
    chart = _chart_path(config)
    check_place(chart.with_name(f"{chart.name}.png"))
    labels = _labels(config.runs)
    for name, layers in found.items():
        if Path(name).is_dir() and os.access(name, os.W_OK):
            write(Path(name) / NORMS, _json(layers))
    print(_table({labels[name]: layers for name, layers in found.items()}))
    chart.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw_norms({labels[name]: layers for name, layers in found.items()})
    for kind, content in pictures.items():
        write(chart.with_name(f"{chart.name}.{kind}"), content)
    print(f"chart: {chart}.png, {chart}.svg")
    return found


def weight_norms(model: nn.Module) -> list[WeightNorms]:
    """Return the Frobenius and spectral norm of every weight of `model` with two or more axes.

    A convolution's (out, in, kh, kw) counts as the matrix (out, in * kh * kw), as it multiplies
    one patch; that is not the norm of the whole linear map over an image. Biases and BatchNorm's
    scales are vectors and left out. (Section 4.4 of the IAT paper, after Bartlett et al. 2017.)
    """
    layers = []
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        matrix = weight.detach().flatten(1).double()
        layers.append(
            WeightNorms(
                name=name,
                shape=tuple(weight.shape),
                matrix=(matrix.shape[0], matrix.shape[1]),
                frobenius=float(torch.linalg.matrix_norm(matrix)),
                spectral=spectral_norm(matrix),
            )
        )
    return layers


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value of `matrix`, (M, N), NaN if it is not finite.

    It is the root of the largest eigenvalue of the smaller Gram matrix, in float64. Squaring costs
    the small singular values their digits, not the largest; and no kernel here has a smaller side
    above 640, so that this takes milliseconds where a full SVD takes a second.
    """
    matrix = matrix.double()
    if not matrix.isfinite().all():
        return math.nan
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0))


def draw_norms(found: dict[str, list[WeightNorms]]) -> dict[str, bytes]:
    """Draw the norms as the paper's Figure 1: grouped bars, a group per layer, a bar per run.

    `found` maps labels to norms of the same layers. Returns {"png": bytes, "svg": bytes}.
    """
    layers = next(iter(found.values()))
    names = [layer.name.removesuffix(".weight") for layer in layers]
    width = 0.8 / len(found)
    figure = Figure(figsize=(max(8.0, 0.28 * len(layers) * (1 + len(found) / 2)), 6.4))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, norm in zip(axes, ("frobenius", "spectral"), strict=True):
        for number, (label, of_run) in enumerate(found.items()):
            at = [layer - 0.4 + (number + 0.5) * width for layer in range(len(layers))]
            heights = [getattr(layer, norm) for layer in of_run]
            axis.bar(at, heights, width, label=drawable(label))
        axis.set_ylabel(f"{norm.capitalize()} norm")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[1].set_xticks(range(len(layers)), names)
    if len(layers) > 8:
        axes[1].tick_params(axis="x", rotation=45)
        for name in axes[1].get_xticklabels():
            name.set(ha="right", rotation_mode="anchor")
    axes[1].set_xlim(-0.6, len(layers) - 0.4)
    axes[1].set_xlabel("layer, input first")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    pictures = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        # Without a date and random ids, so that the same norms make the same file.
        with rc_context({"svg.hashsalt": "fastiat"}):
            figure.savefig(buffer, format=kind, dpi=100, metadata=_UNDATED[kind])
        pictures[kind] = buffer.getvalue()
    return pictures


_UNDATED: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}}


def read_norms(run_dir: str | os.PathLike[str]) -> list[WeightNorms]:
    """Return what `fastiat norms` found for a run, [] if it was not called on it.

    Raises `InputError` for a norms.json that is damaged.
    """
    return _read(Path(expanded(run_dir)) / NORMS, WeightNorms)


def read_diagnosis(run_dir: str | os.PathLike[str]) -> list[Finding]:
    """Return what `fastiat diagnose` last found for a run, [] if it was not called on it.

    Raises `InputError` for a diagnosis.json that is damaged.
    """
    return _read(Path(expanded(run_dir)) / DIAGNOSIS, Finding)


def write_norms(run_dir: Path, layers: Sequence[WeightNorms]) -> None:
    """Write norms.json, whole or not at all."""
    write(run_dir / NORMS, _json(layers))


def write_diagnosis(run_dir: Path, findings: Sequence[Finding]) -> None:
    """Write diagnosis.json, whole or not at all."""
    write(run_dir / DIAGNOSIS, _json(findings))


def _json(rows: Sequence[Any]) -> bytes:
    return json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False).encode() + b"\n"


def _read(file: Path, kind: type[T]) -> list[T]:
    if not file.exists():
        return []
    return read_as(file, list[kind], "remove it and make it again")  # type: ignore[valid-type]


def _check(name: str, layers: list[WeightNorms]) -> list[WeightNorms]:
    for layer in layers:
        if not math.isfinite(layer.frobenius):
            raise InputError(
                f"{name}: {layer.name} holds NaN or infinity, its training diverged: "
                f"train it again with a lower --lr"
            )
    return layers


def _check_comparable(found: dict[str, list[WeightNorms]], cards: dict[str, ModelCard]) -> None:
    """Raise `InputError`, naming the first that differs, unless all have the same weights."""
    first, *others = found
    shapes = {name: [(layer.name, layer.shape) for layer in found[name]] for name in found}
    for other in others:
        if shapes[other] != shapes[first]:
            raise InputError(
                f"{other} is {_describe(cards[other])}, but {first} is {_describe(cards[first])}: "
                f"chart runs of one architecture at a time"
            )


def _describe(card: ModelCard) -> str:
    return (
        f"{card.arch} of width {card.width} for {card.num_classes} classes of "
        f"{card.in_channels}x{card.image_size}x{card.image_size} images"
    )


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Name runs by their last part, or in full where two would be called the same."""
    short = {name: printable(Path(name).resolve().name) for name in names}
    taken = list(short.values())
    return {name: label if taken.count(label) == 1 else name for name, label in short.items()}


def _chart_path(config: NormsConfig) -> Path:
    """Return where the chart goes, without the ending."""
    if config.out:
        out = Path(config.out)
        return out.with_suffix("") if out.suffix in (".png", ".svg") else out
    folders = [Path(name) if Path(name).is_dir() else Path(name).parent for name in config.runs]
    return (folders[0] if len(folders) == 1 else folders[0].absolute().parent) / "norms"


def _table(found: dict[str, list[WeightNorms]]) -> str:
    """Write the norms as text, a row per weight; a column per run under each norm."""
    first = next(iter(found.values()))
    names = max(len(layer.name) for layer in first) + 2
    column = max(12, *(len(label) + 2 for label in found))
    lines = []
    for norm in ("frobenius", "spectral"):
        lines.append(f"{norm.capitalize()} norm")
        lines.append(
            " " * names + f"{'matrix':>12}" + "".join(f"{label:>{column}}" for label in found)
        )
        for row, layer in enumerate(first):
            size = f"{layer.matrix[0]}x{layer.matrix[1]}"
            cells = "".join(f"{getattr(of[row], norm):{column}.4g}" for of in found.values())
            lines.append(f"{layer.name:<{names}}{size:>12}{cells}")
    lines.append("convolutions count as matrices of (out, in x kernel height x kernel width)")
    return "\n".join(lines)


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
