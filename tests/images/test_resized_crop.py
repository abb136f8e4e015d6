"""Random resized crops and photos of any size, against torchvision."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

import fastiat
from fastiat import cli, data
from fastiat.config import TrainConfig
from fastiat.images import resized_crop
from fastiat.images.convert import centre_square, with_context
from fastiat.runs.directory import Run
from fastiat.system.errors import InputError
from fastiat.train import Trainer

IMAGES = torch.randint(
    256, (3, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@pytest.mark.parametrize("side", [12, 20, 33])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_those_of_torchvision(side, flip):
    boxes = torch.tensor([[0, 0, 20, 20], [3, 5, 11, 14], [7, 2, 13, 10], [10, 0, 10, 10]])
    index = torch.tensor([2, 0, 1, 0])
    found = resized_crop.crop(IMAGES, index, boxes, torch.full((4,), flip), side)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == torch.uint8
    for ours, i, box in zip(found, index.tolist(), boxes.tolist(), strict=True):
        image = IMAGES[i].permute(2, 0, 1).float()
        theirs = tv.resized_crop(image, *box, [side, side], antialias=False)
        theirs = theirs.flip(-1) if flip else theirs
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.51)


def test_boxes_have_the_distribution_of_their_definition():
    generator = torch.Generator().manual_seed(0)
    boxes = resized_crop.draw_boxes(20_000, 256, 256, generator, torch.device("cpu")).double()
    top, left, h, w = boxes.unbind(1)
    assert (top >= 0).all() and (top + h <= 256).all() and (left >= 0).all()
    assert (left + w <= 256).all()
    share, ratio = h * w / 256**2, (w / h).log()
    assert share.min() > 0.24 and share.max() <= 1
    assert math.log(0.74) < ratio.min() and ratio.max() < math.log(1.35)
    # torchvision draws one box at a time.
    blank = torch.zeros(3, 256, 256)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(blank, [0.25, 1], [3 / 4, 4 / 3]) for _ in range(10_000)]
    ).double()
    their_share = theirs[:, 2] * theirs[:, 3] / 256**2
    for limit in (0.3, 0.5, 0.7, 0.9):
        expected = float((their_share < limit).double().mean())
        assert float((share < limit).double().mean()) == pytest.approx(expected, abs=0.02)
    assert abs(float(ratio.mean())) < 0.01
    assert float((top / (256 - h).clamp(min=1)).mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("size", [(300, 200), (123, 457), (64, 64), (40, 90)])
def test_photos_are_resized_and_cropped_as_torchvision_does(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(pixels)
    assert with_context(48) == 54 and with_context(224) == 256
    theirs = tv.center_crop(tv.resize(image, 54), [48, 48])
    ours = np.asarray(centre_square(image, 48))[3:-3, 3:-3]
    np.testing.assert_array_equal(ours, np.asarray(theirs))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A tree of 60 photos of many sizes and shapes, in a cache of its own."""
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 5)):
        for label in range(4):
            folder = tmp_path / "photos" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                width, height = rng.integers(30, 90, 2)
                pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                pixels[..., label % 3] //= 1 + label
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path / "photos"


def test_a_folder_of_photos_has_one_size_when_asked(photos):
    with pytest.raises(
        InputError, match="make every image square, or resize them with --image-size"
    ):
        data.load("folder", photos)
    dataset = data.load("folder", photos, image_size=28)
    assert dataset.train.shape == dataset.test.shape == (3, 28, 28)
    first = Image.open(photos / "test" / "class0" / "0.jpg")
    expected = tv.center_crop(tv.resize(first, with_context(28)), [28, 28])
    assert torch.equal(dataset.test.images[0], torch.from_numpy(np.array(expected)))
    wide = data.load("folder", photos, image_size=28, context=True)
    assert wide.train.shape == (3, 32, 32) and wide.test.shape == (3, 28, 28)
    assert torch.equal(wide.train.images[:, 2:-2, 2:-2], dataset.train.images)
    other = data.load("folder", photos, image_size=30)
    prints = {each.fingerprint() for each in (dataset, wide, other)}
    assert len(prints) == 3


