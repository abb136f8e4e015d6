"""Analysing runs: norms of the weights (Figure 1 of the paper), and checks for masked gradients.

`fastiat norms` writes norms.json into a run directory, `fastiat diagnose` diagnosis.json.
"""

import math
import os
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastiat.config import DiagnoseConfig, EvaluateConfig, NormsConfig
from fastiat.engine.device import own_defaults, pick_device
from fastiat.evaluate import table
from fastiat.measuring.autoattack import library_version
from fastiat.measuring.jobs import Job, open_jobs
from fastiat.measuring.norms import NORMS, WeightNorms, weight_norms
from fastiat.measuring.one_pass import within_memory
from fastiat.measuring.probe import CROSSING, USUAL_STEPS, examine
from fastiat.measuring.rows import write_rows
from fastiat.measuring.verdicts import DIAGNOSIS, Finding
from fastiat.models import ModelCard
from fastiat.page import figure1
from fastiat.runs.directory import Run, load_with_card
from fastiat.runs.results import provenance
from fastiat.system.errors import InputError, printable
from fastiat.system.files import check_place
from fastiat.system.settings import check_runs

INDENT = " " * 10
UNSHOWN = ("n", "fractions_of_eps", "median_loss_along_gradient", "median_loss_along_random")
"""Figures of a finding that the terminal does not show: lists for a chart, number of images."""


@own_defaults()
def norms(config: NormsConfig) -> dict[str, list[WeightNorms]]:
    """Print the norms of every run of `config`, write them to norms.json, and draw two charts.

    Returns {run: norms}. norms.json is written only into run directories that are writable. Raises
    `InputError` for runs that are missing, diverged or of different architectures.
    """
    config.check()
    found: dict[str, list[WeightNorms]] = {}
    cards: dict[str, ModelCard] = {}
    check_runs(config.runs)
    for name in config.runs:
        model, cards[name] = load_with_card(name, arch=config.arch)
        if Path(name).is_dir():
            Run.open(Path(name))
        found[name] = weight_norms(model)
        _check_finite(name, found[name])
    _check_comparable(found, cards)
    chart = _chart_path(config)
    check_place(chart.with_name(f"{chart.name}-{figure1.KINDS[0]}.png"))
    for name, layers in found.items():
        if Path(name).is_dir() and os.access(name, os.W_OK):
            write_rows(Path(name) / NORMS, layers)
    labelled = dict(zip(_labels(config.runs), found.values(), strict=True))
    for kind in figure1.KINDS:
        print(_norms_table(kind, labelled))
    print("convolutions count as matrices of (out, in x kernel height x kernel width)")
    for picture in figure1.draw_norms(
        chart.name, {run: [norms] for run, norms in labelled.items()}
    ):
        picture.save(chart.parent)
        print(f"chart: {chart.parent / picture.name}.png, {chart.parent / picture.name}.svg")
    return found


def _check_finite(name: str, layers: list[WeightNorms]) -> None:
    """Raise `InputError` if a weight of the run `name` is not finite."""
    for layer in layers:
        if not math.isfinite(layer.frobenius):
            raise InputError(
                f"{name}: {layer.name} holds NaN or infinity, so the training diverged: "
                f"train the run again with a lower --lr"
            )


def _check_comparable(found: dict[str, list[WeightNorms]], cards: dict[str, ModelCard]) -> None:
    """Raise `InputError` unless the weights of all runs have the same names and shapes."""
    first, *others = found
    shapes = {name: [(layer.name, layer.shape) for layer in found[name]] for name in found}
    for other in others:
        if shapes[other] != shapes[first]:
            raise InputError(
                f"{other} is {_describe(cards[other])}, but {first} is {_describe(cards[first])}: "
                f"give runs of one architecture at a time"
            )


def _describe(card: ModelCard) -> str:
    """Return the network of `card` as text for a message."""
    width = "" if card.width is None else f" of width {card.width}"
    return (
        f"{card.arch}{width} for {card.num_classes} classes of "
        f"{card.in_channels}x{card.image_size}x{card.image_size} images"
    )


def _labels(names: Sequence[str]) -> list[str]:
    """Return the last part of each run's path, or the whole path if two last parts are equal."""
    short = [printable(Path(name).resolve().name) for name in names]
    return [s if short.count(s) == 1 else name for s, name in zip(short, names, strict=True)]


def _chart_path(config: NormsConfig) -> Path:
    """Return the path of the charts, without the kind of norm and the suffix."""
    if config.out:
        out = Path(config.out)
        return out.with_suffix("") if out.suffix in (".png", ".svg") else out
    folders = [Path(name) if Path(name).is_dir() else Path(name).parent for name in config.runs]
    return (folders[0] if len(folders) == 1 else folders[0].absolute().parent) / "norms"


