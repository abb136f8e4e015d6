"""What tests of trainings share: comparing two finished runs, and a signal at a certain step."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torture import equal

from fastiat.runs.directory import METRICS, MODEL, STATE, Run, load_with_card
from fastiat.runs.weights import read_state
from fastiat.train import Trainer

# Fields of a row that the seed does not determine.
TIMES = ("seconds", "images_per_second")


def rows_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    """Two finished runs have the same bits in weights, averages and generators, and equal rows."""
    a, b = (read_state(run / STATE) for run in (one, other))
    assert a.keys() == b.keys()
    assert [name for name in a if not equal(a[name], b[name])] == []
    assert equal(load_file(one / MODEL), load_file(other / MODEL))
    assert rows_of(one) == rows_of(other)


def perturbed(run: Path, other: Path, noise: float = 0.3) -> Path:
    """Copy a run to `other` and add noise to its weights, relative to their standard deviation."""
    shutil.copytree(run, other)
    model, card = load_with_card(other)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    Run.open(other).save_model(model.state_dict(), card)
    return other


def signal_in(monkeypatch, method: str, number: int, at_step: int) -> None:
    """Send this process a signal in the trainer's `method`, once, at step `at_step` or later."""
    original, sent = getattr(Trainer, method), []

    def wrapped(self, *arguments):
        result = original(self, *arguments)
        if self.step >= at_step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Trainer, method, wrapped)
