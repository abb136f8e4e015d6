"""Attacks against torchattacks, foolbox and closed forms, and the promises in their docstrings."""

import foolbox
import pytest
import torch
import torchattacks
from torch import nn
from torch.nn import functional as F

from fastiat import data, models
from fastiat.attack import PGD, attack_loss, attack_mode, count_errors, fgsm, input_gradient, pgd
from fastiat.engine import graphs
from fastiat.system.errors import InputError

EPS, ALPHA = 8 / 255, 2 / 255


@pytest.fixture(scope="module")
def model():
    """A slim network whose BatchNorm layers have seen the digits."""
    torch.manual_seed(0)
    model = models.build("preact18", 10, 1, 8, width=4)
    x, y = _digits(256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def _digits(count):
    split = data.load("digits").train
    images = split.images[:count].permute(0, 3, 1, 2)
    return models.to_pixels(images), split.labels[:count]


def _assert_same(ours, theirs, model, x, y):
    """Equal to 1e-6, but for pixels where the sign of the gradient is a matter of rounding."""
    exact = input_gradient(_copy(model).double(), x.double(), y)
    vanishing = exact.abs() < 1e-5 * exact.abs().amax((1, 2, 3), keepdim=True)
    differs = (ours - theirs).abs() > 1e-6
    assert not (differs & ~vanishing).any()
    assert vanishing.float().mean() < 0.05


def _copy(model):
    copied = models.build("preact18", 10, 1, 8, width=4).eval()
    copied.load_state_dict(model.state_dict())
    return copied


def test_fgsm_gives_the_examples_of_torchattacks(model):
    x, y = _digits(32)
    _assert_same(fgsm(model, x, y, eps=EPS), torchattacks.FGSM(model, eps=EPS)(x, y), model, x, y)


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_pgd_gives_the_examples_of_torchattacks(model, steps):
    x, y = _digits(32)
    theirs = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=steps, random_start=False)(x, y)
    ours = pgd(model, x, y, eps=EPS, alpha=ALPHA, steps=steps, random_start=False)
    _assert_same(ours, theirs, model, x, y)


