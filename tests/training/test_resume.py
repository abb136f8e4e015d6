"""Exact resume: a training stopped at any step, and resumed, has the bits of one never stopped."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torture import equal
from trainings import assert_same, signal_in

from fastiat import cli, data
from fastiat.config import PRESETS, TrainConfig
from fastiat.engine import graphs as engine
from fastiat.runs.weights import pack_state, read_state
from fastiat.train import Trainer

DIGITS = data.load("digits")
# Five updates an epoch. With little patience, hold-out and average where the preset has them.
TINY = {
    "dataset": "digits", "device": "cpu", "batch_size": 256, "steps": 2, "epochs": 2,
    "eval_limit": 20, "lr": 0.02,
}  # fmt: skip
MLP = {"arch": "mlp6", "width": 8}
RESNET = {"arch": "preact18", "width": 1}


def saved(trainer: Trainer, file: Path) -> dict[str, Any]:
    """Return the state of a training as it comes back from a file."""
    file.write_bytes(pack_state(trainer.state_dict()))
    return read_state(file)


def updates(trainer: Trainer) -> Iterator[None]:
    """Train as `fastiat train` does, an update at a time, measured after every epoch."""
    while not trainer.finished:
        for _ in trainer.epoch_updates():
            if trainer.step % len(trainer.loader) == 0:
                trainer.validate({})
                trainer.validated_epochs = trainer.epoch
            yield


def assert_resumable_at_every_step(config: TrainConfig, file: Path, steps: int = 6) -> None:
    """Stop and resume after every single update: if each link is exact, so is any chain of them."""
    whole = Trainer(config, DIGITS)
    linked = saved(whole, file)
    for step, _ in zip(range(1, steps + 1), updates(whole), strict=False):
        link = Trainer(config, DIGITS)
        link.load_state_dict(linked)
        assert equal(link.state_dict(), linked), step
        next(updates(link))
        linked = saved(link, file)
        expected = whole.state_dict()
        assert [name for name in expected if not equal(expected[name], linked[name])] == [], step
    assert whole.step == steps


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adv", ["none", "fgsm", "pgd"])
@pytest.mark.parametrize("mix", ["none", "mixup", "manifold"])
def test_every_step_can_be_resumed_from(preset, precision, adv, mix, tmp_path):
    config = replace(PRESETS[preset](), adv=adv, mix=mix, precision=precision, **TINY, **MLP)
    if adv != "pgd":  # TRADES and AWP need a random start and adversarial images
        config = replace(config, objective="at", awp=0.0, awp_warmup=0)
    assert_resumable_at_every_step(config, tmp_path / "state")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        {"objective": "trades", "mix": "cutmix", "awp": 0.01, "awp_warmup": 1},
        {"objective": "mart", "lam_per_sample": True},
        {"awp": 0.01, "smoothing": 0.1},
        {"attack_mixed": True, "mix": "cutmix", "lam_per_sample": True},
        {"adv": "n-fgsm"},
    ],
)
def test_every_step_of_a_later_method_can_be_resumed_from(
    method, compiled, precision, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, "compile_once", lambda function: function)
    changes = {"precision": precision, "engine": "compile" if compiled else "eager"}
    config = TrainConfig(**{**TINY, **MLP, **method, **changes})
    assert_resumable_at_every_step(config, tmp_path / "state")


@pytest.mark.parametrize(
    ("precision", "change"),
    [
        ("fp32", {"bn": "update", "ema": 0.9, "lam_per_sample": True, "smoothing": 0.1}),
        ("bf16", {"bn": "batch", "shared_mix": True, "mix_space": "pixel", "decay_norm": False}),
        ("bf16", {"on_nan": "skip", "loss": "bce", "momentum": 0, "nesterov": False}),
        ("fp32", {"engine": "compile", "mix": "mixup", "attack_loss": "margin", "flip": True}),
    ],
)
def test_every_step_of_a_residual_network_can_be_resumed_from(
    precision, change, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine, "compile_once", lambda function: function)
    config = TrainConfig(**{**TINY, **RESNET, "precision": precision, **change})
    assert_resumable_at_every_step(config, tmp_path / "state")


@pytest.mark.parametrize("count", [30, 100, 360])
def test_every_step_with_further_images_can_be_resumed_from(count, tmp_path):
    """Seven updates an epoch, with 51 further images each: a pass over them ends anywhere."""
    images, labels = (tensor[:count].numpy() for tensor in (DIGITS.test.images, DIGITS.test.labels))
    np.savez(tmp_path / "extra.npz", image=images, label=labels)
    extra = {"extra": str(tmp_path / "extra.npz"), "extra_fraction": 0.2}
    config = TrainConfig(**TINY, **MLP, **extra, precision="fp32")
    assert_resumable_at_every_step(config, tmp_path / "state", 14)


def test_a_training_that_stops_early_stops_as_early_when_resumed(tmp_path):
    config = replace(
        PRESETS["modern"](),
        **{**TINY, **MLP, "epochs": 20, "patience": 1, "holdout": 40, "lr": 1e-6},
    )
    assert_resumable_at_every_step(config, tmp_path / "state", 10)
    whole = Trainer(config, DIGITS)
    assert len(list(updates(whole))) == 10 and whole.finished


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_command_that_is_stopped_at_every_step_ends_as_one_that_never_was(
    precision, small, tmp_path, monkeypatch
):
    flags = ("--batch-size", "512", "--precision", precision, "--preset", "modern", "--epochs", "2")
    monkeypatch.setattr("fastiat.training.rows.LOG_EVERY", 1)
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert cli.main(["train", *small, *flags, "--holdout", "100", "--out", str(whole)]) == 0
    argv = ["train", *small, *flags, "--holdout", "100"]
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            signal_in(patch, "update", signal.SIGTERM, 0)
            status = cli.main([*argv, "--out", str(out)])
        if status == 0:
            break
        assert status == 143
        stops, argv = stops + 1, ["train", "--resume"]
    assert stops == 4
    assert_same(whole, out)