def test_images_streamed_by_ffcv_are_those_in_memory(photos):
    config = {"dataset": "folder", "data_dir": str(photos), "image_size": 28, "arch": "mlp6"}
    config |= {"width": 8, "batch_size": 8, "device": "cpu", "augment": "resized-crop"}
    batches = []
    for loader in ("resident", "ffcv"):
        options = {"loader": loader, "image_size": 28, "context": True}
        trainer = Trainer(
            TrainConfig(**config, loader=loader), data.load("folder", photos, **options)
        )
        assert trainer.loader.kind == loader
        batches.append([*trainer.loader, *trainer.test])
    for (x, y), (u, v) in zip(*batches, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
        assert x.shape[1:] == (3, 28, 28)


def test_other_data_sets_are_resized():
    dataset = data.load("digits", image_size=20)
    plain = data.load("digits")
    pixels = plain.test.images[:5].permute(0, 3, 1, 2).float()
    expected = tv.resize(pixels, [20, 20], antialias=True).round()
    assert torch.equal(dataset.test.images[:5].permute(0, 3, 1, 2).float(), expected)
    assert dataset.train.shape == (1, 20, 20)


def test_a_crop_of_the_batch_does_not_depend_on_the_number_of_ranks():
    split = data.load("digits").train

    def epoch(shard):
        generators = {name: torch.Generator().manual_seed(3) for name in ("order", "augment")}
        loader = data.Loader(split, 8, train=True, flip=True, crop=12, shard=shard, **generators)
        return [x for x, _ in loader][:5]

    whole = epoch(data.Shard(0, 1))
    halves = epoch(data.Shard(0, 2)), epoch(data.Shard(1, 2))
    for x, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(x, torch.cat(parts))


def test_a_run_on_photos_is_measured_on_them(photos, tmp_path, capsys):
    arguments = ["train", "--dataset", "folder", "--data-dir", str(photos), "--image-size", "28"]
    arguments += ["--augment", "resized-crop", "--arch", "preact18", "--width", "2"]
    arguments += ["--epochs", "2", "--steps", "1", "--batch-size", "8", "--holdout", "4"]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--splits", "test", "train"]) == 0
    assert "40" in capsys.readouterr().out
    assert fastiat.load(tmp_path / "run")(torch.rand(1, 3, 28, 28)).shape == (1, 4)
    assert Run.open(tmp_path / "run").config.image_size == 28


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--image-size 7", "--image-size is 7: give 8 to 2048"),
        ("--image-size 0", "--image-size is 0: give a number above 0"),
        ("--augment cutout", "invalid choice: 'cutout'"),
        ("--augment none --flip", "--augment none and --flip contradict each other"),
    ],
)
def test_wrong_sizes_and_augmentations_get_one_line(flags, words, capsys):
    try:
        status = cli.main(["train", "--dataset", "digits", *flags.split()])
    except SystemExit as error:
        status = error.code
    assert status == 2 and words in capsys.readouterr().err


@pytest.mark.slow
def test_a_resnet_50_at_224_pixels_trains_resumes_and_is_measured(photos, tmp_path):
    config = TrainConfig(
        arch="torchvision:resnet50", dataset="folder", data_dir=str(photos), image_size=224,
        augment="resized-crop", adv="fgsm", epochs=1, batch_size=4, train_limit=8, eval_limit=4,
        lr=0.01, device="cpu", precision="fp32",
    )  # fmt: skip
    dataset = data.load("folder", photos, image_size=224, context=True)
    whole, first = Trainer(config, dataset), Trainer(config, dataset)
    list(whole.epoch_updates())
    next(first.epoch_updates())
    second = Trainer(config, dataset)
    second.load_state_dict(first.state_dict())
    list(second.epoch_updates())
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    row = {}
    assert second.validate(row) and 0 <= row["test_error_percent"] <= 100
