"""One pass for several attacks: against separate attacks, other libraries and a closed form."""

import re

import foolbox
import pytest
import torch
import torchattacks
from torch import nn

from fastiat import data
from fastiat.attack import Starts, fgsm, pgd, start_in_ball
from fastiat.config import EvaluateConfig
from fastiat.measuring import one_pass as measure
from fastiat.measuring.one_pass import fooled
from fastiat.runs.results import Rate
from fastiat.system.errors import InputError

EPS, ALPHA = 0.1, 0.02


def error_rates(*args, **settings) -> dict[str, Rate]:
    found = fooled(*args, **settings)
    return {name: Rate(int(wrong.sum()), len(wrong)) for name, wrong in found.items()}


def config(**settings) -> EvaluateConfig:
    return EvaluateConfig(**{"device": "cpu", "precision": "fp32", "batch_size": 150} | settings)


@pytest.fixture(scope="module")
def digits() -> data.Split:
    return data.load("digits").test


@pytest.fixture(scope="module")
def pixels(digits) -> torch.Tensor:
    return digits.images.permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small network with BatchNorm that tells digits apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 10),
        )  # fmt: skip
        train = data.load("digits").train
        x, y = train.images.permute(0, 3, 1, 2) / 255, train.labels
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


class Recorder(nn.Module):
    """Keeps the examples that it is only asked to judge."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.judged = model, []

    def forward(self, x):
        if not torch.is_grad_enabled():
            self.judged.append(x.clone())
        return self.model(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_one_pass_judges_the_examples_of_separate_attacks_bit_for_bit(
    model, digits, pixels, norm, loss
):
    eps, alpha = (EPS, ALPHA) if norm == "linf" else (1.0, 0.3)
    recorder = Recorder(model)
    names = ("pgd-9", "none", "pgd-2", "fgsm", "pgd-5")
    settings = config(norm=norm, attack_loss=loss, seed=3)
    found = fooled(recorder, digits, names, eps=eps, alpha=alpha, config=settings)
    generators = [Starts(3, "cpu") for _ in range(3)]
    truth, wrong = [], {name: [] for name in names}
    for first, x, y in zip((0, 150, 300), pixels.split(150), digits.labels.split(150), strict=True):
        for generator in generators:
            generator.batch(first)
        examples = {"none": x, "fgsm": fgsm(model, x, y, eps=eps, norm=norm, loss=loss)}
        for steps, generator in zip((2, 5, 9), generators, strict=True):
            examples[f"pgd-{steps}"] = pgd(
                model, x, y, eps=eps, alpha=alpha, steps=steps, norm=norm, loss=loss,
                generator=generator,
            )  # fmt: skip
        truth += examples.values()
        for name, x_adv in examples.items():
            wrong[name].append(model(x_adv).argmax(1) != y)
    assert len(recorder.judged) == len(truth) == 15
    assert all(map(torch.equal, recorder.judged, truth))
    assert {name: found[name].tolist() for name in names} == {
        name: torch.cat(parts).tolist() for name, parts in wrong.items()
    }
    assert 0 < found["none"].sum() < found["pgd-2"].sum() < found["pgd-9"].sum() < len(digits)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("batch_size", [1, 7, 150, 360])
def test_the_starts_are_those_of_one_attack_on_all_images_whatever_the_batch_size(
    model, digits, pixels, norm, batch_size
):
    recorder, generator = Recorder(model), torch.Generator().manual_seed(3)
    settings = config(norm=norm, seed=3, batch_size=batch_size, restarts=2)
    # Steps of no length leave an example at its start.
    fooled(recorder, digits, ("pgd-1",), eps=EPS, alpha=0.0, config=settings, worst=False)
    first = start_in_ball(pixels, EPS, norm, (0.0, 1.0), generator)
    wrong = model(first).argmax(1) != digits.labels
    second = start_in_ball(pixels, EPS, norm, (0.0, 1.0), generator)[~wrong]
    expected, seen = [], torch.cat(recorder.judged)
    for part in torch.arange(len(pixels)).split(batch_size):
        expected += [first[part], second[(~wrong[: part[0]]).sum() :][: (~wrong[part]).sum()]]
    torch.testing.assert_close(seen, torch.cat(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_errors_do_not_depend_on_the_batch_size(model, digits, norm):
    eps, alpha = (EPS, ALPHA) if norm == "linf" else (1.0, 0.3)
    names = ("none", "fgsm", "pgd-3")
    found = [
        error_rates(
            model, digits, names, eps=eps, alpha=alpha,
            config=config(norm=norm, restarts=2, batch_size=size),
        )
        for size in (None, 11, 360)
    ]  # fmt: skip
    # Rounding may turn an image that lies on the border.
    for name in names:
        errors = [rates[name].errors for rates in found]
        assert max(errors) - min(errors) <= 1


def test_a_batch_has_no_more_images_than_an_update_or_than_large_images_allow():
    assert [measure.default_batch(32, n) for n in (1, 64, 4096)] == [1, 64, 500]
    assert [measure.default_batch(side) for side in (8, 32, 64, 224, 4096)] == [500, 256, 64, 5, 1]


def test_restarts_keep_each_images_worst_for_every_number_of_steps(model, digits, pixels):
    names = ("pgd-1", "pgd-4")
    settings = config(restarts=3, batch_size=360)
    found = error_rates(model, digits, names, eps=EPS, alpha=ALPHA, config=settings)
    once = error_rates(model, digits, names, eps=EPS, alpha=ALPHA, config=config(batch_size=360))
    for steps in (1, 4):
        x_adv = pgd(
            model, pixels, digits.labels, eps=EPS, alpha=ALPHA, steps=steps, restarts=3,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        errors = int((model(x_adv).argmax(1) != digits.labels).sum())
        assert found[f"pgd-{steps}"].errors == errors > once[f"pgd-{steps}"].errors


def test_an_image_fooled_once_stays_fooled_through_later_restarts():
    class Turning(nn.Module):
        """Judges wrongly after one step from the first start and two from the second."""

        verdicts = iter([1, 0, 0, 1])

        def forward(self, x):
            score = x.mean((1, 2, 3)) * 0
            if not torch.is_grad_enabled():
                score = score + next(self.verdicts)
            return torch.stack([score * 0 + 0.5, score], 1)

    split = data.Split(torch.zeros(3, 8, 8, 1, dtype=torch.uint8), torch.zeros(3).long())
    names = ("pgd-1", "pgd-2")
    found = fooled(Turning(), split, names, eps=EPS, alpha=ALPHA, config=config(restarts=2))
    assert found["pgd-1"].all() and found["pgd-2"].all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_worst_case_is_the_union_and_attacks_nobody_twice(model, digits, norm):
    eps, alpha = (EPS, ALPHA) if norm == "linf" else (1.0, 0.3)
    names, settings = ("fgsm", "pgd-1", "pgd-6"), config(norm=norm, restarts=2)
    recorder = Recorder(model)
    worst = fooled(recorder, digits, names, eps=eps, alpha=alpha, config=settings, worst=True)
    alone = [
        fooled(model, digits, (name,), eps=eps, alpha=alpha, config=settings)[name]
        for name in ("none", *names)
    ]
    assert torch.equal(torch.stack([*worst.values()]).any(0), torch.stack(alone).any(0))
    assert torch.stack([*worst.values()]).sum(0).max() == 1
    assert torch.equal(worst["none"], alone[0])
    judged = sum(map(len, recorder.judged))
    assert judged < 0.9 * len(digits) * (2 + 2 * 2)


def test_when_all_are_fooled_nothing_is_attacked(digits):
    class Wrong(nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            return nn.functional.one_hot((digits.labels + 1) % 10, 10).float()[: len(x)]

    settings = config(restarts=2, batch_size=360)
    names = ("fgsm", "pgd-3")
    found = fooled(Wrong(), digits, names, eps=EPS, alpha=ALPHA, config=settings, worst=True)
    assert found["none"].all() and not (found["fgsm"] | found["pgd-3"]).any()


def test_a_radius_of_zero_leaves_the_clean_error(model, digits):
    names = ("none", "fgsm", "pgd-2")
    for norm in ("linf", "l2"):
        rates = error_rates(model, digits, names, eps=0, alpha=ALPHA, config=config(norm=norm))
        assert len({rate.errors for rate in rates.values()}) == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_errors_of_other_libraries_pgd(model, digits, pixels, norm):
    x, y, steps = pixels, digits.labels, 10
    eps, alpha = (EPS, ALPHA) if norm == "linf" else (1.0, 0.3)
    settings = config(norm=norm, random_start=False)
    errors = error_rates(model, digits, ("pgd-10",), eps=eps, alpha=alpha, config=settings)
    if norm == "linf":
        theirs = torchattacks.PGD(model, eps, alpha, steps, random_start=False)(x, y)
        attack = foolbox.attacks.LinfPGD
    else:
        theirs = torchattacks.PGDL2(model, eps, alpha, steps, random_start=False)(x, y)
        attack = foolbox.attacks.L2PGD
    wrapped = foolbox.PyTorchModel(model, (0, 1), device="cpu")
    run = attack(abs_stepsize=alpha, steps=steps, random_start=False)
    _, foolboxs, _ = run(wrapped, x, y, epsilons=eps)
    for x_adv in (theirs, foolboxs):
        # Not every library rounds alike.
        assert abs(errors["pgd-10"].errors - int((model(x_adv).argmax(1) != y).sum())) <= 1
    assert errors["pgd-10"].errors > 100


def test_a_linear_models_error_is_the_closed_form():
    """Two classes, scores w x and 0: PGD reaches a loss of eps |w|_1 (L2: eps |w|_2) in margin."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, generator=generator)
    # Grey images, so that nothing is clipped within the ball.
    images = torch.randint(100, 156, (400, 8, 8, 1), generator=generator, dtype=torch.uint8)
    score = (images.view(400, 64).double() / 255) @ w.double()
    bias = -float(score.mean())
    labels = (score + bias > 0).long()
    split = data.Split(images, labels)

    class Linear(nn.Module):
        def forward(self, x):
            score = x.flatten(1) @ w + bias
            return torch.stack([torch.zeros_like(score), score], 1)

    for norm, dual in (("linf", w.abs().sum()), ("l2", w.norm())):
        eps = float(0.2 * score.std() / dual)
        settings = config(norm=norm, batch_size=400)
        rates = error_rates(
            Linear(), split, ("fgsm", "pgd-20"), eps=eps, alpha=eps / 4, config=settings
        )
        truth = int(((score + bias).abs() < eps * float(dual)).sum())
        assert 20 < truth < 200
        assert abs(rates["fgsm"].errors - truth) <= 1 and abs(rates["pgd-20"].errors - truth) <= 1


