"""Which settings of the training's method cannot go together."""

from dataclasses import fields
from typing import Any

from fastiat.system.errors import InputError
from fastiat.system.settings import flag_of


def check_method(config: Any) -> None:
    """Raise `InputError` for settings of the method that cannot go together."""
    usual = {f.name: f.default for f in fields(config)}
    joint = config.objective != "at"
    chosen = f"--objective {config.objective}"

    def refuse(wrong: bool, first: str, second: str, why: str) -> None:
        if wrong:
            raise InputError(f"{first} and {second} cannot go together: {why}")

    changed = {name for name in usual if getattr(config, name) != usual[name]}
    if joint:
        refuse(config.adv == "none", chosen, "--adv none", "it compares with adversarial images")
        refuse(
            "clean_weight" in changed, chosen, "--clean-weight",
            "--beta is the weight of its terms",
        )  # fmt: skip
        refuse(
            config.shared_mix, chosen, "--shared-mix", "its batches are mixed by one draw always"
        )
    if config.objective == "trades":
        why = "the divergence has no gradient at the image itconfig"
        refuse(config.adv == "fgsm", chosen, "--adv fgsm", why)
        refuse(not config.random_start, chosen, "--no-random-start", why)
        refuse(config.adv == "n-fgsm" and not config.noise, chosen, "--noise 0", why)
        refuse(
            config.attack_loss != "ce", chosen, f"--attack-loss {config.attack_loss}",
            "its attack raises the divergence",
        )  # fmt: skip
    if config.objective == "mart":
        why = "its loss is defined for cross-entropy and labels of one class"
        refuse(config.loss != "ce", chosen, f"--loss {config.loss}", why)
        refuse(config.smoothing > 0, chosen, "--smoothing", why)
    refuse(
        "beta" in changed and not joint, "--beta", "--objective at",
        "Algorithm 1 has no divergence; use --clean-weight",
    )  # fmt: skip
    if config.attack_mixed:
        mixes = f"--mix {config.mix}"
        refuse(config.mix == "none", "--attack-mixed", mixes, "use --mix mixup or cutmix")
        refuse(
            config.mix == "manifold", "--attack-mixed", mixes,
            "an attack changes pixels; use --mix mixup or cutmix",
        )  # fmt: skip
        refuse(config.adv == "none", "--attack-mixed", "--adv none", "it needs an attack")
        refuse(joint, "--attack-mixed", chosen, "its loss has no clean batch")
        why = "its loss has no clean batch"
        refuse("clean_weight" in changed, "--attack-mixed", "--clean-weight", why)
        refuse(config.shared_mix, "--attack-mixed", "--shared-mix", why)
        refuse(
            config.mix_space != "standardised", "--attack-mixed", "--mix-space",
            "it mixes pixels always",
        )  # fmt: skip
        refuse(config.mix_at is not None, "--attack-mixed", "--mix-at", "it mixes pixels always")
        refuse(
            config.attack_loss != "ce", "--attack-mixed", f"--attack-loss {config.attack_loss}",
            "the margin is not defined for mixed labels",
        )  # fmt: skip
    refuse(
        config.mix == "cutmix" and config.mix_at not in (None, ("input",), ("0",)),
        "--mix cutmix", "--mix-at", "boxes are pasted into images",
    )  # fmt: skip
    refuse(
        config.awp > 0 and config.adv == "none", "--awp", "--adv none",
        "the weights are perturbed along the adversarial loss",
    )  # fmt: skip
    refuse(
        config.awp_warmup > 0 and not config.awp, "--awp-warmup", "--awp 0", "nothing would begin"
    )
    refuse(
        config.awp > 0 and config.awp_warmup >= config.epochs, f"--awp-warmup {config.awp_warmup}",
        f"--epochs {config.epochs}", "--awp would not begin before the training ends",
    )  # fmt: skip
    for name in ("mix_at", "mix_alpha", "mix_space", "lam_per_sample", "shared_mix"):
        refuse(
            config.mix == "none" and name in changed, flag_of(name), "--mix none",
            "nothing is mixed",
        )  # fmt: skip
    refuse(
        "noise" in changed and config.adv != "n-fgsm", "--noise", f"--adv {config.adv}",
        "it is for --adv n-fgsm",
    )  # fmt: skip
    refuse(
        config.adv == "n-fgsm" and not config.random_start, "--adv n-fgsm", "--no-random-start",
        "use --noise 0 or --adv fgsm",
    )  # fmt: skip
