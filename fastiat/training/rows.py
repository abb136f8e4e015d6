"""The output of a training: the rows of metrics.jsonl and the lines on stdout."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fastiat import data, models
from fastiat.config import TrainConfig
from fastiat.mix import MixPoints
from fastiat.models import ModelCard
from fastiat.system.progress import duration
from fastiat.system.ranks import Ranks
from fastiat.training.update import Update

LOG_EVERY = 20
"""Number of updates from one step row to the next; to make a row, the CPU waits for the device."""


OVERFITTING_POINTS = 20
"""The error of PGD-10 above that of FGSM, in percentage points, that means overfitting to FGSM.

In N-FGSM trainings that stay robust the two differ by a few points. After catastrophic overfitting
(Wong et al. 2020, section 4.3) PGD misleads nearly all images within an epoch, and FGSM few.
"""


class Training(Protocol):
    """The attributes of a training that this module and `session` use; `Trainer` documents them.

    A protocol, because `fastiat.training.trainer` imports this module.
    """

    config: TrainConfig
    ranks: Ranks
    device: torch.device
    engine: str
    arithmetic: Literal["bf16", "fp32"]
    loader: data.Loader
    card: ModelCard
    model: nn.Module
    points: MixPoints
    fingerprint: str
    step: int
    validated_epochs: int
    totals: Tensor
    skipped: int
    skipped_in_a_row: int

    @property
    def epoch(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    @property
    def lr(self) -> float: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def step_row(trainer: Training, update: Update) -> dict[str, Any]:
    """Return the row of the last update; a skipped update has no losses and accuracies."""
    row = {"step": trainer.step, "learning_rate": trainer.lr, "skipped": trainer.skipped}
    return row if trainer.skipped_in_a_row else row | _figures(trainer, torch.stack(update))


def epoch_row(trainer: Training) -> dict[str, Any]:
    """Return the row of the last epoch: means over its updates, without skipped updates."""
    return {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "learning_rate": trainer.lr,
        "skipped": trainer.skipped,
        **_figures(trainer, trainer.totals / (len(trainer.loader) - trainer.skipped)),
    }


def _figures(trainer: Training, figures: Tensor) -> dict[str, float]:
    """Return the figures of an `Update`, (4,), by name; accuracies are in percent of the batch."""
    clean_loss, adv_loss, clean_correct, adv_correct = figures.tolist()
    batch = trainer.config.batch_size
    return {
        "clean_loss": clean_loss,
        "adv_loss": adv_loss,
        "clean_accuracy_percent": 100 * clean_correct / batch,
        "adv_accuracy_percent": 100 * adv_correct / batch,
    }


def overfitted(row: dict[str, Any]) -> bool:
    """Return whether the row of an epoch with N-FGSM shows catastrophic overfitting."""
    fgsm = row.get("holdout_fgsm_error_percent")
    return fgsm is not None and row["holdout_error_percent"] - fgsm > OVERFITTING_POINTS


def headline(trainer: Training) -> str:
    """Return the first line of a training: network, method, data and machine."""
    config, loader = trainer.config, trainer.loader
    attack = {
        "none": "no attack",
        "fgsm": f"FGSM, eps {config.eps:.4g}",
        "n-fgsm": f"N-FGSM, eps {config.eps:.4g}, noise {config.noise:.4g} eps",
        "pgd": f"PGD-{config.steps}, eps {config.eps:.4g}, alpha {config.alpha:.4g}",
    }[config.adv]
    if config.norm == "l2" and config.adv != "none":
        attack = f"L2 {attack}"
    if config.objective != "at":
        attack = f"{config.objective.upper()} with beta {config.beta:g}, {attack}"
    if config.attack_mixed:
        attack = f"{attack} of the mixed batch"
    if config.awp:
        late = f" after {config.awp_warmup} epochs" if config.awp_warmup else ""
        attack = f"{attack}, AWP {config.awp:g}{late}"
    further = ""
    if loader.extra is not None:
        further = f" with {len(loader.extra.labels)} further images, {loader.extra.share} a batch"
    return (
        f"{config.arch} ({models.count_parameters(trainer.model) / 1e6:.2f} M parameters), "
        f"{_mixing(trainer)}, {attack}; {config.dataset}{further}, {len(loader)} steps of "
        f"{config.batch_size} an epoch; {trainer.device}, {trainer.engine}, {trainer.arithmetic}"
    )


def _mixing(trainer: Training) -> str:
    """Return where the batches are mixed, as text."""
    kind, names = trainer.config.mix, trainer.points.names
    own = getattr(trainer.model, "mix_points", ("input",))
    usual = own if kind == "manifold" else ("input",)
    if kind == "none" or (names == usual and len(own) > 1):
        return f"mix {kind}"
    if kind == "manifold" and names == ("input",):
        return "mix manifold at the input alone (--mix-at names modules to mix at too)"
    return f"mix {kind} at {', '.join(names)}"


def beside_progress(config: TrainConfig, row: dict[str, Any]) -> dict[str, str]:
    """Return the loss and accuracy, in percent, of the clean and the adversarial batch.

    Both are shown beside the progress bar.
    """
    return {
        kind: f"{row[f'{kind}_loss']:.2f} {row[f'{kind}_accuracy_percent']:.0f} %"
        for kind in _batches(config)
    }


def _batches(config: TrainConfig) -> list[str]:
    """Return which batches an update has: "clean", "adv" or both."""
    given = {"clean": not config.attack_mixed, "adv": config.adv != "none"}
    return [kind for kind, has in given.items() if has]


def epoch_line(config: TrainConfig, row: dict[str, Any]) -> str:
    """Return the line that is shown after an epoch; `row` is the epoch's row of metrics.jsonl."""
    parts = [
        f"epoch {row['epoch']}/{config.epochs}",
        f"lr {row['learning_rate']:.3g}",
    ]
    for kind in _batches(config):
        loss, accuracy = row[f"{kind}_loss"], row[f"{kind}_accuracy_percent"]
        parts.append(f"{kind} loss {loss:.3f} accuracy {accuracy:.1f} %")
    parts.append(f"test error {row['test_error_percent']:.2f} %")
    if "holdout_error_percent" in row:
        parts.append(f"held-out error {row['holdout_error_percent']:.2f} %")
    if row["skipped"]:
        parts.append(f"{row['skipped']} updates skipped")
    left = (config.epochs - row["epoch"]) * row["seconds"]
    return ", ".join([*parts, f"{row['images_per_second']:.0f} img/s", f"{duration(left)} left"])
