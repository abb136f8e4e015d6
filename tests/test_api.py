"""`fastiat.fit` and `fastiat.evaluate_model`: the forms of images, the figures, the refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastiat
from fastiat import data
from fastiat.api import as_split
from fastiat.config import EvaluateConfig, TrainConfig
from fastiat.evaluate import evaluate
from fastiat.system.errors import InputError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (40, 8, 8, 3), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.arange(40) % 4
TEST = (IMAGES[:20], LABELS[:20])
FEW = {"epochs": 1, "steps": 1, "batch_size": 10, "lr": 0.01, "device": "cpu", "precision": "fp32"}


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, num_classes: int = 4, in_channels: int = 3) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.layer2 = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer1(x)))


class Pictures:
    """A map-style data set of PIL images, or of what `turn` makes of them."""

    classes = ("a", "b", "c", "d")

    def __init__(self, turn=lambda picture: picture) -> None:
        self.turn = turn

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int):
        return self.turn(Image.fromarray(IMAGES[index].numpy())), int(LABELS[index])


def _net(**options) -> Net:
    torch.manual_seed(0)
    return Net(**options)


FORMS = {
    "split": data.Split(IMAGES, LABELS),
    "uint8 NHWC": (IMAGES, LABELS),
    "uint8 NCHW": (IMAGES.permute(0, 3, 1, 2), LABELS),
    "NumPy": (IMAGES.numpy(), LABELS.numpy().astype(np.int32)),
    "float NCHW": (IMAGES.permute(0, 3, 1, 2) / 255, LABELS),
    "double NumPy NHWC": (IMAGES.numpy() / 255, LABELS.tolist()),
    "whole numbers": (IMAGES.long(), LABELS.to(torch.uint8)),
    "uint16": (IMAGES.numpy().astype(">u2"), LABELS.numpy().astype(np.uint64)),
    "PIL": Pictures(),
    "float tensors": Pictures(lambda p: torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255),
    "uint8 tensors": Pictures(lambda p: torch.from_numpy(np.array(p)).permute(2, 0, 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_images_gives_the_same_split(form):
    split = as_split(FORMS[form])
    assert torch.equal(split.images, IMAGES) and torch.equal(split.labels, LABELS)


def test_grey_images_need_no_channel():
    split = as_split((IMAGES[..., 0], LABELS))
    assert torch.equal(split.images[..., 0], IMAGES[..., 0])


def test_fit_trains_in_place_and_its_figures_are_those_of_the_commands(tmp_path):
    model = _net()
    before = model.head[1].weight.clone()
    run = fastiat.fit(
        model, Pictures(), TEST, mix_at=["input", "layer1"], out=tmp_path / "run", **FEW
    )
    assert run.model is model and not model.training
    assert not torch.equal(model.head[1].weight, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    config = json.loads((run.path / "config.json").read_text())
    assert config["mix_at"] == ["input", "layer1"] and config["arch"].endswith(":Net")
    assert len(run.history) == 1
    assert run.clean_error == pytest.approx(run.history[0]["test_error_percent"])
    measured = fastiat.evaluate_model(model, TEST, ["pgd-20"], eps=0.03, alpha=0.0075)
    assert dict(measured.errors) == dict(run.errors)
    assert f"No attack {run.errors['none']} %" in repr(run) and "1 epochs" in repr(run)
    # The command line measures the same network in another process's way.
    images = tmp_path / "images"
    for split in ("train", "test"):
        for index, label in enumerate(LABELS[:20].tolist()):
            folder = images / split / Pictures.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(IMAGES[index].numpy()).save(folder / f"{index:02}.png")
    (found,) = evaluate(
        EvaluateConfig(
            runs=(str(run.path),), attacks=("none", "pgd-20"), dataset="folder",
            data_dir=str(images), arch=f"{Path(__file__)}:Net", device="cpu",
        )
    ).values()  # fmt: skip
    assert found["test/none"] == run.errors["none"]
    assert found["test/pgd-20"].n == 20
    # A file never names code to import.
    with pytest.raises(InputError, match="a network of your own"):
        fastiat.load(run.path)
    again = fastiat.load(run.path, model=_net())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(x), model(x))


def test_a_fit_is_the_same_as_the_training_of_the_command_line(tmp_path):
    digits = data.load("digits")
    settings = FEW | {"eval_limit": 40, "train_limit": 200, "seed": 3}
    torch.manual_seed(3)
    built = fastiat.models.build("preact18", 10, 1, 8, width=2)
    run = fastiat.fit(built, digits.train, digits.test, flip=False, out=tmp_path / "a", **settings)
    path = fastiat.train.train(
        fastiat.config.TrainConfig(
            arch="preact18", width=2, dataset="digits", out=tmp_path / "b", **settings
        )
    )
    theirs = fastiat.load(path).state_dict()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_a_fit_resumes_and_keeps_its_best_epoch(tmp_path):
    settings = FEW | {"holdout": 8, "ema": 0.5, "out": tmp_path / "run"}
    first = fastiat.fit(_net(), (IMAGES, LABELS), TEST, **settings)
    saved = fastiat.load(first.path, model=_net())
    for ours, theirs in zip(saved.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again = fastiat.fit(_net(), (IMAGES, LABELS), TEST, resume=True, **settings)
    assert again.errors == first.errors


def test_normalise_puts_the_network_behind_a_layer_that_is_saved(tmp_path):
    model = _net()
    run = fastiat.fit(
        model, (IMAGES, LABELS), TEST, normalise="imagenet", out=tmp_path / "run", **FEW
    )
    assert run.model.network is model
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(fastiat.load(run.path, model=_net())(x), run.model(x))


def test_a_folder_or_a_name_can_be_given(tmp_path):
    run = fastiat.fit(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "digits", train_limit=50, eval_limit=20,
        out=tmp_path / "run", **FEW,
    )  # fmt: skip
    assert run.errors["none"].n == 20
    measured = fastiat.evaluate_model(run.model, "digits", "fgsm", limit=20)
    assert measured.clean_error == run.clean_error and measured.errors["fgsm"].n == 20


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ((IMAGES / 127.5 - 1, LABELS), "pixels run from -1 to 1: give floats in [0, 1]"),
        ((IMAGES.float(), LABELS), "pixels run from 0 to 255: give floats in [0, 1]"),
        ((IMAGES.long() - 1, LABELS), "from -1 to 254: give uint8"),
        ((IMAGES[:, :, :7], LABELS), "8x7 pixels are not square"),
        ((IMAGES.reshape(40, 192), LABELS), "images have shape (40, 192)"),
        ((IMAGES[:, :3, :3], LABELS), "neither (N, H, W, C) nor (N, C, H, W)"),
        ((IMAGES, LABELS[:9]), "40 images come with"),
        ((IMAGES, LABELS.float()), "labels are torch.float32"),
        ((IMAGES, nn.functional.one_hot(LABELS)), "labels.argmax(1)"),
        ((IMAGES, LABELS - 1), "labels from -1 to 2"),
        (Pictures(lambda p: p.resize((8 + p.getpixel((0, 0))[0] % 2, 8))), "resizes and crops"),
        ([IMAGES], "no (image, label)"),
        ((IMAGES, ["cat"] * 40), "labels are <U3: give one whole number"),
        ((IMAGES, None), "labels are object: give one whole number"),
        ((IMAGES, [[1], [1, 2]]), "labels are no array"),
        ((IMAGES, LABELS.to(torch.complex64)), "labels are torch.strided torch.complex64"),
        ((IMAGES.numpy().astype("complex128"), LABELS), "images are complex128: give uint8"),
        ((IMAGES.numpy().astype("uint16") * 256, LABELS), "from 0 to 6.53e+04: give uint8"),
        ((IMAGES.float().to_sparse(), LABELS), "images are torch.sparse_coo torch.float32"),
        ((IMAGES.to("meta"), LABELS), "images are on the meta device"),
        ((np.array([None] * 40), LABELS), "images are object"),
        ({"x": IMAGES, "y": LABELS}, "item 0 of the data set cannot be read: KeyError: 0"),
        ([("a.png", 0)] * 40, "image 0 is <U5: give uint8"),
        ([(IMAGES[0], 1.7)] * 40, "label 0 is 1.7: give the number of a class"),
        ([(IMAGES[0], "1")] * 40, "label 0 is '1': give the number"),
        ([(IMAGES[0], torch.eye(4)[1])] * 40, "label 0 is tensor([0., 1., 0., 0.]): give"),
        ("no-such-set", "no data set or folder no-such-set"),
        (7, "images are a int"),
        (None, "images are a NoneType"),
    ],
)
def test_other_images_are_refused_in_one_line(images, words, tmp_path):
    with pytest.raises(InputError) as raised:
        fastiat.fit(_net(), images, TEST, out=tmp_path / "run", **FEW)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mix_at": ["layer3"]}, "--mix-at layer3: the network has no module of this name"),
        ({"eps": 4}, "--eps is 4"),
        ({"steps": 10**9}, "--steps is 1000000000: give at most 999999"),
        ({"epochs": "many"}, "--epochs is 'many': give a whole number"),
        ({"mix": "cutout"}, "--mix is 'cutout'"),
        ({"width": 4}, "--width is for the networks of fastiat"),
        ({"normalise": ("1", "1")}, "is for 1 channels, but the images have 3"),
        ({"classes": ("a", "b")}, "labels from 0 to 3 for 2 classes"),
        ({"classes": 4}, "classes is 4: give the name of each class"),
        ({"classes": "aabc"}, "classes has a name twice: a, a, b, c"),
        ({"init": nn.Sequential(nn.Flatten())}, "--init is Sequential("),
        ({"classes": "abcde"}, "returns torch.float32 of shape (2, 4)"),
    ],
)
def test_wrong_settings_are_refused_as_on_the_command_line(settings, words, tmp_path):
    with pytest.raises(InputError) as raised:
        fastiat.fit(_net(), (IMAGES, LABELS), TEST, out=tmp_path / "run", **FEW | settings)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_unknown_settings_and_things_that_are_no_network_are_refused():
    with pytest.raises(TypeError, match="no setting epoch, did you mean epochs"):
        fastiat.fit(_net(), (IMAGES, LABELS), TEST, epoch=1)
    with pytest.raises(TypeError, match="no setting restart, did you mean restarts"):
        fastiat.evaluate_model(_net(), TEST, restart=1)
    with pytest.raises(InputError, match=r"model is a function: give an nn\.Module"):
        fastiat.fit(lambda x: x, (IMAGES, LABELS), TEST)
    with pytest.raises(InputError, match="unknown attack 'pgd'"):
        fastiat.evaluate_model(_net(), TEST, ["pgd"])
    with pytest.raises(InputError, match="labels run from 0 to 3, but the network has 2 classes"):
        fastiat.evaluate_model(_net(num_classes=2), TEST)


def test_measuring_leaves_the_network_as_it_was():
    model = _net().train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fastiat.evaluate_model(model, TEST, ["fgsm", "pgd-3"], norm="l2", restarts=2)
    assert model.training and not model.layer1.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_process_wide_options_are_those_of_before(tmp_path):
    inductor, deterministic = torch._inductor.config, torch.utils.deterministic
    try:
        deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True)
        inductor.deterministic = True
        fastiat.evaluate_model(_net(), TEST, ["fgsm"])
        fastiat.fit(_net(), (IMAGES, LABELS), TEST, out=tmp_path / "run", **FEW)
        assert torch.are_deterministic_algorithms_enabled() and inductor.deterministic
        assert deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        inductor.deterministic = False


def test_pictures_with_a_palette_are_read_in_colour():
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    items = [(picture.convert("P", palette=Image.Palette.ADAPTIVE), 0), (picture, 1)]
    assert torch.equal(
        as_split(items).images, torch.tensor([200, 100, 50]).byte().expand(2, 8, 8, 3)
    )


def test_test_images_of_other_classes_are_refused(tmp_path):
    for name, classes in (("one", ("cat", "dog")), ("two", ("ant", "cat"))):
        for split in ("train", "test"):
            for label in classes:
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                Image.fromarray(IMAGES[0].numpy()).save(folder / "a.png")
    with pytest.raises(InputError, match=r"train has 2 classes \(cat, dog\), but test has"):
        fastiat.fit(_net(), tmp_path / "one", tmp_path / "two", out=tmp_path / "run", **FEW)


def test_negative_labels_are_refused_where_a_network_is_measured():
    with pytest.raises(InputError, match="labels run from -1 to 2"):
        fastiat.evaluate_model(_net(), (IMAGES, LABELS - 1))


def test_a_split_of_images_that_are_not_square_is_refused():
    with pytest.raises(InputError, match="8x7 pixels are not square"):
        as_split(data.Split(IMAGES[:, :, :7].contiguous(), LABELS))


def test_without_an_attack_there_is_no_robust_error():
    measured = fastiat.evaluate_model(_net(), TEST, ["none"])
    with pytest.raises(InputError, match="no attack was measured"):
        _ = measured.robust_error


@pytest.mark.parametrize("eps", [0.25, 2.0, None])
def test_the_step_size_in_the_l2_ball_follows_the_radius(eps):
    filled = EvaluateConfig(norm="l2", eps=eps).filled(None)
    expected = TrainConfig(norm="l2", **({} if eps is None else {"eps": eps}))
    assert (filled.eps, filled.alpha) == pytest.approx((expected.eps, expected.alpha))
    run = TrainConfig(norm="l2", eps=1.0, alpha=0.3)
    filled = EvaluateConfig(eps=eps).filled(run)
    assert filled.alpha == pytest.approx(0.3 * (eps or 1.0))
    linf = EvaluateConfig(eps=0.1).filled(TrainConfig())
    assert linf.alpha == 0.0075
