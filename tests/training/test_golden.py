"""Golden losses: each method's first updates give the losses committed in golden/losses.json.

They prove that a change which is meant to change no number changes none. After a change that is
meant to, write the file again with `python tests/training/test_golden.py` and give the reason in
the commit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastiat import data
from fastiat.config import TrainConfig
from fastiat.train import Trainer

FILE = Path(__file__).parents[1] / "golden" / "losses.json"
UPDATES = 6
METHODS: dict[str, dict[str, Any]] = {
    **{
        f"{adv}-{mix}": {"adv": adv, "mix": mix}
        for adv in ("none", "fgsm", "pgd")
        for mix in ("none", "mixup", "manifold")
    },
    "bce": {"loss": "bce", "variant": "authors"},
    "margin": {"attack_loss": "margin"},
    "smoothing": {"smoothing": 0.1, "activation": "silu"},
    # From the usual start of TRADES the gradient of its attack is nearly 0 everywhere, and its sign
    # depends on the order of sums, so on the CPU. N-FGSM starts farther away.
    "trades": {"objective": "trades", "adv": "n-fgsm"},
    "mart": {"objective": "mart", "mix": "mixup"},
    "awp": {"awp": 0.01},
    "trades-awp": {"objective": "trades", "adv": "n-fgsm", "awp": 0.005, "mix": "none"},
    "n-fgsm": {"adv": "n-fgsm"},
    "cutmix": {"mix": "cutmix"},
    "attack-mixed": {"attack_mixed": True, "mix": "mixup"},
    "bn-batch": {"bn": "batch"},
    "bn-update": {"bn": "update"},
    "pixel": {"mix": "mixup", "mix_space": "pixel"},
    "per-sample": {"lam_per_sample": True},
    "shared": {"shared_mix": True},
    "wrn": {"arch": "wrn28_10", "width": 1},
    "mlp": {"arch": "mlp6", "width": 32},
}


def losses(settings: dict[str, Any]) -> list[list[float]]:
    """Return the clean and adversarial loss of each of the first updates."""
    config = TrainConfig(
        **{"arch": "preact18", "width": 4, "dataset": "digits", "lr": 0.02, "batch_size": 32}
        | {"device": "cpu", "precision": "fp32", "steps": 2}
        | settings
    )
    trainer = Trainer(config, data.load("digits"))
    updates = zip(range(UPDATES), trainer.epoch_updates(), strict=False)
    return [[float(update.clean_loss), float(update.adv_loss)] for _, update in updates]


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_the_committed_ones(method):
    expected = torch.tensor(json.loads(FILE.read_text())[method])
    # CPUs sum in different orders; in the deepest network a gradient near 0 then changes its sign.
    tolerance = 2e-3 if method == "wrn" else 1e-4
    found = torch.tensor(losses(METHODS[method]))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_file_has_the_methods_of_the_table():
    assert json.loads(FILE.read_text()).keys() == METHODS.keys()


if __name__ == "__main__":
    rows = {name: losses(settings) for name, settings in METHODS.items()}
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in rows.items())
    FILE.write_text(f"{{\n{text}\n}}\n")
