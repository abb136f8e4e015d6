"""Networks of torchvision, timm and the user's files: built, mixed, trained, saved, loaded."""

import copy
import io
import logging
import textwrap
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision import models as zoo

import fastiat
from fastiat import cli, data, models
from fastiat.config import EvaluateConfig, NormsConfig, TrainConfig
from fastiat.mix import Mix, MixPoints, mixed_loss
from fastiat.networks import sources
from fastiat.networks.check import check_network
from fastiat.system.errors import InputError
from fastiat.train import Trainer, train
from fastiat.training.step import Step

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (24, 16, 16, 3), dtype=torch.uint8, generator=GENERATOR)
SPLIT = data.Split(IMAGES, torch.arange(24) % 3)
COLOUR = data.Dataset("colour", ("a", "b", "c"), SPLIT, SPLIT, flip=True)
FEW = {"epochs": 1, "steps": 1, "batch_size": 8, "lr": 0.01, "device": "cpu", "precision": "fp32"}
OWN = """
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes, width=4):
            super().__init__()
            self.first = nn.Conv2d(3, width, 3, padding=1)
            self.last = nn.Linear(width * 256, num_classes)

        def forward(self, x):
            return self.last(self.first(x).relu().flatten(1))

    def make_net(num_classes, in_channels, image_size):
        assert (in_channels, image_size) == (3, 16)
        return Net(num_classes)

    def fails(num_classes):
        raise ValueError("no weights here")

    def none(num_classes):
        return None
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """Write a file of networks to a directory of its own, and make that the current one."""
    (tmp_path / "some_nets.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(tmp_path)
    return tmp_path


POINTS = {
    "torchvision:resnet18": ("layer1", "layer2"),
    "torchvision:vgg11": ("features.1", "features.4"),
    "torchvision:convnext_tiny": ("features.1", "features.3"),
    "torchvision:efficientnet_b0": ("features.1", "features.2"),
    "torchvision:mobilenet_v2": ("features.1", "features.3"),
    "torchvision:shufflenet_v2_x0_5": ("stage2", "stage3"),
    "torchvision:vit_b_16": ("encoder.layers.encoder_layer_2", "encoder.layers.encoder_layer_5"),
    "timm:test_resnet": ("layer1", "layer2"),
    "timm:test_convnext": ("stages.0", "stages.1"),
    "timm:test_vit": ("blocks.0", "blocks.1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", POINTS)
def test_default_mix_points_are_the_input_and_two_stages_that_can_be_mixed(arch):
    size = 224 if "vit_b" in arch else 160 if "vit" in arch else 64
    network = sources.from_library(arch, 3, 3)
    assert sources.library_points(network) == ("input", *POINTS[arch])
    check_network(network, (3, size, size), 3, sources.library_points(network))


@pytest.mark.parametrize(
    ("arch", "channels", "words"),
    [
        ("torchvision:resnet81", 3, "torchvision.models.list_models(), did you mean resnet18?"),
        ("torchvision:resnet18", 1, "takes images of 3 channels, but these have 1"),
        ("timm:resnet_18", 3, "timm.list_models(), did you mean resnet18?"),
        ("timm:hf-hub:someone/net", 3, "timm has no network 'hf-hub:someone/net'"),
    ],
)
def test_other_networks_of_a_library_are_refused(arch, channels, words):
    with pytest.raises(InputError) as raised:
        sources.from_library(arch, 3, channels)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_library_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install 'fastiat\[timm\]'"):
        sources.from_library("timm:resnet18", 3, 3)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("some_nets:make_ned", "some_nets has no function make_ned, did you mean make_net?"),
        ("no_nets:make", "there is no module no_nets in"),
        ("no/nets.py:make", "there is no file no/nets.py"),
        ("some_nets:fails", "fails(num_classes=3) fails: ValueError: no weights here"),
        ("some_nets:none", "none returns a NoneType, not an nn.Module"),
    ],
)
def test_other_functions_of_the_user_are_refused(arch, words, nets):
    with pytest.raises(InputError) as raised:
        sources.own_network(arch, 3, 3, 16)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import sys; sys.exit(3)", "importing own.py fails: SystemExit: 3"),
        ("import argparse; argparse.ArgumentParser().parse_args(['-x'])", "fails: SystemExit: 2"),
        ("import ow", "own.py needs the module ow, which cannot be found"),
        ("import own_parts", "own.py needs the module own_parts, which cannot be found"),
    ],
)
@pytest.mark.parametrize("suffix", [".py", ""])
def test_a_module_that_exits_or_lacks_another_one_is_refused(suffix, line, words, nets):
    module = f"own{len(line)}"  # Python imports a name once
    (nets / f"{module}.py").write_text(line.replace("own_", f"{module}_"))
    with pytest.raises(InputError) as raised:
        sources.own_network(f"{module}{suffix}:net", 3, 3, 16)
    expected = words.replace("own_", f"{module}_").replace("own.py", f"{module}{suffix}")
    assert expected in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arch": "resnet18"}, "--arch 'resnet18': choose from preact18"),
        ({"arch": "torchvision:"}, "--arch 'torchvision:'"),
        ({"arch": "torchvision:resnet18", "width": 3}, "--width is for the networks of fastiat"),
        ({"arch": "a:b", "variant": "authors"}, "--variant is for the networks of fastiat"),
        ({"pretrained": True}, "--pretrained is for networks of torchvision and timm"),
        ({"arch": "a:b", "pretrained": True}, "give a file of weights with --init"),
        ({"arch": "timm:x", "pretrained": True, "init": "x"}, "leave one out"),
    ],
)
def test_settings_of_networks_are_checked(settings, words):
    with pytest.raises(InputError) as raised:
        TrainConfig(**settings).check()
    assert words in str(raised.value)


@pytest.mark.parametrize("library", ["torchvision:resnet18", "timm:test_resnet"])
def test_normalisation_defaults_to_that_of_the_weights(library):
    card = models.card_of(TrainConfig(arch=library), ("a", "b"), (3, 32, 32))
    expected = timm.get_pretrained_cfg("test_resnet")
    if library.startswith("timm"):
        assert [float(word) for word in card.normalise] == [*expected.mean, *expected.std]
    else:
        assert card.normalise == ("imagenet",)
    assert models.card_of(TrainConfig(arch="m:f"), ("a", "b"), (3, 8, 8)).normalise == ("none",)


def _resnet():
    torch.manual_seed(0)
    return zoo.resnet18(num_classes=3)


def _mixed_forward(network, x, mix):
    """The pass of a torchvision ResNet, mixed before it or after one of its stages."""
    lam = mix.lam.to(x.dtype)

    def at(layer, h):
        return lam * h + (1 - lam) * h[mix.perm] if layer == mix.layer else h

    h = network.maxpool(network.relu(network.bn1(network.conv1(at(0, x)))))
    h = at(2, network.layer2(at(1, network.layer1(h))))
    h = network.avgpool(network.layer4(network.layer3(h)))
    return network.fc(h.flatten(1))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_resnet_mixed_by_hooks_is_the_hand_written_pass_in_float64(layer):
    network = _resnet().double()
    reference = copy.deepcopy(network)
    x, y = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    mix = Mix(layer, torch.tensor([2, 0, 3, 1]), torch.tensor(0.3))
    with MixPoints(network, ["input", "layer1", "layer2"]).applied(mix):
        logits = network(x)
        mixed_loss(logits, y, mix).backward()
    expected = _mixed_forward(reference, x, mix)
    torch.testing.assert_close(logits, expected)
    lam = mix.lam.double()
    loss = lam * F.cross_entropy(expected, y)
    (loss + (1 - lam) * F.cross_entropy(expected, y[mix.perm])).backward()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


SMALL = TrainConfig(arch="torchvision:resnet18", mix_at=("layer1", "layer2"), **FEW)


class Small(nn.Module):
    """Two stages with BatchNorm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))

    def forward(self, x):
        return self.head(self.layer2(self.layer1(x)))


