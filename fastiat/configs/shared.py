"""Groups of settings that several commands share."""

from dataclasses import dataclass
from typing import Literal

from fastiat.system.errors import InputError
from fastiat.system.settings import (
    Settings,
    check_arch,
    check_ranges,
    is_own_arch,
)

POSITIVE = {
    *("epochs", "batch_size", "steps", "width", "mix_alpha", "restarts", "quality", "max_side"),
    *("limit", "eval_limit", "train_limit", "class_limit", "image_size", "extra_fraction"),
}
"""Settings that must be greater than 0; all other numeric settings may be 0."""


class Checked(Settings):
    """Settings whose types and ranges are checked."""

    def check(self) -> None:
        """Raise `InputError`, which names the flag, for a value of wrong type or out of range."""
        check_ranges(self, POSITIVE)
        for split in getattr(self, "splits", ()):
            if split not in ("test", "train"):
                raise InputError(f"unknown split {split!r}: choose from test, train")


@dataclass(frozen=True)
class OnDevice(Checked):
    """The device that a command uses."""

    device: str = "auto"
    """"cpu", "cuda" or "cuda:N"; "auto" is CUDA if a CUDA device is available."""


@dataclass(frozen=True)
class WithPrecision(OnDevice):
    """The device and the precision that a command uses."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of training and attack: "bf16" is bf16 autocast; "auto" is "bf16" on a device with
    fast bf16, else "fp32". Errors are always measured in fp32."""


@dataclass(frozen=True)
class WithDataDir(Checked):
    """The folder that holds the files of a data set."""

    data_dir: str | None = None
    """Folder of the data set; a missing data set is downloaded into it (default: $FASTIAT_DATA
    or ~/.cache/fastiat/data)."""


@dataclass(frozen=True)
class PGDOptions(Checked):
    """The loss that PGD maximises, and its starting point."""

    attack_loss: Literal["ce", "margin"] = "ce"
    """Loss that the attack maximises: "ce" is cross-entropy; "margin" is the highest logit of a
    wrong class minus the logit of the true class."""
    random_start: bool = True
    """Start PGD at a random point of the eps ball instead of at the image."""


@dataclass(frozen=True)
class WithOwnNetwork(Checked):
    """The function of a network of the user's own, which a run does not name by itself."""

    arch: str | None = None
    """Function of your own network, MODULE:FUNCTION, for runs that trained one: a file of a run
    never says which code to import."""

    def check(self) -> None:
        super().check()
        if self.arch is not None and not is_own_arch(self.arch):
            raise InputError(
                f"--arch {self.arch}: a run knows its network; --arch is for a network of your "
                f"own, MODULE:FUNCTION or FILE.py:FUNCTION"
            )
        check_arch(self.arch)
