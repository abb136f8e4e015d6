"""Examples: test images of a run, the same images attacked, and the differences."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastiat import data
from fastiat.attack import pgd
from fastiat.models import to_pixels
from fastiat.page import figures
from fastiat.runs.directory import MODEL, Run, load_with_card
from fastiat.system.errors import InputError
from fastiat.system.settings import is_own_arch

COUNT = 8
STEPS = 20
TITLES = ("image", "attacked image", "difference")


@dataclass(frozen=True)
class Example:
    """An image before and after the attack, with the names of three classes."""

    truth: str
    """The true class."""
    clean: str
    """The network's prediction for the image."""
    attacked: str
    """The network's prediction for the attacked image."""
    pictures: tuple[Any, ...]
    """In the order of `TITLES`: arrays (H, W, 3), or (H, W) in grey, uint8.

    The difference is drawn from -eps, black, to eps, white.
    """

    @property
    def sources(self) -> list[tuple[str, str]]:
        """Title and data URI of every picture, for a page."""
        return list(zip(TITLES, map(_data_uri, self.pictures), strict=True))


def examples(
    run: Run, load: Callable[..., data.Dataset] = data.load, arch: str | None = None
) -> list[Example]:
    """Attack one test image of each of a run's first 8 classes with PGD-20 at the run's eps.

    arch: function of the user's own network, for runs that trained one.

    Returns [] if there is no model yet, if it is a network of the user's own and no `arch` is
    given, or if its images are not on this machine. Nothing is downloaded, because a config.json
    that somebody else wrote must not choose a download.
    """
    config = run.config
    if not (run.path / MODEL).exists() or not config.eps:
        return []
    if is_own_arch(config.arch) and arch is None:
        return []
    model, card = load_with_card(run.path, arch=arch)
    try:
        dataset = load(
            config.dataset,
            config.data_dir,
            loader=config.loader,
            fetch=False,
            image_size=config.image_size,
        )
    except InputError:
        return []
    split = dataset.test
    if split.shape != (card.in_channels, card.image_size, card.image_size):
        return []
    found = [(split.labels == label).nonzero()[:1, 0] for label in range(len(card.classes))]
    some = split.take(torch.cat(found[:COUNT]))
    x, y = to_pixels(some.images.permute(0, 3, 1, 2)), some.labels
    generator = torch.Generator().manual_seed(0)
    x_adv = pgd(
        model, x, y, eps=config.eps, alpha=config.alpha, steps=STEPS, norm=config.norm,
        generator=generator,
    )  # fmt: skip
    with torch.no_grad():
        clean, attacked = model(x).argmax(1), model(x_adv).argmax(1)
    change = 0.5 + (x_adv - x) / (2 * config.eps)
    names = card.classes
    pictures = zip(*map(_arrays, (x, x_adv, change)), strict=True)
    return [
        Example(names[y[i]], names[clean[i]], names[attacked[i]], three)
        for i, three in enumerate(pictures)
    ]


def grid(found: Sequence[Example], title: str) -> figures.Picture:
    """Draw examples as a grid: a column each; image, attacked image and difference below."""
    with figures.style():
        figure = Figure(figsize=(1.3 * len(found), 4.6), layout="constrained")
        axes = figure.subplots(len(TITLES), len(found), squeeze=False)
        for column, example in enumerate(found):
            for row, picture in enumerate(example.pictures):
                axis = axes[row, column]
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
                axis.grid(visible=False)
                if column == 0:
                    axis.set_ylabel(TITLES[row])
            axes[0, column].set_title(example.clean, fontsize=8)
            axes[1, column].set_title(example.attacked, fontsize=8)
        figure.suptitle(title)
    return figures.draw("examples", title, figure)


def _data_uri(picture: Any) -> str:
    """Return a picture, an array as in `Example`, as a PNG in a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _arrays(x: Tensor) -> list[Any]:
    """Turn pixels (B, C, H, W) in [0, 1] into B arrays (H, W, 3), or (H, W) in grey, uint8."""
    pixels = (255 * x).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return list(pixels.squeeze(3).numpy())