@pytest.mark.slow
@pytest.mark.parametrize("mix_at", [("input",), ("layer1", "layer2")])
def test_the_compiled_step_at_named_modules_is_the_eager_one(mix_at):
    config = TrainConfig(arch="m:Small", mix_at=mix_at, random_start=False, **FEW)
    trainers = []
    for engine in ("compile", "eager"):
        torch.manual_seed(0)
        trainers.append(Trainer(replace(config, engine=engine), COLOUR, Small()))
    compiled, eager = trainers
    for ours, theirs in zip(compiled.epoch_updates(), eager.epoch_updates(), strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=1e-4)


def test_the_step_in_fixed_buffers_is_the_eager_one_for_a_resnet():
    eager, fixed = Trainer(SMALL, COLOUR), Trainer(SMALL, COLOUR)
    fixed.__dict__["fast_step"] = Step(
        fixed.model,
        fixed.optimizer,
        torch.Size(fixed.batch_shape),
        fixed._attack_settings("eval", fixed.rank_random["attack"]),
        fixed.points,
        dtype=None,
        compiled=False,
        captured=False,
    )
    fixed.engine = "compile"
    for ours, theirs in zip(fixed.epoch_updates(), eager.epoch_updates(), strict=True):
        assert torch.equal(torch.stack(ours), torch.stack(theirs))
    for ours, theirs in zip(fixed.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_library_network_trains_resumes_bit_for_bit_saves_and_loads(tmp_path):
    whole, first = Trainer(SMALL, COLOUR), Trainer(SMALL, COLOUR)
    list(whole.epoch_updates())
    updates = first.epoch_updates()
    next(updates)
    second = Trainer(SMALL, COLOUR)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    list(second.epoch_updates())
    for (name, value), other in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    path = train(replace(SMALL, out=str(tmp_path / "run")), dataset=COLOUR)
    model = fastiat.load(path)
    assert isinstance(model.network, zoo.ResNet) and model.mix_points[1:] == ("layer1", "layer2")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_network_of_the_user_trains_and_is_named_again_to_go_on(nets, capsys):
    arguments = ["train", "--arch", "some_nets:make_net", "--out", "run", "--epochs", "1"]
    for split in ("train", "test"):
        for label, image in enumerate(IMAGES[:6]):
            folder = nets / "images" / split / "abc"[label % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(folder / f"{label}.png")
    arguments += [
        "--dataset",
        "folder",
        "--data-dir",
        "images",
        "--batch-size",
        "3",
        "--steps",
        "1",
    ]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    assert "mix manifold at the input alone (--mix-at names modules" in capsys.readouterr().out
    again = (
        "fastiat: run trains a network of your own, some_nets:make_net: give it again with --arch"
    )
    assert cli.main(["train", "--resume", "--out", "run"]) == 2
    assert again in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", "run", "--arch", "some_nets:make_net"]) == 0
    for command in ("evaluate run --attacks none", "norms run", "sweep run --steps 2"):
        capsys.readouterr()
        assert cli.main(command.split()) == 2
        assert "it holds a network of your own, some_nets:make_net" in capsys.readouterr().err
        assert cli.main([*command.split(), "--arch", "some_nets.py:make_net"]) == 0
    for more in ([], ["--arch", "some_nets:make_net"]):
        assert cli.main(["report", "run", *more]) == 0
        assert ("<h2>Examples" in (nets / "run" / "report.html").read_text()) == bool(more)
    assert cli.main(["diagnose", "run", "--limit", "6", "--arch", "some_nets:make_net"]) == 0
    assert cli.main(["export", "run", "m.pt2", "--arch", "some_nets:make_net"]) == 0
    with pytest.raises(InputError, match="a run knows its network"):
        EvaluateConfig(runs=("run",), arch="preact18").check()
    NormsConfig(runs=("run",), arch="some_nets:make_net").check()


@pytest.mark.parametrize("classes", [3, 5])
def test_init_copies_weights_and_leaves_a_classifier_of_other_classes(classes, tmp_path, capsys):
    given = zoo.resnet18(num_classes=classes)
    save_file(given.state_dict(), tmp_path / "net.safetensors")
    trainer = Trainer(replace(SMALL, init=str(tmp_path / "net.safetensors")), COLOUR)
    own = trainer.model.network
    assert torch.equal(own.conv1.weight, given.conv1.weight)
    assert torch.equal(own.fc.weight, given.fc.weight) if classes == 3 else own.fc.out_features == 3
    said = "fc.weight and fc.bias keep their initial values" in capsys.readouterr().out
    assert said == (classes == 5)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda f: save_file(zoo.resnet34(num_classes=3).state_dict(), f), "the network lacks"),
        (lambda f: save_file(_resnet().half().state_dict(), f), "is torch.float16 of shape"),
        (lambda f: f.write_bytes(b"no weights"), "is a text file, not a model"),
        (lambda f: None, "no such run"),
    ],
)
def test_other_initial_weights_are_refused(write, words, tmp_path):
    write(tmp_path / "net.safetensors")
    with pytest.raises(InputError) as raised:
        Trainer(replace(SMALL, init=str(tmp_path / "net.safetensors")), COLOUR)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_pretrained_weights_are_loaded_or_say_which_file_to_get(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None, raising=False)

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(InputError) as raised:
        sources.from_library("torchvision:resnet18", 3, 3, pretrained=True)
    assert "resnet18-f37072fd.pth and put the file into" in str(raised.value)
    theirs = zoo.resnet18()
    monkeypatch.setattr(
        type(zoo.ResNet18_Weights.DEFAULT), "get_state_dict", lambda *_, **__: theirs.state_dict()
    )
    network = sources.from_library("torchvision:resnet18", 3, 3, pretrained=True)
    assert torch.equal(network.conv1.weight, theirs.conv1.weight)
    assert network.fc.weight.shape == (3, 512)