def test_progress_is_shown_within_a_batch(model, digits, monkeypatch, capsys):
    monkeypatch.setattr("fastiat.system.progress.PLAIN_EVERY", 0)
    settings = config(batch_size=200, restarts=2)
    fooled(model, digits, ("fgsm", "pgd-5"), eps=EPS, alpha=ALPHA, config=settings)
    shown = re.findall(r"^FGSM, PGD-5: (\d+)/360 images", capsys.readouterr().err, re.MULTILINE)
    shares = [int(200 * step / 10) for step in range(1, 10)]
    assert [abs(int(n) - share) <= 1 for n, share in zip(shown, shares, strict=False)] == [True] * 9
    assert int(shown[9]) == 199 and int(shown[10]) == 200 and int(shown[-1]) <= 360


def test_an_unknown_attack_is_refused(model, digits):
    with pytest.raises(InputError, match="unknown attack 'cw'"):
        fooled(model, digits, ("none", "cw"), eps=EPS, alpha=ALPHA, config=config())


@pytest.mark.parametrize("worst", [False, True])
def test_logits_that_are_no_numbers_are_errors_under_every_attack(digits, worst):
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(broken[1].bias, torch.nan)
    found = fooled(
        broken,
        digits,
        ["none", "fgsm", "pgd-2"],
        eps=EPS,
        alpha=ALPHA,
        config=config(),
        worst=worst,
    )
    union = torch.stack(list(found.values())).any(0)
    assert bool(union.all()) and bool(found["none"].all())
