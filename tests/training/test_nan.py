"""Losses and gradients that are not finite: --on-nan stop and skip."""

import signal
from pathlib import Path

import pytest
import torch
from torture import equal
from trainings import assert_same, rows_of, signal_in

from fastiat import cli, data
from fastiat.config import TrainConfig
from fastiat.engine import graphs
from fastiat.runs.directory import METRICS, STATE
from fastiat.runs.weights import read_state
from fastiat.train import Trainer
from fastiat.training import rows, session


def trainer_of(engine_name: str, **more) -> Trainer:
    """Return a trainer: a network with BatchNorm, which the attack updates too, and an average."""
    device = "cuda" if engine_name == "graph" else "cpu"
    config = TrainConfig(
        dataset="digits", device=device, arch="preact18", width=1, batch_size=32, steps=1, lr=0.02,
        bn="update", ema=0.9, mix="mixup", engine=engine_name, **{"on_nan": "skip"} | more,
    )  # fmt: skip
    return Trainer(config, data.load("digits"))


def batch_of(trainer: Trainer, poisoned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    images, y = next(iter(trainer.loader))
    images = images.float()
    if poisoned:
        images[0, 0, 0, 0] = torch.nan
    return images, y


@pytest.fixture(params=["eager", "compile", pytest.param("graph", marks=pytest.mark.gpu)])
def engine_name(request, monkeypatch) -> str:
    monkeypatch.setattr(graphs, "compile_once", lambda function: function)
    return request.param


# The parts of the state that a skipped update may change: the position and the draws.
MAY_CHANGE = {"step", "random", "skipped", "skipped_in_a_row", "order_before_epoch"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adv", ["none", "pgd"])
def test_a_skipped_update_changes_nothing_and_the_next_one_goes_on(engine_name, precision, adv):
    trainer = trainer_of(engine_name, precision=precision, adv=adv)
    for _ in range(2):
        trainer.update(*batch_of(trainer, False))
    before = copy_of(trainer.state_dict())
    for count in (1, 2):
        update = trainer.update(*batch_of(trainer, True))
        assert not update.clean_loss.isfinite()
        assert (trainer.skipped, trainer.skipped_in_a_row) == (count, count)
    after = trainer.state_dict()
    assert after["step"] == 4
    assert [k for k in before if k not in MAY_CHANGE and not equal(before[k], after[k])] == []
    trainer.update(*batch_of(trainer, False))
    assert (trainer.skipped, trainer.skipped_in_a_row) == (2, 0)
    moved = trainer.state_dict()
    for part in ("model", "average"):
        assert all(value.isfinite().all() for value in moved[part].values())
        assert not any(
            torch.equal(moved[part][name], value)
            for name, value in before[part].items()
            if value.dim() > 1
        )


def copy_of(state):
    """Copy nested dictionaries and lists of tensors."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {name: copy_of(value) for name, value in state.items()}
    return [copy_of(value) for value in state] if isinstance(state, list) else state


# Not with "graph": the hook would be captured in the CUDA graph.
@pytest.mark.parametrize("engine_name", ["eager", "compile"], indirect=True)
def test_a_gradient_that_is_not_finite_is_skipped_though_its_loss_is_finite(engine_name):
    trainer = trainer_of(engine_name, precision="fp32")
    weight = next(trainer.model.parameters())
    before = weight.detach().clone()
    handle = weight.register_hook(lambda grad: grad * torch.inf)
    update = trainer.update(*batch_of(trainer, False))
    assert update.clean_loss.isfinite() and trainer.skipped == 1
    assert torch.equal(weight, before)
    handle.remove()
    trainer.update(*batch_of(trainer, False))
    assert trainer.skipped == 1 and not torch.equal(weight, before)


def test_with_stop_no_update_waits_to_be_looked_at(engine_name, monkeypatch):
    def look(*_):
        raise AssertionError

    monkeypatch.setattr(torch.Tensor, "isfinite", look)
    trainer = trainer_of(engine_name, on_nan="stop")
    trainer.update(*batch_of(trainer, False))
    with pytest.raises(AssertionError):
        skipping = trainer_of(engine_name)
        skipping.update(*batch_of(skipping, False))


def test_skip_and_stop_give_the_same_bits_where_all_is_finite(engine_name):
    trainers = [trainer_of(engine_name, on_nan=name) for name in ("stop", "skip")]
    for trainer in trainers:
        for _, _ in zip(range(3), trainer.epoch_updates(), strict=False):
            pass
    one, other = (trainer.state_dict() for trainer in trainers)
    assert [name for name in one if not equal(one[name], other[name])] == []


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Replace the batches of these steps, counted from 1, by NaN."""
    original = Trainer.update

    def update(self, images, y):
        if self.step + 1 in steps:
            images = images.float() * torch.nan
        return original(self, images, y)

    monkeypatch.setattr(Trainer, "update", update)


def test_skipped_updates_are_counted_and_a_stop_between_them_changes_nothing(
    small, tmp_path, monkeypatch, capsys
):
    poison(monkeypatch, 5, 20, 25, 26)
    whole, out = tmp_path / "whole", tmp_path / "run"
    argv = ["train", *small, "--on-nan", "skip"]
    assert cli.main([*argv, "--out", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert "the loss or gradient of step 5 is not finite: this update is skipped" in shown
    assert shown.count("warning: ") == 2 and ", 2 updates skipped, " in shown
    rows = rows_of(whole)
    assert [row["skipped"] for row in rows if row["kind"] == "epoch"] == [2, 2]
    steps = {row["step"]: row for row in rows if row["kind"] == "step"}
    assert steps[20]["skipped"] == 2 and "clean_loss" not in steps[20]
    assert steps[40]["skipped"] == 2 and steps[40]["clean_loss"] > 0
    assert "NaN" not in (whole / METRICS).read_text()
    for step in (20, 25):
        with monkeypatch.context() as patch:
            signal_in(patch, "update", signal.SIGTERM, step)
            assert cli.main([*argv, "--out", str(out)]) == 143
        argv = ["train", "--resume"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    assert_same(whole, out)


def test_the_figures_of_an_epoch_are_the_means_of_the_updates_that_were_made():
    trainer = trainer_of("eager")
    trainer.update(*batch_of(trainer, True))
    losses = [trainer.update(*batch_of(trainer, False)).clean_loss.item() for _ in range(3)]
    trainer.update(*batch_of(trainer, True))
    assert trainer.totals[0].item() == pytest.approx(sum(losses))
    whole = len(trainer.loader)
    trainer.skipped = whole - 3
    assert rows.epoch_row(trainer)["clean_loss"] == pytest.approx(sum(losses) / 3)


def left_intact(out: Path, step: int) -> None:
    state = read_state(out / STATE)
    assert state["step"] == step
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_stop_names_the_checkpoint_and_skip_goes_on_from_it(
    small, tmp_path, monkeypatch, complaint, capsys
):
    poison(monkeypatch, 25)
    out = tmp_path / "run"
    line = complaint("train", *small, "--checkpoint-every", "0", "--out", out)
    assert "diverged" in line and "the checkpoint of step 24 is intact" in line
    assert f"fastiat train --resume --out {out} --on-nan skip" in line
    left_intact(out, 24)
    assert "the checkpoint of step 24 is intact" in complaint("train", "--resume", "--out", out)
    assert cli.main(["train", "--resume", "--on-nan", "skip", "--out", str(out)]) == 0
    assert [row["skipped"] for row in rows_of(out) if row["kind"] == "epoch"] == [0, 1]


def test_a_learning_rate_that_diverges_ends_either_way_with_nothing_of_it_saved(
    small, tmp_path, complaint
):
    for on_nan, said in (("stop", "not finite at step"), ("skip", "updates in a row")):
        out = tmp_path / on_nan
        line = complaint("train", *small, "--lr", "4e9", "--on-nan", on_nan, "--out", out)
        assert "diverged" in line and said in line and "checkpoint of step 0 is intact" in line
        left_intact(out, 0)


def test_a_divergence_names_the_settings_that_were_raised():
    assert "lower --lr than 0.1, or --schedule" in session.remedy(TrainConfig())
    decay = session.remedy(TrainConfig(weight_decay=1e6))
    assert decay == "a lower --weight-decay than 1e+06"
    both = session.remedy(TrainConfig(preset="authors", loss="ce", lr=10))
    assert "--loss bce" in both and "lower --lr than 10" in both


def test_twenty_skipped_in_a_row_or_all_of_an_epoch_end_the_training(
    small, tmp_path, monkeypatch, complaint
):
    poison(monkeypatch, *range(11, 100))
    out = tmp_path / "run"
    skip = ("--on-nan", "skip", "--checkpoint-every", "0", "--out")
    line = complaint("train", *small, *skip, out)
    assert "20 updates in a row, the last at step 30, was not finite" in line
    left_intact(out, 29)
    # A resume ends at the same step.
    assert "the last at step 30" in complaint("train", "--resume", "--out", out)
    poison(monkeypatch, 1, 2)
    short = ("--batch-size", "700", *skip, tmp_path / "short")
    assert "2 updates in a row, the last at step 2" in complaint("train", *small, *short)
