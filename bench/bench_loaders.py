"""Images per second of the loaders, and of a training on the same machine.

    python -m pytest bench/bench_loaders.py --benchmark-only

Every loader makes passes over the same 20,000 synthetic images of 32x32 pixels: shuffled, cropped
with a padding of 2, mirrored half the time, on the device. Their rounds, one pass each, are
interleaved in one process; FFCV is compiled before the first round. The trainer's round is one IAT
update.
"""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import timing
import torch
from conftest import describe, replay, selected
from timing import DEVICE, ON_GPU
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastiat import data
from fastiat.config import TrainConfig
from fastiat.images import convert
from fastiat.train import Trainer

IMAGES, BATCH, PAD = 20_000, 128, 2
WORKERS = 8 if ON_GPU else 1
WIDTH = 64 if ON_GPU else 16
"""Width of the trained network: the paper's, or one that a CPU core updates in a second or two."""
TRAINER = f"IAT update, preact18 of width {WIDTH}"
NAMES = ("resident", "ffcv, raw", "ffcv, jpeg", "torchvision v2, DataLoader", TRAINER)


class Augmented(Dataset):  # type: ignore[type-arg]
    """Images that torchvision crops and mirrors one by one."""

    def __init__(self, split: data.Split) -> None:
        self.images, self.labels = split.images.permute(0, 3, 1, 2).contiguous(), split.labels
        self.change = v2.Compose([v2.RandomCrop(32, padding=PAD), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.change(self.images[index]), self.labels[index]


def synthetic() -> data.Dataset:
    """Smooth images, as JPEG is made for, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(IMAGES, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic")
    noisy = 255 * smooth + 4 * torch.randn(smooth.shape, generator=generator)
    images = noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    split = data.Split(images, torch.arange(IMAGES) % 10)
    few = split.take(torch.arange(10))
    return data.Dataset("synthetic", tuple("0123456789"), split, few, flip=True)


def batches(name: str, dataset: data.Dataset, folder: Path) -> Iterable[Any]:
    """Return the loader with this name, one of `NAMES`."""
    if name.startswith("torchvision"):
        return DataLoader(
            Augmented(dataset.train),
            BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=WORKERS,
            persistent_workers=True,
            pin_memory=ON_GPU,
        )
    kind, _, form = name.partition(", ")
    train = dataset.train
    if kind == "ffcv":
        file = folder / f"{form}.beton"
        convert.write_beton(file, convert.dataset_source(dataset), form, 95, None)  # type: ignore[arg-type]
        train = data.load(str(file)).train
    return data.make_loader(
        train, BATCH, kind=kind, device=DEVICE, train=True, pad=PAD, flip=True,
        order=torch.Generator().manual_seed(0),
        augment=torch.Generator(DEVICE).manual_seed(0),
    )  # type: ignore[call-overload]  # fmt: skip


def one_pass(loader: Iterable[Any]) -> Callable[[], None]:
    def run() -> None:
        for x, y in loader:
            x.to(DEVICE, non_blocking=True), y.to(DEVICE, non_blocking=True)

    return run


def update(dataset: data.Dataset) -> Callable[[], None]:
    """Return one update of the paper's training on a batch that is already loaded."""
    config = TrainConfig(width=WIDTH, batch_size=BATCH, loader="resident", device=str(DEVICE))
    trainer = Trainer(config, dataset)
    x, y = next(iter(trainer.loader))
    return lambda: trainer.update(x, y)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def contest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float]]:
    """The seconds of every loader's rounds."""
    names = [item.callspec.params["name"] for item in selected(request)]
    dataset, folder = synthetic(), tmp_path_factory.mktemp("betons")
    calls = {
        name: update(dataset) if name == TRAINER else one_pass(batches(name, dataset, folder))
        for name in names
    }
    for call in calls.values():
        call()
    once = request.config.getoption("benchmark_disable")
    return timing.interleaved(
        calls, budget=90, least=1 if once else 5, most=1 if once else 9, shortest=1e-9
    )


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("name", NAMES)
def test_pass(name: str, contest: dict[str, list[float]], record: Any, benchmark: Any) -> None:
    benchmark.group = f"{IMAGES} images of 32x32, batch {BATCH}, {describe()}"
    seconds = contest[name]
    images = BATCH if name == TRAINER else IMAGES // BATCH * BATCH
    needed = BATCH / statistics.median(contest[TRAINER]) if TRAINER in contest else None
    rate = images / statistics.median(seconds)
    record(
        name,
        seconds,
        images,
        **{"x the trainer's": rate / needed if needed else None, "rounds": len(seconds)},
    )