def test_l2_pgd_gives_the_examples_of_torchattacks(model):
    x, y = _digits(32)
    attack = torchattacks.PGDL2(model, eps=0.7, alpha=0.2, steps=7, random_start=False)
    ours = pgd(model, x, y, eps=0.7, alpha=0.2, random_start=False, norm="l2")
    torch.testing.assert_close(ours, attack(x, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_gives_the_examples_of_foolbox(model, norm):
    x, y = _digits(32)
    attack = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    eps, alpha = {"linf": (EPS, ALPHA), "l2": (0.7, 0.2)}[norm]
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    theirs, _, _ = attack(abs_stepsize=alpha, steps=7, random_start=False)(
        wrapped, x, y, epsilons=eps
    )
    ours = pgd(model, x, y, eps=eps, alpha=alpha, random_start=False, norm=norm)
    if norm == "l2":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    else:
        _assert_same(ours, theirs, model, x, y)


def test_pgd_reaches_the_worst_point_of_a_linear_model():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x, y = torch.rand(6, 3, 2, 2) * 0.5 + 0.25, torch.tensor([0, 1, 0, 1, 0, 1])
    weight = linear[1].weight.detach()
    ascent = torch.where(y[:, None] == 0, weight[1] - weight[0], weight[0] - weight[1])
    ascent = ascent.view_as(x)
    worst = pgd(linear, x, y, eps=0.1, alpha=0.03, steps=10)
    torch.testing.assert_close(worst, x + 0.1 * ascent.sign())
    worst = pgd(linear, x, y, eps=0.1, alpha=0.03, steps=40, norm="l2", loss="margin")
    unit = ascent / ascent.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(worst, x + 0.1 * unit, atol=1e-4, rtol=0)


def test_random_start_fills_the_ball_uniformly():
    x = torch.full((4000, 1, 3, 1), 0.5)
    still = dict(alpha=0.0, steps=1, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    y = torch.zeros(4000, dtype=torch.int64)
    box = (pgd(model, x, y, eps=0.2, **still) - x).flatten() / 0.2
    assert abs(box.mean()) < 0.03 and abs(box.var() - 1 / 3) < 0.02
    ball = (pgd(model, x, y, eps=0.2, norm="l2", **still) - x).flatten(1) / 0.2
    # In three dimensions the cube of the radius of a uniform point is uniform in [0, 1].
    cubes = ball.norm(dim=1) ** 3
    assert abs(cubes.mean() - 0.5) < 0.03 and abs(cubes.var() - 1 / 12) < 0.01
    assert ball.mean(0).abs().max() < 0.03


def test_attack_loss_is_cross_entropy_or_the_carlini_wagner_margin():
    logits = torch.tensor([[2.0, 5.0, 1.0], [3.0, 0.0, 2.5]])
    y = torch.tensor([1, 2])
    assert attack_loss(logits, y, "margin").tolist() == [2.0 - 5.0, 3.0 - 2.5]
    expected = [
        F.cross_entropy(row[None], label[None]).item() for row, label in zip(logits, y, strict=True)
    ]
    assert attack_loss(logits, y, "ce").tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_more_restarts_never_fool_fewer(model, loss):
    x, y = _digits(128)
    fooled = []
    for restarts in (1, 2, 5):
        generator = torch.Generator().manual_seed(0)
        x_adv = pgd(
            model, x, y, eps=EPS, alpha=ALPHA, steps=2, restarts=restarts, loss=loss,
            generator=generator,
        )  # fmt: skip
        fooled.append(model(x_adv).argmax(1) != y)
    # Every image fooled with fewer restarts stays fooled: the first starts are the same.
    assert (fooled[1] >= fooled[0]).all() and (fooled[2] >= fooled[1]).all()


def test_restarts_keep_the_worst_start_of_each_image(model):
    x, y = _digits(64)
    settings = {"eps": EPS, "alpha": ALPHA, "steps": 2}
    generator = torch.Generator().manual_seed(3)
    tries = torch.stack([pgd(model, x, y, generator=generator, **settings) for _ in range(3)])
    with torch.no_grad():
        logits = torch.stack([model(x_adv) for x_adv in tries])
    heights = torch.stack([F.cross_entropy(row, y, reduction="none") for row in logits])
    heights += 1000 * (logits.argmax(2) != y)
    expected = tries[heights.argmax(0), torch.arange(len(x))]
    generator.manual_seed(3)
    kept = pgd(model, x, y, restarts=3, generator=generator, **settings)
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)


@pytest.mark.parametrize("bn", ["eval", "batch", "update"])
def test_attack_leaves_no_gradient_and_restores_every_flag(model, bn):
    model = _copy(model).train()
    model.groups[1].eval()
    before = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    x, y = _digits(16)
    pgd(model, x, y, bn=bn, steps=2)
    after = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    assert before == after
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    moved = [n for n, value in model.named_buffers() if not torch.equal(value, buffers[n])]
    assert bool(moved) == (bn == "update")
    if bn == "update":
        assert int(model.groups[0][0].bn1.num_batches_tracked) == 12 + 2


def test_flags_are_restored_after_an_error_too(model):
    model = _copy(model).train()
    with pytest.raises(RuntimeError), attack_mode(model, "batch"):
        assert not model.training and model.groups[0][0].bn1.training
        raise RuntimeError
    assert all(m.training for m in model.modules())
    assert all(m.track_running_stats for m in models.normalisation_layers(model))


def test_margin_has_the_gradient_of_its_definition():
    logits = torch.randn(40, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randint(7, (40,))
    (grad,) = torch.autograd.grad(attack_loss(logits, y, "margin").sum(), logits)
    expected = torch.zeros_like(logits)
    for row, label in enumerate(y.tolist()):
        others = [k for k in range(7) if k != label]
        expected[row, max(others, key=lambda k: logits[row, k].item())] = 1
        expected[row, label] = -1
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attack_is_the_same_without_gradients_and_in_inference_mode(model, norm):
    x, y = _digits(8)
    attack = PGD(model, engine="compile", norm=norm, eps=0.3, alpha=0.1, random_start=False)
    expected = attack(x, y)
    with torch.no_grad():
        assert torch.equal(attack(x, y), expected)
    with torch.inference_mode():
        made_here = x.clone(), y.clone()
        assert torch.equal(attack(x, y), expected)
        assert torch.equal(attack(*made_here), expected)
    assert torch.equal(attack(*made_here), expected)


def test_bn_modes_normalise_by_running_or_batch_statistics(model):
    x, y = _digits(16)
    with attack_mode(model, "batch"):
        batch = model(x)
    torch.testing.assert_close(batch, _copy(model).train()(x))
    examples = {bn: pgd(_copy(model), x, y, random_start=False, bn=bn) for bn in ("eval", "batch")}
    assert not torch.equal(examples["eval"], examples["batch"])
    torch.testing.assert_close(
        examples["batch"], pgd(_copy(model), x, y, random_start=False, bn="update")
    )


def test_dropout_is_off_during_an_attack():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 10)).train()
    x, y = _digits(8)
    first, second = (pgd(model, x, y, random_start=False, bn="update") for _ in range(2))
    assert torch.equal(first, second) and model[1].training


def test_a_nan_gradient_moves_nothing_and_spoils_no_other_image():
    class Broken(nn.Module):
        def forward(self, x):
            poison = torch.where(torch.arange(len(x)) == 0, torch.nan, 1.0)
            return x.flatten(1)[:, :4] * poison[:, None]

    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])
    for norm in ("linf", "l2"):
        x_adv = pgd(Broken(), x, y, random_start=False, norm=norm)
        assert torch.equal(x_adv[0], x[0]) and x_adv.isfinite().all()
        assert not torch.equal(x_adv[1:], x[1:])


