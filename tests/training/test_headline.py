"""The headline command's own recipe, at full width, on photographs: its loss must fall."""

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from fastiat import cli, data
from fastiat.train import Trainer

UPDATES = 40
FEW = 20
"""Updates without the attack, which takes six sevenths of the time: what diverges does it in 20."""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 32x32 crops of two photographs, in ten classes: five vertical strips of each."""
    root = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for picture, pixels in enumerate(load_sample_images().images):
        photo = Image.fromarray(pixels).resize((320, 213))
        for strip in range(5):
            for split, count in (("train", 64 * UPDATES // 10), ("test", 4)):
                folder = root / split / str(5 * picture + strip)
                folder.mkdir(parents=True)
                left = torch.randint(32 + 1, (count,), generator=generator) + 64 * strip
                top = torch.randint(213 - 32 + 1, (count,), generator=generator)
                for number, (x, y) in enumerate(zip(left.tolist(), top.tolist(), strict=True)):
                    photo.crop((x, y, x + 32, y + 32)).save(folder / f"{number}.png")
    return root


def losses(root: Path, count: int, *flags: str) -> torch.Tensor:
    """Return the clean and adversarial loss of `count` updates, (count, 2), of `fastiat train`."""
    command = ["train", "--arch", "preact18", "--mix", "manifold", *flags]
    _, config = cli.parse([*command, "--dataset", "folder", "--data-dir", str(root)])
    trainer = Trainer(config, data.load("folder", root))
    batches = itertools.islice(trainer.loader.epoch(0), count)
    updates = [trainer.update(images, y) for images, y in batches]
    assert len(updates) == count
    return torch.stack([torch.stack(update[:2]).float() for update in updates])


@pytest.mark.long
def test_the_default_recipe_at_full_width_lowers_both_losses(photographs, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path))
    found = losses(photographs, UPDATES)
    first, last = found[:10].mean(0), found[-10:].mean(0)
    assert found.max() < 6, found
    assert (last < first).all(), found


@pytest.mark.slow
def test_the_default_recipe_without_its_attack_lowers_the_loss(photographs, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path))
    found = losses(photographs, FEW, "--adv", "none")[:, 0]
    assert found.max() < 6, found
    assert found[-5:].mean() < found[:5].mean(), found


@pytest.mark.slow
@pytest.mark.long
def test_the_authors_recipe_at_full_width_lowers_its_loss(photographs, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path))
    found = losses(photographs, FEW, "--preset", "authors", "--adv", "none")[:, 0]
    assert found.max() < 0.6, found
    assert found[-5:].mean() < found[:5].mean(), found
