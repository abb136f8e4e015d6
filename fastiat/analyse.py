"""Analysing runs: the norms of the weights (Figure 1), and checks for masked gradients.

`fastiat norms` writes norms.json into a run directory, `fastiat diagnose` diagnosis.json.
"""

import io
import math
import os
import shlex
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from fastiat.config import DiagnoseConfig, EvaluateConfig, NormsConfig
from fastiat.engine.device import own_defaults, pick_device
from fastiat.evaluate import Job, data_place, open_runs, prepare
from fastiat.measuring.autoattack import check_classes, library_version
from fastiat.measuring.norms import WeightNorms, weight_norms, write_norms
from fastiat.measuring.one_pass import within_memory
from fastiat.measuring.probe import CROSSING, USUAL_STEPS, examine
from fastiat.measuring.verdicts import Finding, write_diagnosis
from fastiat.page.figures import drawable
from fastiat.runs.directory import ModelCard, Run, load_with_card
from fastiat.runs.results import provenance
from fastiat.system.errors import InputError, printable
from fastiat.system.files import check_place, write


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
            write_norms(Path(name), layers)
    print(_table({labels[name]: layers for name, layers in found.items()}))
    chart.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw_norms({labels[name]: layers for name, layers in found.items()})
    for kind, content in pictures.items():
        write(chart.with_name(f"{chart.name}.{kind}"), content)
    print(f"chart: {chart}.png, {chart}.svg")
    return found


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
