"""Jobs: loading a network and the images to measure it on, and writing the results."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastiat import data
from fastiat.attacks.starts import Norm
from fastiat.config import MeasureConfig, TrainConfig, WithAttacks
from fastiat.engine.device import pick_device, pick_precision
from fastiat.engine.graphs import prepare
from fastiat.images.downloads import DOWNLOADS
from fastiat.measuring.autoattack import check_classes, library_version
from fastiat.measuring.one_pass import default_batch
from fastiat.runs.directory import MODEL, ModelCard, Run, load_with_card
from fastiat.runs.results import (
    Rate,
    add_results,
    figures,
    fingerprint,
    measures,
    provenance,
    read_results,
)
from fastiat.system.errors import InputError, printable_lines
from fastiat.system.ranks import ranks
from fastiat.system.settings import check_runs, steps_of


@dataclass(frozen=True)
class Job:
    """A network to measure, and the images to measure it on."""

    name: str
    """Path that the user gave: a run directory or a model.safetensors."""
    model: nn.Module
    card: ModelCard
    run: Run | None
    """The run; None for a model.safetensors."""
    fingerprint: str
    """Fingerprint of the weights."""
    dataset: data.Dataset
    splits: dict[str, data.Split]
    """The images of every split to measure, at most --limit of them."""
    data: str
    """Fingerprint of the data set."""
    config: MeasureConfig
    """The settings of the measurement, with `batch_size`, `norm`, `alpha` and the eps of `evaluate`
    and `compare` filled in from the run."""
    batch_size: int
    """Images attacked at a time: the configuration's batch size, else `default_batch`."""
    alpha: float
    """PGD step size: the configuration's alpha, else the alpha of the run's training."""
    eps: float
    """Radius: the configuration's eps if it is one number, else that of the run's training."""

    @property
    def norm(self) -> Norm:
        """Norm of the eps ball: that of the configuration, else that of the run's training."""
        return self.config.ball

    @property
    def settings(self) -> TrainConfig:
        """The settings of the training; the defaults for a model.safetensors."""
        return self.run.config if self.run else TrainConfig()

    @property
    def writable(self) -> bool:
        """Whether this process writes results: the first rank does, if the run is writable."""
        return ranks().first and self.run is not None and os.access(self.run.path, os.W_OK)

    def is_sample(self, split: str) -> bool:
        """Whether --limit leaves out images of a split."""
        return len(self.splits[split]) < len(getattr(self.dataset, split))

    def recorded_autoattack(self, split: str) -> Rate | None:
        """Return AutoAttack's error on these images in this ball that the run has, the newest."""
        wanted = {
            "attack": "autoattack",
            "data": self.data,
            "split": split,
            "n": len(self.splits[split]),
            "norm": self.norm,
            "eps": self.eps,
        }
        if self.is_sample(split):
            wanted["seed"] = self.config.seed
        entries = read_results(self.run.path) if self.run else []
        found = [entry for entry in entries if measures(entry, wanted)]
        return Rate(found[-1]["errors"], found[-1]["n"]) if found else None

    def record(
        self,
        kind: str,
        split: str,
        attack: str,
        wrong: Tensor,
        *,
        eps: float,
        started: float,
        **more: Any,
    ) -> Rate:
        """Return the error rate, and add it to the run's metrics.jsonl and evaluation.json.

        kind, eps, more: fields of the entry, see `fastiat.runs.results`.
        wrong: (N,) bool, which images of `split` are misclassified under `attack`.
        started: `time.monotonic()` at the beginning of the measurement.
        """
        rate = Rate.of(wrong)
        if not self.writable:
            return rate
        assert self.run is not None
        config, device = self.config, pick_device(self.config.device)
        drawn = config.random_start and attack not in ("none", "fgsm")
        seeded = drawn or self.is_sample(split) or attack == "autoattack"
        with_autoattack = "autoattack" in (attack, *more.get("attacks", ()))
        library = {"autoattack": library_version()} if with_autoattack else {}
        entry = {
            "kind": kind,
            "dataset": self.dataset.name,
            "data": self.data,
            "split": split,
            "attack": attack,
            "eps": eps,
            "alpha": self.alpha,
            "steps": None if attack in ("worst", "autoattack") else steps_of(attack),
            "norm": config.norm,
            "loss": config.attack_loss,
            "restarts": config.restarts,
            "random_start": config.random_start,
            "precision": pick_precision(config.precision, device),
            "seed": config.seed if seeded else None,
            "batch_size": self.batch_size,
            "model": self.fingerprint,
            **figures(rate),
            **more,
            **provenance(device, time.monotonic() - started, **library),
        }
        # A measurement that was interrupted and is repeated must not add the same row twice.
        if not self.run.has_row({k: v for k, v in entry.items() if k != "seconds"}):
            self.run.log(**entry)
        add_results(self.run.path, [entry])
        return rate

    def log_line(self, text: str) -> None:
        """Print a text, and add it to the run's stdout.log if `writable`."""
        if self.writable:
            assert self.run is not None
            self.run.log_line(text)
        else:
            print(printable_lines(text), flush=True)


