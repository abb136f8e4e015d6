"""Splits, their fingerprint, the hold-out, and the resident loader."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastiat import data
from fastiat.config import TrainConfig
from fastiat.data import Dataset, Loader, Shard, Split
from fastiat.system.errors import InputError
from fastiat.train import Trainer


def make_split(n: int, shape: tuple[int, int, int] = (8, 8, 3), classes: int = 3) -> Split:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, *shape), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % classes)


def test_split_and_dataset_refuse_tensors_that_do_not_belong_together() -> None:
    good = make_split(6)
    with pytest.raises(InputError, match="uint8"):
        Split(good.images.float(), good.labels)
    with pytest.raises(InputError, match="contiguous"):
        Split(good.images.permute(0, 3, 1, 2), good.labels)
    with pytest.raises(InputError, match="6 images"):
        Split(good.images, good.labels[:5])
    with pytest.raises(InputError, match="labels from 0 to 2 for 2 classes"):
        Dataset("x", ("a", "b"), good, good, False)
    with pytest.raises(InputError, match=r"\(3, 8, 8\).*\(3, 9, 9\)"):
        Dataset("x", ("a", "b", "c"), good, make_split(3, (9, 9, 3)), False)
    with pytest.raises(InputError, match="without images"):
        Dataset("x", ("a", "b", "c"), good, good.take(torch.arange(0)), False)


def test_fingerprint_sees_one_pixel_one_label_and_the_shape() -> None:
    names = ("a", "b", "c")
    split = make_split(4, (8, 16, 3))
    seen = {Dataset("x", names, split, split, False).fingerprint()}
    assert seen == {Dataset("y", names, split, split, True).fingerprint()}
    pixel, label = split.images.clone(), split.labels.clone()
    pixel[3, 7, 15, 2] ^= 1
    label[0] = 2
    shape = split.images.reshape(4, 16, 8, 3)
    for images, labels in ((pixel, split.labels), (split.images, label)):
        seen.add(Dataset("x", names, Split(images, labels), split, False).fingerprint())
        seen.add(Dataset("x", names, split, Split(images, labels), False).fingerprint())
    reshaped = Split(shape, split.labels)
    seen.add(Dataset("x", names, reshaped, reshaped, False).fingerprint())
    assert len(seen) == 6
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in seen)


def test_take_picks_in_the_order_of_the_index() -> None:
    split = make_split(5)
    taken = split.take(torch.tensor([3, 0]))
    assert torch.equal(taken.images, torch.stack([split.images[3], split.images[0]]))
    assert taken.labels.tolist() == [0, 0]
    assert (len(taken), taken.shape) == (2, (3, 8, 8))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
def test_holdout_takes_each_class_by_largest_remainder(
    labels: list[int], more: st.DataObject
) -> None:
    size, counts = len(labels), Counter(labels)
    most = size - len(counts)  # every class keeps one
    hypothesis.assume(most)
    n = more.draw(st.integers(1, most))
    seed = more.draw(st.integers(0, 2**32))
    numbers = torch.arange(size, dtype=torch.uint8)  # an image is its own number
    split = Split(numbers.view(size, 1, 1, 1), torch.tensor(labels))
    rest, held = data.holdout(split, n, seed)
    rest_ids, held_ids = rest.images.flatten().tolist(), held.images.flatten().tolist()
    assert len(held_ids) == n
    assert sorted(rest_ids + held_ids) == list(range(size))
    assert rest_ids == sorted(rest_ids)
    assert held_ids == sorted(held_ids)
    assert held.labels.tolist() == [labels[i] for i in held_ids]
    assert rest.labels.tolist() == [labels[i] for i in rest_ids]
    assert {label: held.labels.tolist().count(label) for label in counts} == by_share(
        counts, n, dict.fromkeys(counts, 0), {label: count - 1 for label, count in counts.items()}
    )


def by_share(
    counts: dict[int, int], n: int, least: dict[int, int], most: dict[int, int]
) -> dict[int, int]:
    """Divide `n` by largest remainder, then move one at a time what breaks a bound."""
    shares = {label: Fraction(n * count, sum(counts.values())) for label, count in counts.items()}
    taken = {label: int(share) for label, share in shares.items()}
    by_remainder = sorted(counts, key=lambda label: (taken[label] - shares[label], label))
    for label in by_remainder[: n - sum(taken.values())]:
        taken[label] += 1
    taken = {label: min(max(k, least[label]), most[label]) for label, k in taken.items()}
    while sum(taken.values()) != n:
        step = 1 if sum(taken.values()) < n else -1
        bound = most if step == 1 else least
        free = [label for label in sorted(taken) if taken[label] != bound[label]]
        taken[max(free, key=lambda label: step * (shares[label] - taken[label]))] += step
    return taken


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
def test_a_draw_has_every_class_that_it_has_room_for(
    labels: list[int], more: st.DataObject
) -> None:
    n = more.draw(st.integers(1, len(labels)))
    counts = Counter(labels)
    numbers = torch.arange(len(labels), dtype=torch.uint8)
    drawn = data.draw(Split(numbers.view(-1, 1, 1, 1), torch.tensor(labels)), n, 0)
    ids = drawn.images.flatten().tolist()
    assert ids == sorted(set(ids)) and drawn.labels.tolist() == [labels[i] for i in ids]
    least = dict.fromkeys(counts, int(n >= len(counts)))
    assert Counter(drawn.labels.tolist()) == Counter(by_share(counts, n, least, counts))


def test_no_class_is_emptied() -> None:
    labels = torch.tensor([*range(10), *[10] * 90])
    split = Split(torch.zeros(100, 8, 8, 1, dtype=torch.uint8), labels)
    kept, held = data.holdout(split, 10, 0)
    assert torch.bincount(kept.labels).tolist() == [1] * 10 + [80]
    assert held.labels.tolist() == [10] * 10
    assert torch.bincount(data.draw(split, 11, 0).labels).tolist() == [1] * 11
    with pytest.raises(InputError, match=r"cannot hold out 90 of 100 .*every class.*1 to 89"):
        data.holdout(split, 90, 0)
    with pytest.raises(InputError, match="hold out none"):
        data.holdout(split.take(torch.arange(10)), 1, 0)


@pytest.mark.parametrize("n", [-1, 0, 7])
def test_a_draw_of_nothing_or_more_than_there_is_is_refused(n: int) -> None:
    with pytest.raises(InputError, match=f"cannot draw {n} of 6 images"):
        data.draw(make_split(6), n, 0)


def test_measuring_and_training_draw_from_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    rare = digits.test.labels != 3
    rare[(digits.test.labels == 3).nonzero()[0]] = True
    dataset = replace(digits, test=digits.test.take(rare))
    config = TrainConfig(dataset="digits", arch="mlp6", width=8, device="cpu", eval_limit=20)
    assert (Trainer(config, dataset).test.labels == 3).sum() == 1


def test_holdout_repeats_by_seed_and_differs_between_seeds() -> None:
    split = data.load("digits").train
    first, again, other = (data.holdout(split, 100, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("n", [-1, 0, 6, 7])
def test_holdout_of_nothing_or_everything_is_refused(n: int) -> None:
    with pytest.raises(InputError, match=f"cannot hold out {n} of 6 images"):
        data.holdout(make_split(6), n, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_limited_gives_every_class_its_share_and_at_least_one(
    labels: list[int], more: st.DataObject
) -> None:
    size, counts = len(labels), Counter(labels)
    total = more.draw(st.integers(len(counts), size))
    numbers = torch.arange(size, dtype=torch.uint8)  # an image is its own number
    split = Split(numbers.view(size, 1, 1, 1), torch.tensor(labels))
    drawn = data.limited(split, total, None, more.draw(st.integers(0, 2**32)))
    ids, found = drawn.images.flatten().tolist(), Counter(drawn.labels.tolist())
    assert len(ids) == total and ids == sorted(set(ids))
    assert drawn.labels.tolist() == [labels[i] for i in ids]
    shares = {label: Fraction(total * count, size) for label, count in counts.items()}
    assert min(found.values()) >= 1 and found.keys() == counts.keys()
    if min(shares.values()) >= 1:
        assert all(abs(found[label] - shares[label]) < 1 for label in counts)


def test_limited_takes_at_most_so_many_of_each_class_and_then_of_all() -> None:
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 2)
    split = Split(torch.zeros(16, 1, 1, 1, dtype=torch.uint8), labels)
    assert data.limited(split, None, 4, 0).labels.bincount().tolist() == [4, 4, 2]
    assert data.limited(split, 5, 4, 0).labels.bincount().tolist() == [2, 2, 1]
    assert data.limited(split, 99, 99, 0) is split


def test_limited_repeats_by_seed_and_refuses_fewer_images_than_classes() -> None:
    split = data.load("digits").train
    first, again, other = (data.limited(split, 100, None, seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    with pytest.raises(InputError, match="cannot cover 10 classes"):
        data.limited(split, 9, None, 0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_evaluation_batches_come_in_order_untouched_and_keep_the_last() -> None:
    split = make_split(11)
    loader = Loader(split, 4, train=False, pad=2, flip=True)
    batches = list(loader)
    assert [len(y) for _, y in batches] == [4, 4, 3]
    assert len(loader) == 3
    assert torch.equal(torch.cat([x for x, _ in batches]), split.images.permute(0, 3, 1, 2))
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)
    for x, _ in batches:
        assert x.dtype == torch.uint8
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert [y.tolist() for _, y in loader.epoch(skip=2)] == [split.labels[8:].tolist()]


def test_training_pass_shuffles_sees_each_image_once_and_drops_the_rest() -> None:
    numbers = torch.arange(50, dtype=torch.uint8)
    split = Split(numbers.view(50, 1, 1, 1).expand(50, 8, 8, 3).contiguous(), numbers.long())
    loader = Loader(split, 8, train=True, pad=0, order=generator(0))
    passes = []
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 6
        for x, y in batches:
            assert x.shape == (8, 3, 8, 8)
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert y.dtype == torch.int64
            # With no padding and no flip every image is itself, under its own label.
            assert torch.equal(x, y.view(8, 1, 1, 1).expand(8, 3, 8, 8))
        passes.append(torch.cat([y for _, y in batches]).tolist())
        assert len(set(passes[-1])) == 48
    assert passes[0] != passes[1]
    assert passes[0] != sorted(passes[0])


@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (1, False), (1, True), (2, True)])
def test_crops_and_flips_are_each_of_the_allowed_ones_equally_often(pad: int, flip: bool) -> None:
    image = np.random.default_rng(0).integers(1, 256, (8, 8, 3), np.uint8)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    allowed = {}
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            crop = padded[row : row + 8, column : column + 8]
            allowed[crop.tobytes()] = 0
            if flip:
                allowed[crop[:, ::-1].tobytes()] = 0
    n = 200 * len(allowed)
    split = Split(torch.from_numpy(image).expand(n, 8, 8, 3).contiguous(), torch.zeros(n).long())
    loader = Loader(split, 50, train=True, pad=pad, flip=flip, augment=generator(1))
    for x, _ in loader:
        for sample in x.permute(0, 2, 3, 1).contiguous().numpy():
            allowed[sample.tobytes()] += 1  # a KeyError is a crop that does not exist
    assert len(allowed) == (2 * pad + 1) ** 2 * (1 + flip)
    # Counts are binomial with mean 200 and a standard deviation of at most 14.2.
    assert all(abs(count - 200) < 71 for count in allowed.values())


def rest_of_pass(loader: Loader, skip: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(x.clone(), y.clone()) for x, y in loader.epoch(skip)]


@pytest.mark.parametrize("skip", [0, 1, 5, 7])
def test_restored_generators_repeat_the_rest_of_a_pass_and_the_next(skip: int) -> None:
    split = make_split(30)
    order, augment = generator(3), generator(4)
    loader = Loader(split, 4, train=True, flip=True, order=order, augment=augment)
    rest_of_pass(loader)  # the state to restore is not that of a fresh start
    order_state = order.get_state()
    batches = loader.epoch()
    for _ in range(skip):
        next(batches)
    augment_state = augment.get_state()
    expected = [(x.clone(), y.clone()) for x, y in batches] + rest_of_pass(loader)
    assert len(expected) == 14 - skip

    order, augment = generator(0), generator(0)
    order.set_state(order_state)
    augment.set_state(augment_state)
    resumed = Loader(split, 4, train=True, flip=True, order=order, augment=augment)
    got = rest_of_pass(resumed, skip) + rest_of_pass(resumed)
    assert len(got) == len(expected)
    for (x, y), (x_expected, y_expected) in zip(got, expected, strict=True):
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


def test_order_is_drawn_when_the_pass_starts_and_augmentation_batch_by_batch() -> None:
    order, augment = generator(0), generator(1)
    loader = Loader(make_split(12), 4, train=True, order=order, augment=augment)
    states = [order.get_state()], [augment.get_state()]

    def record() -> list[bool]:
        states[0].append(order.get_state())
        states[1].append(augment.get_state())
        return [not torch.equal(of[-1], of[-2]) for of in states]

    batches = loader.epoch()
    assert record() == [True, False]
    next(batches)
    assert record() == [False, True]
    next(batches)
    assert record() == [False, True]


def test_without_generators_torchs_own_seed_repeats_a_pass() -> None:
    loader = Loader(make_split(12), 4, train=True, flip=True)
    passes = []
    for _ in range(2):
        torch.manual_seed(5)
        passes.append(torch.cat([x for x, _ in loader]))
    assert torch.equal(*passes)


def test_batch_larger_than_the_data_is_refused_in_training_alone() -> None:
    with pytest.raises(InputError, match="13 training images, more than the 12 that"):
        Loader(make_split(12), 13, train=True)
    assert len(Loader(make_split(12), 12, train=True)) == 1
    assert [len(y) for _, y in Loader(make_split(12), 13, train=False)] == [12]


@pytest.mark.parametrize(("batch_size", "pad"), [(0, 2), (-1, 2), (4, -1)])
def test_batch_size_below_one_and_negative_padding_are_refused(batch_size: int, pad: int) -> None:
    with pytest.raises(InputError, match=f"batch size {batch_size} with padding {pad}"):
        Loader(make_split(12), batch_size, train=True, pad=pad)


@pytest.mark.parametrize("skip", [0, 2])
def test_shards_of_a_training_pass_make_the_batches_that_one_process_sees(skip: int) -> None:
    def loader(shard: Shard) -> Loader:
        seeds = {"order": generator(3), "augment": generator(4)}
        return Loader(make_split(41), 6, train=True, flip=True, shard=shard, **seeds)

    whole = list(loader(Shard(0, 1)).epoch(skip))
    parts = [list(loader(Shard(rank, 3)).epoch(skip)) for rank in range(3)]
    assert len(whole) == 6 - skip
    for (x, y), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([part for part, _ in shares]), x)
        assert torch.equal(torch.cat([part for _, part in shares]), y)


@pytest.mark.parametrize("n", [1, 12, 13, 41])
def test_shards_of_a_measured_split_are_its_batches_each_once(n: int) -> None:
    split = make_split(n)
    whole = list(Loader(split, 4, train=False))
    seen = []
    for rank in range(3):
        part = Loader(split, 4, train=False, shard=Shard(rank, 3))
        batches = list(part)
        assert len(part) == len(batches)
        seen += [(rank + 3 * i, *batch) for i, batch in enumerate(batches)]
    assert [number for number, *_ in sorted(seen, key=lambda b: b[0])] == list(range(len(whole)))
    for number, x, y in seen:
        assert torch.equal(x, whole[number][0])
        assert torch.equal(y, whole[number][1])


def test_batch_that_the_ranks_cannot_share_equally_is_refused() -> None:
    with pytest.raises(InputError, match=r"--batch-size 8 .* a multiple of 3"):
        Loader(make_split(12), 8, train=True, shard=Shard(0, 3))


@pytest.mark.gpu
def test_batches_on_cuda_never_wait_for_the_device() -> None:
    split = make_split(64)
    augment = torch.Generator("cuda").manual_seed(0)
    loader = Loader(split, 8, device="cuda", train=True, pad=0, order=generator(2), augment=augment)
    on_cpu = Loader(split, 8, train=True, pad=0, order=generator(2))
    moving = Loader(split, 8, device="cuda", train=True, flip=True, augment=augment)
    assert next(iter(moving))[0].is_cuda
    batches, moved = loader.epoch(), moving.epoch()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(batches)
        assert len(list(moved)) == 8
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (x_expected, y_expected) in zip(got, on_cpu, strict=True):
        assert torch.equal(x.cpu(), x_expected)
        assert torch.equal(y.cpu(), y_expected)
