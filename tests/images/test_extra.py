"""Further training images: their share of every batch, their order, and wrong files."""

import io
import itertools
import json
import shutil
import signal
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_jobs import command, command_signalled, together
from torch import nn
from trainings import assert_same

import fastiat
from fastiat import cli, data
from fastiat.config import TrainConfig
from fastiat.data import Loader, Shard, Split
from fastiat.images.extra import ExtraImages, load_extra
from fastiat.runs.directory import STATE, Run
from fastiat.system import ranks
from fastiat.system.errors import InputError
from fastiat.train import Trainer

DIGITS = data.load("digits")
CPU = torch.device("cpu")
TINY = {
    "dataset": "digits", "arch": "mlp6", "width": 4, "steps": 1, "epochs": 1, "batch_size": 50,
    "device": "cpu", "precision": "fp32", "eval_limit": 20, "lr": 0.02,
}  # fmt: skip


def numbered(count: int, first: int) -> Split:
    """Images whose pixels, and labels, are their numbers."""
    numbers = torch.arange(first, first + count, dtype=torch.uint8).view(count, 1, 1, 1)
    return Split(numbers.expand(count, 8, 8, 3).contiguous(), numbers.flatten().long())


def numbered_loader(
    shard: Shard = data.WHOLE, further: int = 17, batch: int = 10, share: int = 7, **options
) -> Loader:
    """Return a loader of 41 training images from number 0 and `further` ones from number 100."""
    order, augment = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    extra = ExtraImages(numbered(further, 100), share, CPU, order)
    return Loader(
        numbered(41, 0), batch, train=True, shard=shard, order=order, augment=augment, extra=extra,
        **options,
    )  # fmt: skip


def write(file: Path, count: int = 100, **arrays: object) -> Path:
    """Write a .npz of `count` test images of digits; None leaves an array out."""
    split = DIGITS.test.take(torch.arange(count))
    given = {"image": split.images.numpy(), "label": split.labels.numpy()} | arrays
    np.savez(file, **{name: array for name, array in given.items() if array is not None})
    return file


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    return write(tmp_path / "extra.npz")


