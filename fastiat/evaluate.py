"""Measuring: the error of trained runs on clean images and under white-box attacks."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastiat import data
from fastiat.attack import count_errors, fgsm, pgd
from fastiat.config import EvaluateConfig, TrainConfig, steps_of
from fastiat.device import autocast, pick_device, pick_precision
from fastiat.errors import InputError
from fastiat.progress import Progress
from fastiat.results import Rate, read_results
from fastiat.run import MODEL, ModelCard, Run, load_with_card

__all__ = ["Rate", "error_rate", "evaluate", "read_results"]

TITLES = {"none": "No attack", "fgsm": "FGSM"}


def error_rate(
    model: nn.Module,
    split: data.Split,
    attack: str,
    *,
    eps: float,
    alpha: float,
    config: EvaluateConfig,
) -> Rate:
    """Return the error of `model` on `split` under "none", "fgsm" or "pgd-K".

    Examples are crafted in the configuration's precision and judged in fp32.
    """
    device = pick_device(config.device)
    precision = partial(autocast, device, pick_precision(config.precision, device))
    adversary = partial(fgsm, model, eps=eps, norm=config.norm, loss=config.attack_loss)
    if attack != "fgsm":
        adversary = partial(
            pgd,
            model,
            eps=eps,
            alpha=alpha,
            steps=steps_of(attack),
            random_start=config.random_start,
            norm=config.norm,
            loss=config.attack_loss,
            restarts=config.restarts,
            generator=torch.Generator(device).manual_seed(config.seed),
        )

    def craft(x: Tensor, y: Tensor) -> Tensor:
        with precision():
            return adversary(x, y)

    batches = data.ResidentLoader(split, config.batch_size, device=device, train=False)
    with Progress(TITLES.get(attack, attack.upper()), len(split)) as progress:
        errors = count_errors(model, batches, None if attack == "none" else craft, progress.advance)
    return Rate(errors, len(split))


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, Rate]]:
    """Measure every run of `config` and print a table.

    Returns the rates as {run: {"split/attack": rate}}; a run directory's metrics.jsonl gets a row
    for each. Raises `InputError` for runs or data that are missing or do not fit each other.
    """
    config.check()
    # All is loaded and checked before anything is measured, so that a run is not measured in vain.
    load = cache(data.load)
    jobs = [_prepare(name, config, load) for name in config.runs]
    return {job.name: _measure(job, config) for job in jobs}


@dataclass(frozen=True)
class _Job:
    """A network to measure, and the images, eps and alpha to measure it with."""

    name: str
    model: nn.Module
    run: Run | None
    dataset: str
    splits: dict[str, data.Split]
    eps: float
    alpha: float


def _prepare(name: str, config: EvaluateConfig, load: Callable[..., data.Dataset]) -> _Job:
    model, card = load_with_card(name, pick_device(config.device))
    run = Run.open(Path(name)) if Path(name).is_dir() else None
    if run and (card.arch, run.config.width or card.width) != (run.config.arch, card.width):
        raise InputError(
            f"{name} holds the model of another run, {card.arch} of width {card.width}: "
            f"put its own {MODEL} back, or evaluate that file by its name"
        )
    dataset = _data_for(name, card, run.config if run else None, config, load)
    splits = {split: getattr(dataset, split) for split in config.splits}
    for split, images in splits.items():
        if config.limit is not None and config.limit < len(images):
            splits[split] = data.holdout(images, config.limit, config.seed)[1]
    settings = run.config if run else TrainConfig()
    return _Job(
        name,
        model,
        run,
        dataset.name,
        splits,
        eps=settings.eps if config.eps is None else config.eps,
        alpha=settings.alpha if config.alpha is None else config.alpha,
    )


def _measure(job: _Job, config: EvaluateConfig) -> dict[str, Rate]:
    rates = {}
    # Somebody else's run can be measured too, but not written to.
    run = job.run if job.run and os.access(job.run.path, os.W_OK) else None
    for split_name, split in job.splits.items():
        for attack in config.attacks:
            started = time.monotonic()
            rate = error_rate(job.model, split, attack, eps=job.eps, alpha=job.alpha, config=config)
            rates[f"{split_name}/{attack}"] = rate
            if run:
                low, high = rate.interval()
                run.log(
                    "evaluation",
                    dataset=job.dataset,
                    split=split_name,
                    attack=attack,
                    error_percent=round(rate.percent, 4),
                    interval_95_percent=[round(low, 4), round(high, 4)],
                    errors=rate.errors,
                    n=rate.n,
                    eps=job.eps,
                    alpha=job.alpha,
                    norm=config.norm,
                    loss=config.attack_loss,
                    restarts=config.restarts,
                    random_start=config.random_start,
                    precision=pick_precision(config.precision, pick_device(config.device)),
                    seed=config.seed,
                    seconds=round(time.monotonic() - started, 3),
                )
    table = _table(job.name, rates, config, job.eps, job.alpha)
    if run:
        run.say(table)
    else:
        print(table, flush=True)
    return rates


def _data_for(
    name: str,
    card: ModelCard,
    trained: TrainConfig | None,
    config: EvaluateConfig,
    load: Callable[..., data.Dataset],
) -> data.Dataset:
    """Load the data set to measure on, and check that the network fits its images and classes."""
    dataset_name = config.dataset or (trained.dataset if trained else None)
    if dataset_name is None:
        raise InputError(f"{name} is a model without its run: say which images with --dataset")
    data_dir = config.data_dir or (trained.data_dir if trained else None)
    dataset = load(dataset_name, data_dir)
    wanted = (card.in_channels, card.image_size, card.image_size)
    if dataset.test.shape != wanted:
        raise InputError(
            f"{name} takes images of (channels, height, width) {wanted}, "
            f"but those of {dataset_name} are {dataset.test.shape}: convert them, or choose "
            f"other images with --dataset and --data-dir"
        )
    if dataset.classes != card.classes:
        raise InputError(
            f"{name} tells {_some(card.classes)} apart, "
            f"but {dataset_name} has {_some(dataset.classes)}: "
            f"choose images of its classes with --dataset and --data-dir"
        )
    return dataset


def _some(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' * (len(classes) > 3)})"


def _table(
    name: str, rates: dict[str, Rate], config: EvaluateConfig, eps: float, alpha: float
) -> str:
    """Write a run's rates as text, a row per split and a column per attack."""
    titles = [TITLES.get(attack, attack.upper()) for attack in config.attacks]
    first = max(len(split) for split in config.splits) + 2
    lines = [
        f"{name}: error in %, {config.norm} eps {eps:.4g}, alpha {alpha:.4g}",
        " " * first + "".join(f"{title:>12}" for title in titles) + f"{'images':>10}",
    ]
    for split in config.splits:
        row = [rates[f"{split}/{attack}"] for attack in config.attacks]
        cells = "".join(f"{rate.percent:12.2f}" for rate in row)
        lines.append(f"{split:<{first}}{cells}{row[0].n:>10}")
    return "\n".join(lines)