def test_weights_of_timm_that_cannot_be_downloaded_are_named_in_one_line(monkeypatch, caplog):
    def no_network(*_, **__):
        logging.getLogger("huggingface_hub.utils").warning("retrying")
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(InputError, match="give it with --init") as raised:
        sources.from_library("timm:test_resnet", 3, 3, pretrained=True)
    assert "\n" not in str(raised.value) and caplog.text == ""


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    return models.build("preact18", 3, 3, 8, width=2).eval()


def test_tracing_tools_take_a_network_of_fastiat(built):
    from torch.export import export
    from torchvision.models.feature_extraction import create_feature_extractor

    x = torch.rand(2, 3, 8, 8)
    expected = built(x)
    exported = export(built, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(torch.jit.trace(built, x)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(built)(x), expected)
    features = create_feature_extractor(built, {"groups.1": "features"})(x)["features"]
    assert features.shape == (2, 4, 4, 4)


def test_programs_that_are_traced_name_no_operator_of_fastiat(built):
    x = torch.rand(2, 3, 8, 8)
    program = torch.export.export(built, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "fastiat" not in str(program.graph)
    assert program.module()(torch.rand(5, 3, 8, 8)).shape == (5, 3)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(built, x), buffer)
    assert "fastiat::" not in str(torch.jit.load(io.BytesIO(buffer.getvalue())).inlined_graph)


def test_dynamic_quantisation_takes_a_network_of_fastiat(built):
    quantise = torch.ao.quantization.quantize_dynamic
    quantised = quantise(built, {nn.Linear}, dtype=torch.qint8)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(quantised(x), built(x), rtol=0.1, atol=0.1)