@pytest.mark.parametrize("further", [1, 3, 7, 17, 90, 150])
def test_every_batch_has_its_share_and_every_image_is_taken_equally_often(further):
    loader, counts = numbered_loader(further=further, pad=0), Counter(range(100, 100 + further))
    counts.subtract(range(100, 100 + further))
    assert len(loader) == 41 // 3
    orders = []
    for _ in range(4):
        seen, taken = [], []
        for x, y in loader:
            assert x.shape == (10, 3, 8, 8) and x.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(x, y.view(10, 1, 1, 1).expand_as(x).to(torch.uint8))
            assert (y < 100).tolist() == [True] * 3 + [False] * 7
            seen += y[:3].tolist()
            for number in y[3:].tolist():
                counts[number] += 1
                assert max(counts.values()) - min(counts.values()) <= 1
            taken += y[3:].tolist()
        assert len(set(seen)) == len(seen) == 39
        orders.append(taken)
    assert sum(counts.values()) == 4 * 13 * 7
    if further > 3:
        assert all(a != b for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("crop", [None, 8])
def test_ranks_take_disjoint_parts_of_the_batches_of_one_process(crop):
    loaders = [
        numbered_loader(Shard(*place), batch=12, share=8, further=90, flip=True, crop=crop)
        for place in ((0, 1), (0, 2), (1, 2))
    ]
    for number in range(2):
        for (x, y), *parts in zip(*(loader.epoch(2, number) for loader in loaders), strict=True):
            assert [len(part) for _, part in parts] == [6, 6] and len(set(y.tolist())) == 12
            # A part is 2 training images and 4 further ones.
            for whole, halves in ((x, [p[0] for p in parts]), (y, [p[1] for p in parts])):
                again = [half[:2] for half in halves] + [half[2:] for half in halves]
                assert torch.equal(torch.cat(again), whole)


@pytest.mark.parametrize("skip", [0, 1, 12, 13])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_the_rest_of_any_pass_is_that_of_a_loader_that_made_all_batches(skip, number):
    whole, later = numbered_loader(pad=0), numbered_loader(pad=0)
    for _ in range(number):
        list(whole)
    before = whole.order.get_state()
    expected = [y for _, y in whole][skip:]
    later.order.set_state(before)
    rest = [y for _, y in later.epoch(skip, number)]
    assert len(rest) == 13 - skip and all(map(torch.equal, rest, expected))


def test_further_images_are_augmented_as_training_images_are():
    """With the same image in both sets, every shift and flip comes in both parts of a batch."""
    image = torch.arange(192, dtype=torch.uint8).view(1, 8, 8, 3)
    split = Split(image.expand(400, 8, 8, 3).contiguous(), torch.zeros(400).long())
    extra = ExtraImages(split, 200, CPU, torch.Generator().manual_seed(0))
    augment = torch.Generator().manual_seed(0)
    loader = Loader(split, 400, train=True, pad=1, flip=True, augment=augment, extra=extra)
    (x, _), _ = loader
    kinds = [{image.numpy().tobytes() for image in part} for part in x.split(200)]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 18


def test_the_loader_of_ffcv_makes_the_batches_of_the_resident_one(tmp_path, monkeypatch):
    pytest.importorskip("ffcv")
    monkeypatch.setenv("FASTIAT_CACHE", str(tmp_path / "cache"))
    config = TrainConfig(**TINY, extra=str(write(tmp_path / "extra.npz")), flip=True)
    one, other = (Trainer(replace(config, loader=k), DIGITS) for k in ("ffcv", "resident"))
    assert one.fingerprint == other.fingerprint
    batches = [list(trainer.loader) for trainer in (one, other)]
    assert len(batches[0]) == len(batches[1]) == 1437 // 15
    for (x, y), (u, v) in zip(*batches, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_held_out_images_come_from_the_data_set_only(extra):
    trainer = Trainer(TrainConfig(**TINY, extra=str(extra), holdout=100), DIGITS)
    assert len(trainer.holdout.labels) == 100 and len(trainer.loader) == (1437 - 100) // 15
    held = {image.numpy().tobytes() for image in trainer.holdout.source.images}
    assert held <= {image.numpy().tobytes() for image in DIGITS.train.images}
    assert len(trainer.loader.extra.labels) == 100


def test_the_fingerprint_is_of_both_sets_and_no_order_depends_on_the_place(extra, tmp_path):
    plain = Trainer(TrainConfig(**TINY), DIGITS)
    moved = shutil.copy(extra, tmp_path / "moved.npz")
    both, again = (Trainer(TrainConfig(**TINY, extra=str(f)), DIGITS) for f in (extra, moved))
    other = Trainer(TrainConfig(**TINY, extra=str(write(tmp_path / "o.npz", 99))), DIGITS)
    assert plain.fingerprint == DIGITS.fingerprint()
    assert both.fingerprint == again.fingerprint != other.fingerprint
    assert both.fingerprint.partition("+")[0] == other.fingerprint.partition("+")[0]
    assert both.fingerprint.startswith(f"{plain.fingerprint}+")
    with pytest.raises(InputError, match=r"the further images are not those .* --extra"):
        other.load_state_dict(both.state_dict())
    for trainer, state in ((both, plain.state_dict()), (plain, both.state_dict())):
        with pytest.raises(InputError, match="further images"):
            trainer.load_state_dict(state)


IMAGES = DIGITS.test.images[:6].numpy()
LABELS = np.arange(6)
WRONG = {
    "no image": ({"image": None, "x": IMAGES}, "no array 'image', it has label, x: give image and"),
    "no label": ({"label": None}, "no array 'label', it has image"),
    "floats": ({"image": IMAGES / 255}, "image is float64 of shape (6, 8, 8, 1): give"),
    "signed": ({"image": IMAGES.astype(np.int8)}, "image is int8"),
    "no channels": ({"image": IMAGES[..., 0]}, "image is uint8 of shape (6, 8, 8): give"),
    "size": ({"image": IMAGES[:, :7]}, "its images have 7x8 pixels and 1 channel, but those of"),
    "large": ({"image": np.zeros((6, 32, 32, 3), np.uint8)}, "32x32 pixels and 3 channels, but"),
    "channels": ({"image": IMAGES.repeat(3, -1)}, "8x8 pixels and 3 channels, but those of digits"),
    "labels": ({"label": LABELS / 1}, "label is float64 of shape (6,), for 6 images"),
    "one-hot": ({"label": np.eye(6, dtype=int)}, "label is int64 of shape (6, 6), for 6 images"),
    "fewer labels": ({"label": LABELS[:5]}, "label is int64 of shape (5,), for 6 images"),
    "text": ({"label": LABELS.astype(str)}, "label is <U21 of shape (6,), for 6 images"),
    "above": ({"label": LABELS + 5}, "its labels are from 5 to 10, but digits has 10 classes"),
    "huge": ({"label": np.full(6, 2**64 - 1, np.uint64)}, "to 18446744073709551615, but"),
    "below": ({"label": LABELS - 1}, "its labels are from -1 to 4, but digits has 10 classes"),
    "empty": ({"image": IMAGES[:0], "label": LABELS[:0]}, "it is empty, its image has shape (0,"),
    "objects": ({"label": LABELS.astype(object)}, "other data than arrays of numbers"),
    "order": ({"image": np.asfortranarray(IMAGES)}, "Fortran order"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_does_not_fit_is_refused_in_one_line(kind, tmp_path):
    arrays, named = WRONG[kind]
    file = write(tmp_path / "wrong.npz", **{"image": IMAGES, "label": LABELS} | arrays)
    with pytest.raises(InputError) as error:
        load_extra(file, DIGITS, None)
    message = str(error.value)
    assert message.startswith(f"--extra {file}") and named in message and "\n" not in message


def test_files_of_other_kinds_are_refused_in_one_line(extra, tmp_path, complaint):
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("image, label\n")
    np.save(tmp_path / "array.npy", IMAGES)
    (tmp_path / "cut.npz").write_bytes(extra.read_bytes()[:3000])
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("image.npy", b"no array")
        archive.writestr("label.npy", b"no array")
    damaged = bytearray(extra.read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "damaged.npz").write_bytes(damaged)
    for name, named in {
        "none.npz": "(No such file or directory): give a .npz file with image, (N, H, W, C) uint8,",
        f"{'x' * 300}.npz": "it cannot be read (File name too long)",
        ".": "it cannot be read (Is a directory): give a .npz file",
        "empty.npz": "it is an empty file: give a .npz file",
        "text.npz": "it is a text file: give a .npz file",
        "array.npy": "it is a NumPy array: give a .npz file",
        "cut.npz": "it is damaged (File is not a zip file): download or write it again",
        "other.npz": "it holds other data than arrays",
        "damaged.npz": "it is damaged (Bad CRC-32 for file 'image.npy'): download or write it",
    }.items():
        file, out = tmp_path / name, tmp_path / "run"
        line = complaint("train", "--dataset", "digits", "--extra", file, "--out", out)
        assert f"--extra {file}: " in line and named in line and not out.exists()


def test_a_pickle_in_the_file_is_never_loaded(tmp_path):
    class Call:
        def __reduce__(self):
            return Path.touch, (tmp_path / "canary",)

    content = io.BytesIO()
    np.save(content, np.array([Call()] * 6, object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "wrong.npz", "w") as archive:
        for name in ("image", "label"):
            archive.writestr(f"{name}.npy", content.getvalue())
    with pytest.raises(InputError, match="other data"):
        load_extra(tmp_path / "wrong.npz", DIGITS, None)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("dtype", ["uint8", "int32", ">i8"])
def test_labels_of_every_integer_type_are_read_and_other_arrays_are_ignored(dtype, tmp_path):
    labels = LABELS.astype(dtype)
    file = write(tmp_path / "x.npz", image=IMAGES, label=labels, note=np.array([None], object))
    split = load_extra(file, DIGITS, None)
    assert split.labels.tolist() == list(range(6)) and np.array_equal(split.images, IMAGES)


def test_image_size_resizes_further_images_too(extra):
    digits = data.load("digits", image_size=16)
    split = load_extra(extra, digits, 16)
    expected = data.resized(DIGITS.test.take(torch.arange(100)), 16)
    assert torch.equal(split.images, expected.images)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--extra-fraction", "0"), "--extra-fraction is 0.0: give a number above 0"),
        (("--extra-fraction", "1"), "--extra-fraction is 1.0: give less than 1"),
        (("--extra-fraction", "1.5"), "--extra-fraction is 1.5: give less than 1"),
        (("--extra-fraction", "0.001"), "0.001 of --batch-size 64 is 0 images: give values"),
        (("--batch-size", "1"), "0.7 of --batch-size 1 is 1 image: give values that leave"),
        (("--batch-size", "20000"), "--batch-size 20000 takes 6000 training images, more than the"),
    ],
)
def test_shares_that_leave_no_image_of_one_kind_are_refused(flags, named, extra, complaint):
    out = extra.parent / "run"
    line = complaint("train", "--dataset", "digits", "--extra", extra, "--out", out, *flags)
    assert named in line and not out.exists()


def test_a_share_without_further_images_is_refused(complaint):
    assert "--extra-fraction needs --extra" in complaint("train", "--extra-fraction", "0.5")


@pytest.mark.parametrize(
    ("count", "size", "fraction", "remedy"),
    [
        (4, 128, 0.7, "--extra-fraction 88/128"),
        (4, 8, 0.1, "--extra-fraction 4/8"),
        (4, 4, 0.7, "--batch-size 8 --extra-fraction 0.5"),
    ],
)
def test_a_share_that_ranks_cannot_divide_is_refused_with_one_that_they_can(
    count, size, fraction, remedy, extra, monkeypatch
):
    monkeypatch.setattr(ranks, "_ranks", ranks.Ranks(1, count))
    monkeypatch.setattr(ranks.Ranks, "all_reduce_max", lambda self, *values: values)
    settings = TINY | {"batch_size": size, "extra": str(extra)}
    with pytest.raises(InputError, match="cannot be shared equally by 4 processes") as error:
        Trainer(TrainConfig(**settings, extra_fraction=fraction), DIGITS)
    assert str(error.value).endswith(f"give, say, {remedy}")
    names, values = remedy.split()[::2], remedy.split()[1::2]
    better = {
        name.removeprefix("--").replace("-", "_"): float(value) if "." in value else value
        for name, value in zip(names, values, strict=True)
    }
    better |= {"batch_size": int(better["batch_size"])} if "batch_size" in better else {}
    Trainer(TrainConfig(**settings | {"extra_fraction": fraction} | better), DIGITS)


def flags_of(out: Path, extra: Path) -> list[str]:
    small = TINY | {"out": out, "extra": extra, "extra_fraction": 0.3, "batch_size": 240}
    pairs = (("--" + name.replace("_", "-"), str(value)) for name, value in small.items())
    return ["train", *itertools.chain.from_iterable(pairs)]


def test_a_resume_takes_the_moved_file_and_no_other(tmp_path, extra, complaint):
    out, moved = tmp_path / "run", tmp_path / "moved.npz"
    assert cli.main(flags_of(out, extra)) == 0
    extra.rename(moved)
    line = complaint("train", "--resume", "--out", out)
    assert f"--extra {extra}: it cannot be read (No such file" in line
    other = write(tmp_path / "other.npz", 99)
    line = complaint("train", "--resume", "--out", out, "--extra", other)
    assert "the further images are not those that this run was started with" in line
    line = complaint("train", "--resume", "--out", out, "--extra-fraction", "0.5")
    assert "was started with --extra-fraction 0.3, not 0.5" in line
    assert cli.main(["train", "--resume", "--out", str(out), "--extra", str(moved)]) == 0
    assert json.loads((out / "config.json").read_text())["extra"] == str(moved)
    plain = flags_of(tmp_path / "plain", extra)
    del plain[plain.index("--extra") : plain.index("--extra-fraction") + 2]
    assert cli.main(plain) == 0
    line = complaint("train", "--resume", "--out", tmp_path / "plain", "--extra", moved)
    assert "was started with --extra None, not" in line


def test_two_ranks_train_and_resume_with_further_images(tmp_path, extra):
    whole, out = tmp_path / "whole", tmp_path / "run"
    ended = together(2, tmp_path / "a", command, *flags_of(whole, extra))
    assert ended.statuses == [0, 0] and ended.complaints == []
    assert "100 further images, 72 a batch, 8 steps of 240" in ended.out[0].splitlines()[0]
    argv = flags_of(out, extra)
    ended = together(2, tmp_path / "b", command_signalled, signal.SIGTERM, 1, 4, *argv)
    assert ended.statuses == [143, 143]
    ended = together(2, tmp_path / "c", command, "train", "--resume", "--out", str(out))
    assert ended.statuses == [0, 0], ended.complaints
    assert_same(whole, out)


def test_fit_takes_further_images(tmp_path, extra):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    settings = {"epochs": 1, "steps": 1, "eval_limit": 20, "batch_size": 300, "mix": "mixup"}
    out = tmp_path / "run"
    train = (DIGITS.train.images.numpy(), DIGITS.train.labels)
    fit = fastiat.fit(model, train, DIGITS.test, extra=extra, device="cpu", out=out, **settings)
    assert fit.history[-1]["step"] == 1437 // 90
    assert Run.open(out).config.extra == str(extra) and (out / STATE).exists()
    with pytest.raises(InputError, match="8x8 pixels and 1 channel, but those of python have 9x9"):
        larger = np.zeros((300, 9, 9), np.uint8), np.arange(300) % 10
        fastiat.fit(
            nn.Sequential(nn.Flatten(), nn.Linear(81, 10)), larger, larger, extra=extra,
            device="cpu", out=tmp_path / "other", **settings,
        )  # fmt: skip