def test_memory_format_and_dtype_are_kept(model):
    x, y = _digits(4)
    x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    wide = models.build("preact18", 10, 3, 8, width=2).eval()
    x_adv = pgd(wide, x, y, steps=1)
    assert x_adv.is_contiguous(memory_format=torch.channels_last) and x_adv.dtype == x.dtype
    x_adv = pgd(wide.double(), x.double(), y, steps=1)
    assert x_adv.dtype == torch.float64


def test_works_under_no_grad_and_on_a_plain_function():
    x, y = _digits(4)
    with torch.no_grad():
        x_adv = pgd(lambda x: x.flatten(1)[:, :10], x, y)
    assert not x_adv.requires_grad and not torch.equal(x_adv, x)


def test_pgd_object_is_the_function_with_its_settings_fixed(model):
    x, y = _digits(8)
    first = PGD(model, eps=EPS, steps=3, generator=torch.Generator().manual_seed(1))(x, y)
    second = pgd(model, x, y, eps=EPS, steps=3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("spelling", "norm"), [("L2", "l2"), ("L_inf", "linf")])
def test_other_spellings_of_a_norm_mean_it(model, spelling, norm):
    x, y = _digits(4)
    expected = pgd(model, x, y, norm=norm, random_start=False)
    assert torch.equal(pgd(model, x, y, norm=spelling, random_start=False), expected)
    assert torch.equal(PGD(model, norm=spelling, random_start=False)(x, y), expected)
    steep = fgsm(model, x, y, norm=norm)
    assert torch.equal(fgsm(model, x, y, norm=spelling), steep)


def test_count_errors_counts_after_the_attack_and_restores_the_mode(model):
    split = data.load("digits").test
    loader = data.Loader(split, 100, train=False)
    model = _copy(model).train()
    clean = count_errors(model, loader)
    attacked = count_errors(model, loader, lambda x, y: fgsm(model, x, y, eps=0.2))
    assert model.training
    x = models.to_pixels(split.images.permute(0, 3, 1, 2))
    assert clean == int((model.eval()(x).argmax(1) != split.labels).sum())
    assert clean < attacked <= len(split)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"eps": -0.1}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"alpha": float("inf")}, "alpha"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"restarts": 2, "random_start": False}, "restarts"),
        ({"norm": "l1"}, "norm"),
        ({"loss": "dlr"}, "loss"),
        ({"bn": "train"}, "bn"),
        ({"clip": (1.0, 0.0)}, "clip"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, named):
    x, y = _digits(2)
    with pytest.raises(InputError, match=named):
        pgd(nn.Flatten(), x, y, **wrong)
    with pytest.raises(InputError, match=named):
        PGD(nn.Flatten(), **wrong)


def test_wrong_tensors_are_refused():
    x, y = _digits(2)
    with pytest.raises(TypeError, match="uint8"):
        pgd(nn.Flatten(), (x * 255).byte(), y)
    with pytest.raises(TypeError, match="ndarray"):
        pgd(nn.Flatten(), x.numpy(), y)
    for wrong in (y.float(), y.int(), y.tolist()):
        with pytest.raises(TypeError, match="int64"):
            pgd(nn.Flatten(), x, wrong)
        with pytest.raises(TypeError, match="int64"):
            attack_loss(x.flatten(1), wrong, "margin")
    with pytest.raises(InputError, match="give"):
        pgd(nn.Flatten(), x, y[:1])
    with pytest.raises(InputError, match="one label for each of the 2"):
        attack_loss(x.flatten(1), y[:, None], "margin")
    with pytest.raises(TypeError, match="epsilon"):
        PGD(nn.Flatten(), epsilon=0.1)


