"""Algorithm 1, the schedule and the state of a training, against straight-line versions."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from fastiat import data, kernels, models
from fastiat.attack import count_errors, pgd
from fastiat.config import TrainConfig, modern, paper
from fastiat.mix import Mix, MixPoints
from fastiat.runs.weights import pack_state, read_state
from fastiat.system.errors import InputError
from fastiat.train import Trainer, algorithm1
from fastiat.training.optimise import learning_rate


def _network():
    torch.manual_seed(0)
    return models.build("preact18", 4, 1, 8, width=2).double().train()


def _mixed_forward(model, x, mix):
    """The pass of a network of fastiat, mixed at one of its three points, written out."""
    lam = mix.lam.double().view(-1, 1, 1, 1)

    def mixed_at(layer, h):
        return lam * h + (1 - lam) * h[mix.perm] if layer == mix.layer else h

    x = model.stem(mixed_at(0, kernels.standardize(x)))
    for number, group in enumerate(model.groups, start=1):
        x = mixed_at(number, group(x))
    return model.head(x)


def _straight_line(model, x, y, mixes, clean_weight, attack=True):
    """Algorithm 1 of the paper for PGD-3 with BatchNorm in eval mode, written out."""

    def loss(x, mix):
        if mix is None:
            return F.cross_entropy(model(x), y)
        logits, lam = _mixed_forward(model, x, mix), mix.lam.double()
        own = F.cross_entropy(logits, y, reduction="none")
        other = F.cross_entropy(logits, y[mix.perm], reduction="none")
        return (lam * own + (1 - lam) * other).mean()

    clean = loss(x, mixes[0])
    if not attack:
        return clean
    model.eval()
    x_adv = x
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + 0.02 * grad.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - 0.05), x + 0.05).clamp(0, 1)
    model.train()
    return clean_weight * clean + (1 - clean_weight) * loss(x_adv, mixes[1])


def _mixes(kind):
    if kind == "none":
        return [None, None]
    first = Mix(0, torch.tensor([2, 0, 1, 4, 5, 3]), torch.tensor(0.3))
    lam = torch.tensor([0.1, 0.4, 0.5, 0.9, 1.0, 0.0])
    return [first, Mix(2, torch.tensor([5, 4, 3, 2, 1, 0]), lam)]


@pytest.mark.parametrize("kind", ["none", "manifold"])
@pytest.mark.parametrize("clean_weight", [0.5, 0.2])
@pytest.mark.parametrize("attack", [True, False])
def test_algorithm_1_has_the_gradient_of_its_straight_line_version(kind, clean_weight, attack):
    model = _network()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    mixes = _mixes(kind)
    reference = copy.deepcopy(model)
    expected = _straight_line(reference, x, y, mixes, clean_weight, attack)
    expected.backward()

    def pgd3(x, y):
        return pgd(model, x, y, eps=0.05, alpha=0.02, steps=3, random_start=False)

    drawn = iter(mixes)
    update = algorithm1(
        model,
        x,
        y,
        pgd3 if attack else None,
        lambda: next(drawn),
        MixPoints(model),
        clean_weight=clean_weight,
    )
    weight = clean_weight if attack else 1
    total = weight * update.clean_loss + (1 - weight) * update.adv_loss
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=1e-12)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)
    for p, q in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_shared_mix_draws_once_and_pixel_mixing_mixes_before_standardisation():
    model, x, y = _network(), torch.rand(6, 1, 8, 8).double(), torch.arange(6) % 4
    mix, draws = _mixes("manifold")[0], []

    def draw():
        draws.append(mix)
        return mix

    algorithm1(model, x, y, lambda x, y: x, draw, MixPoints(model), shared_mix=True)
    assert len(draws) == 1
    model = _network()
    update = algorithm1(model, x, y, None, draw, MixPoints(model, pixels=True))
    lam = mix.lam.double()
    logits = model(lam * x + (1 - lam) * x[mix.perm])
    expected = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[mix.perm])
    torch.testing.assert_close(update.clean_loss, expected.detach())


@pytest.mark.parametrize(("epochs", "drops"), [(200, (100, 150)), (8, (4, 6)), (3, (1.5, 2.25))])
def test_step_schedule_drops_tenfold_at_half_and_three_quarters(epochs, drops):
    config, per_epoch = replace(paper(), epochs=epochs), 40
    for step in range(epochs * per_epoch):
        expected = 0.1 * 0.1 ** sum(step >= drop * per_epoch for drop in drops)
        assert learning_rate(config, step, per_epoch) == pytest.approx(expected)


def test_cosine_schedule_warms_up_and_ends_near_zero_without_a_jump():
    config = replace(modern(), epochs=10)
    rates = [learning_rate(config, step, 100) for step in range(1000)]
    assert max(rates) == pytest.approx(config.lr, rel=0.02)
    assert rates.index(max(rates)) == pytest.approx(100, abs=2)
    assert rates[0] < 0.02 * config.lr and 0 < rates[-1] < 1e-4 * config.lr
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.02 * config.lr
    assert rates[550] == pytest.approx(config.lr * (1 + math.cos(math.pi / 2)) / 2, rel=1e-6)


TINY = TrainConfig(
    dataset="digits", arch="mlp6", width=16, epochs=2, device="cpu", precision="fp32", eval_limit=50
)


def test_update_is_nesterov_sgd_with_decay_on_all_parameters():
    config = replace(TINY, adv="none", mix="none", lr=0.05, weight_decay=0.01)
    trainer = Trainer(config, data.load("digits"))
    reference = copy.deepcopy(trainer.model)
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for _, (images, y) in zip(range(3), trainer.loader, strict=False):
        reference.zero_grad()
        F.cross_entropy(reference(models.to_pixels(images)), y).backward()
        with torch.no_grad():
            for p, v in zip(reference.parameters(), velocity, strict=True):
                gradient = p.grad + 0.01 * p
                v.mul_(0.9).add_(gradient)
                p -= 0.05 * (gradient + 0.9 * v)
        trainer.update(images, y)
        for p, q in zip(trainer.model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_biases_and_norms_are_spared_decay_when_asked():
    groups = Trainer(replace(TINY, decay_norm=False), data.load("digits")).optimizer.param_groups
    decayed, spared = groups
    assert {p.dim() for p in decayed["params"]} == {2} and decayed["weight_decay"] == 1e-4
    assert {p.dim() for p in spared["params"]} == {1} and spared["weight_decay"] == 0


def test_average_is_the_exponential_moving_average_of_weights_and_buffers():
    config = replace(TINY, arch="preact18", width=2, ema=0.6, adv="none", lr=0.01)
    trainer = Trainer(config, data.load("digits"))
    expected = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    for step, (images, y) in zip(range(1, 9), trainer.loader, strict=False):
        trainer.update(images, y)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in trainer.model.state_dict().items():
            mean = decay * expected[name] + (1 - decay) * value
            expected[name] = mean if value.is_floating_point() else value.clone()
    for name, value in trainer.average.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert trainer.eval_model is trainer.average
    assert not any(p.requires_grad for p in trainer.average.parameters())


@pytest.mark.parametrize("adv", ["none", "fgsm", "pgd"])
@pytest.mark.parametrize("mix", ["none", "mixup", "manifold"])
def test_state_taken_mid_epoch_repeats_the_rest_bit_for_bit(adv, mix, tmp_path):
    config = replace(TINY, adv=adv, mix=mix, steps=2, ema=0.9)
    dataset = data.load("digits")
    whole, first = Trainer(config, dataset), Trainer(config, dataset)
    for _ in range(2):
        list(whole.epoch_updates())
    updates = first.epoch_updates()
    for _ in range(7):
        next(updates)
    (tmp_path / "state").write_bytes(pack_state(first.state_dict()))
    second = Trainer(config, dataset)
    second.load_state_dict(read_state(tmp_path / "state"))
    while not second.finished:
        list(second.epoch_updates())
    assert second.step == whole.step == 44
    for name, value in whole.state_dict()["model"].items():
        assert torch.equal(value, second.state_dict()["model"][name]), name
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, second.average.state_dict()[name]), name
    assert torch.equal(whole.totals, second.totals)


def test_training_a_seed_twice_gives_bit_equal_weights_and_another_seed_does_not():
    dataset, weights = data.load("digits"), []
    for seed in (0, 0, 1):
        trainer = Trainer(replace(TINY, seed=seed, steps=2), dataset)
        updates = trainer.epoch_updates()
        for _ in range(3):
            next(updates)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_batches_reach_the_network_channels_last():
    config = replace(TINY, arch="preact18", width=2)
    trainer = Trainer(config, data.load("digits"))
    seen = []
    stem = trainer.model.groups[1]
    stem.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    next(trainer.epoch_updates())
    assert len(seen) == 1 + 7 + 1 and all(seen)


@pytest.mark.slow
def test_a_few_epochs_of_iat_learn_digits_robustly():
    config = TrainConfig(
        dataset="digits", width=8, epochs=8, schedule="cosine", pad=1, device="cpu", steps=3
    )
    trainer = Trainer(config, data.load("digits"))
    while not trainer.finished:
        list(trainer.epoch_updates())
    errors = [
        count_errors(trainer.model, trainer.test, attack)
        for attack in (None, partial(pgd, trainer.model))
    ]
    assert errors[0] <= 0.08 * 360 and errors[1] <= 0.25 * 360


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"holdout": 1437}, "--holdout"), ({"pad": 8}, "--pad"), ({"batch_size": 1438}, "--batch")],
)
def test_settings_that_leave_nothing_to_train_on_are_refused_by_flag(wrong, named):
    with pytest.raises(InputError, match=named):
        Trainer(replace(TINY, **wrong), data.load("digits"))


def test_modern_keeps_out_a_tenth_of_a_small_training_set_and_1000_of_a_large_one():
    digits = data.load("digits")
    config = replace(modern(), dataset="digits", arch="mlp6", width=4, device="cpu")
    trainer = Trainer(config, digits)
    assert (len(trainer.loader.labels), len(trainer.holdout.labels)) == (1437 - 143, 143)
    many = digits.train.take(torch.arange(12_000) % 1437)
    trainer = Trainer(config, replace(digits, train=many))
    assert (len(trainer.loader.labels), len(trainer.holdout.labels)) == (11_000, 1000)
    trainer.validate(row := {})
    assert 0 <= row["holdout_error_percent"] <= 100