def _norms_table(kind: str, found: dict[str, list[WeightNorms]]) -> str:
    """Return a table of one kind of norm, with a row for each weight and a column for each run."""
    rows = {}
    for same in zip(*found.values(), strict=True):
        rows_in, columns_in = same[0].matrix
        cells = (f"{getattr(layer, kind):.4g}" for layer in same)
        rows[same[0].name] = [f"{rows_in}x{columns_in}", *cells]
    return table(f"{kind.capitalize()} norm", ["matrix", *found], rows)


@own_defaults()
def diagnose(config: DiagnoseConfig) -> list[Finding]:
    """Check the run of `config` for masked gradients, print the findings and return them.

    The findings are written to the run's diagnosis.json, and a row is added to its metrics.jsonl.
    Raises `InputError` for runs or data that are missing or do not fit each other.
    """
    config.check()
    started = time.monotonic()
    measured = EvaluateConfig(
        runs=(config.run, config.partner) if config.partner else (config.run,),
        limit=config.limit, seed=config.seed, dataset=config.dataset, data_dir=config.data_dir,
        batch_size=config.batch_size, device=config.device, autoattack=config.autoattack,
        arch=config.arch, norm=config.norm, eps=config.eps,
    )  # fmt: skip
    job, *partners = open_jobs(measured, same_data=True)
    norm = job.norm
    images = job.splits["test"]
    eps, alpha = _radius_and_step(job, config)
    size = min(each.batch_size for each in (job, *partners))
    with within_memory("diagnose", [job.name], size):
        findings = examine(
            job.model, images, eps=eps, alpha=alpha, norm=norm, seed=config.seed,
            batch_size=size, partner=partners[0].model if partners else None,
            autoattack=config.autoattack,
        )  # fmt: skip
    if job.writable:
        assert job.run is not None
        library = {"autoattack": library_version()} if config.autoattack else {}
        write_rows(job.run.path / DIAGNOSIS, findings)
        job.run.log(
            "diagnosis",
            verdicts={finding.check: finding.verdict for finding in findings},
            dataset=job.dataset.name,
            n=len(images),
            eps=eps,
            alpha=alpha,
            norm=norm,
            partner=partners[0].fingerprint if partners else None,
            seed=config.seed,
            batch_size=size,
            model=job.fingerprint,
            **provenance(pick_device(config.device), time.monotonic() - started, **library),
        )
    job.log_line(
        f"{job.name}: masking checks on {len(images)} test images of {job.dataset.name}, "
        f"{norm} eps {eps:.4g}, alpha {alpha:.4g}\n{_page(findings)}"
    )
    return findings


def _radius_and_step(job: Job, config: DiagnoseConfig) -> tuple[float, float]:
    """Return the eps and alpha of the configuration, else those of the run.

    The run's alpha is raised so that the usual attack can cross the ball. Raises `InputError` for
    eps 0, or if the configuration's alpha is too small to reach eps.
    """
    eps = job.eps
    if not eps:
        raise InputError(f"{job.name} was trained with eps 0: give the eps to check with --eps")
    least = CROSSING * eps / USUAL_STEPS
    if config.alpha is None:
        return eps, max(job.alpha, least)
    if USUAL_STEPS * config.alpha < eps:
        raise InputError(
            f"--alpha is {config.alpha:g}: {USUAL_STEPS} such steps do not reach eps {eps:g}, "
            f"give at least {least:g}"
        )
    return eps, config.alpha


def _page(findings: Sequence[Finding]) -> str:
    """Return the findings as text: verdict, name of the check, figures, and meaning of each."""
    lines = []
    for finding in findings:
        figures = ", ".join(
            f"{name.removesuffix('_percent').replace('_', ' ')} {_number(value)}"
            f"{' %' * name.endswith('_percent')}"
            for name, value in finding.figures.items()
            if name not in UNSHOWN
        )
        lines.append(f"{finding.verdict:<10}{finding.check}")
        for text in (figures, finding.sentence):
            wrapped = textwrap.wrap(text, 90 - len(INDENT), break_on_hyphens=False)
            lines += [INDENT + line for line in wrapped]
    counts = Counter(finding.verdict for finding in findings)
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    lines.append("A pass means that the error under attack can be trusted, not that it is low.")
    return "\n".join(lines)


def _number(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_number, value))
    return "none" if value is None else f"{value:.4g}"