@pytest.mark.parametrize("label", [3, -1, -100, 2**62, -(2**63)])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_a_label_that_names_no_class_is_refused(label, loss, engine, monkeypatch):
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(2, 3, 2, 2)
    y = torch.tensor([0, label])
    for attack in (PGD(model, engine=engine, loss=loss), lambda x, y: pgd(model, x, y, loss=loss)):
        with pytest.raises(InputError, match="0 to 2") as error:
            attack(x, y)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="0 to 2"):
        fgsm(model, x, y, loss=loss)
    with pytest.raises(InputError, match="0 to 2"):
        attack_loss(model(x), y, loss)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_logits_that_predict_no_class_are_errors_whatever_the_label(value):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    nn.init.constant_(model[1].bias, value)
    images, y = torch.randint(256, (20, 3, 2, 2), dtype=torch.uint8), torch.arange(20) % 10
    assert count_errors(model, [(images, y)]) == 20
    assert count_errors(model, [(images, y)], lambda x, y: pgd(model, x, y, restarts=2)) == 20


@pytest.mark.parametrize("arch", ["preact18", "wrn28_10", "mlp6"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_networks_memory_format_does_not_show_in_outputs_and_gradients(arch, channels):
    network = models.build(arch, 10, channels, 8, width=1).eval()
    network = network.to(memory_format=torch.channels_last)
    x = torch.rand(2, channels, 8, 8, requires_grad=True)
    logits = network(x)
    (grad,) = torch.autograd.grad(logits.sum(), x)
    assert logits.is_contiguous() and grad.is_contiguous()
    assert torch.func.grad(lambda x: network(x).sum())(x.detach()).is_contiguous()
    assert pgd(network, x, torch.tensor([0, 1])).is_contiguous()


@pytest.mark.parametrize("name", ["PGDL2", "FAB", "Square"])
def test_a_splits_pixels_are_what_attack_libraries_take(model, name):
    network = _copy(model).to(memory_format=torch.channels_last)
    x, y = data.load("digits").test.pixels(8)
    y = network(x).argmax(1)
    options = {"n_queries": 5} if name == "Square" else {"steps": 2}
    x_adv = getattr(torchattacks, name)(network, **options)(x, y)
    assert x_adv.shape == x.shape and (name == "Square" or not torch.equal(x_adv, x))


def test_targeted_pgd_gives_the_examples_of_torchattacks(model):
    x, y = _digits(32)
    target = (y + 3) % 10
    theirs = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=5, random_start=False)
    theirs.set_mode_targeted_by_label(quiet=True)
    ours = pgd(model, x, y, eps=EPS, alpha=ALPHA, steps=5, random_start=False, target=target)
    _assert_same(ours, theirs(x, target), model, x, target)
    step = fgsm(model, x, y, eps=EPS, target=target)
    grad = input_gradient(model, x, target)
    _assert_same(step, (x - EPS * grad.sign()).clamp(0, 1), model, x, target)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_pgd_makes_the_target_likely_and_restarts_make_it_likelier(model, norm):
    x, y = _digits(64)
    target = (y + 1) % 10
    settings = {"eps": 0.3 if norm == "linf" else 2.0, "alpha": 0.05 if norm == "linf" else 0.4}
    settings |= {"norm": norm, "steps": 6, "target": target}

    def hits(restarts):
        generator = torch.Generator().manual_seed(0)
        x_adv = pgd(model, x, y, restarts=restarts, generator=generator, **settings)
        return model(x_adv).argmax(1) == target

    clean, once, thrice = (model(x).argmax(1) == target).sum(), hits(1), hits(3)
    assert once.sum() > clean + 10
    assert (thrice | ~once).all()  # a success of the first start is kept


def test_the_prepared_attack_takes_targets_too(model):
    x, y = _digits(8)
    target, attack = (y + 1) % 10, PGD(model, engine="eager", random_start=False, eps=EPS)
    expected = pgd(model, x, y, random_start=False, eps=EPS, target=target)
    assert torch.equal(attack(x, y, target), expected)
    assert not torch.equal(attack(x, y), expected)
    with pytest.raises(TypeError, match="PGD has no setting target"):
        PGD(model, target=target)
    with pytest.raises(InputError, match="x has shape"):
        pgd(model, x, y, target=target[:3])
    with pytest.raises(InputError, match="labels run from"):
        pgd(model, x, y, target=y + 10)


@pytest.mark.slow
def test_the_compiled_attack_on_targets_is_the_plain_one(model):
    x, y = _digits(8)
    attack = PGD(model, engine="compile", random_start=False, eps=EPS, alpha=ALPHA, steps=3)
    for target in ((y + 1) % 10, (y + 2) % 10):
        plain = pgd(model, x, y, random_start=False, eps=EPS, alpha=ALPHA, steps=3, target=target)
        torch.testing.assert_close(
            F.cross_entropy(model(attack(x, y, target)), target),
            F.cross_entropy(model(plain), target),
            rtol=1e-3,
            atol=1e-3,
        )