def open_jobs(config: MeasureConfig, *, same_data: bool = False) -> list[Job]:
    """Load the networks of `config.runs` and the images to measure each of them on.

    All are loaded and checked before the first measurement, so that none is lost because another
    run is missing. With `same_data`, all networks get the images of the first run. Raises
    `InputError` if a network or its images are missing or damaged, or do not fit each other.
    """
    check_runs(config.runs)
    device = pick_device(config.device)
    # Also here, because TF32 would change the figures that the training measured without it.
    prepare(device, deterministic=False)
    with_autoattack = isinstance(config, WithAttacks) and config.autoattack
    if with_autoattack:
        library_version()
    opened = {name: _open(name, device, config.arch) for name in dict.fromkeys(config.runs)}
    if with_autoattack:
        for name, (_, card, _) in opened.items():
            check_classes(name, card.num_classes)
    # Runs on the same images share one data set and its fingerprint, which reads all images.
    load, fingerprint_of = cache(data.load), cache(data.Dataset.fingerprint)
    first = next(iter(opened.values()))
    jobs = []
    for name, (model, card, run) in opened.items():
        source = first[2] if same_data else run
        dataset = _load_data(name, config, source.config if source else None, load)
        check_fit(name, card, dataset)
        splits = {split: getattr(dataset, split) for split in config.splits}
        for split, images in splits.items():
            if config.limit is not None and config.limit < len(images):
                splits[split] = data.draw(images, config.limit, config.seed)
        own = run.config if run else None
        size = config.batch_size or default_batch(card.image_size, own.batch_size if own else None)
        filled = config.filled(own)
        jobs.append(
            Job(
                name=name,
                model=model,
                card=card,
                run=run,
                fingerprint=fingerprint(run.path / MODEL if run else Path(name)),
                dataset=dataset,
                splits=splits,
                data=fingerprint_of(dataset),
                config=replace(filled, batch_size=size),
                batch_size=size,
                alpha=filled.alpha,
                eps=filled.eps if isinstance(config, WithAttacks) else config.usual(own).eps,
            )
        )
    return jobs


def _open(
    name: str, device: torch.device, arch: str | None
) -> tuple[nn.Module, ModelCard, Run | None]:
    model, card = load_with_card(name, device, arch=arch)
    if not Path(name).is_dir():
        return model, card, None
    run = Run.open(Path(name))
    if (card.arch, run.config.width or card.width) != (run.config.arch, card.width):
        width = "" if card.width is None else f" of width {card.width}"
        raise InputError(
            f"{name} holds the model of another run, {card.arch}{width}: put the "
            f"{MODEL} of this run back, or evaluate {Path(name) / MODEL} as a file"
        )
    read_results(run.path)  # raises for a damaged file before the measurement starts
    return model, card, run


def _load_data(
    name: str, config: MeasureConfig, own: TrainConfig | None, load: Callable[..., data.Dataset]
) -> data.Dataset:
    """Load the data set of `config`, else the data set of the training settings `own`."""
    dataset_name, data_dir = config.dataset or (own.dataset if own else None), config.data_dir
    if dataset_name is None:
        raise InputError(f"{name} is a model without its run: name its images with --dataset")
    # The run's data_dir holds the run's own data set, or several downloaded data sets.
    if data_dir is None and own:
        same = dataset_name == own.dataset or {dataset_name, own.dataset} <= DOWNLOADS.keys()
        data_dir = own.data_dir if same else None
    # An untrusted config.json must not choose the folder that files are downloaded to.
    fetch = data_dir is None or config.data_dir is not None
    loader, image_size = (own.loader, own.image_size) if own else ("auto", None)
    dataset = load(dataset_name, data_dir, loader=loader, fetch=fetch, image_size=image_size)
    dataset, _ = data.convert_if_needed(dataset, "auto", pick_device(config.device))
    return dataset


def check_fit(name: str, card: ModelCard, dataset: data.Dataset) -> None:
    """Raise `InputError` unless the network `name` fits the images and classes of `dataset`."""
    wanted = (card.in_channels, card.image_size, card.image_size)
    if dataset.test.shape != wanted:
        raise InputError(
            f"{name} takes images of (channels, height, width) {wanted}, "
            f"but the images of {dataset.name} are {dataset.test.shape}: convert them, or choose "
            f"other images with --dataset and --data-dir"
        )
    if dataset.classes != card.classes:
        raise InputError(
            f"{name} was trained on {class_names(card.classes)}, "
            f"but {dataset.name} has {class_names(dataset.classes)}: "
            f"choose images of the same classes with --dataset and --data-dir"
        )


def class_names(classes: tuple[str, ...]) -> str:
    """Return the number of classes and the names of the first three, as text."""
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' * (len(classes) > 3)})"
