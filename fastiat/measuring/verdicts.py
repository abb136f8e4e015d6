"""Explaining: what the measurements of a diagnosis mean; thresholds with their reasons.

Every function takes which images attacks fooled, (N,) bool, or shares of them in percent, and
returns a `Finding`. "Points" are percentage points of error.
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scipy.stats import binomtest
from torch import Tensor

from fastiat.measuring.rows import read_rows, write_rows

DIAGNOSIS = "diagnosis.json"
Verdict = Literal["pass", "warn", "fail", "not done"]


@dataclass(frozen=True)
class Finding:
    """What one check for masked gradients found; diagnosis.json is a list of these."""

    check: str
    """Name of the check, such as "FGSM weaker than PGD"."""
    verdict: Verdict
    figures: dict
    """What was measured, by name with its unit: numbers, lists of numbers, text or None."""
    sentence: str
    """What it means, for a newcomer."""


def read_diagnosis(run_dir: str | os.PathLike[str]) -> list[Finding]:
    """Return what `fastiat diagnose` has last found for a run, [] if it has not been called.

    Raises `InputError` for a diagnosis.json that is damaged.
    """
    return read_rows(run_dir, DIAGNOSIS, Finding)


def write_diagnosis(run_dir: Path, findings: Sequence[Finding]) -> None:
    """Write diagnosis.json, whole or not at all."""
    write_rows(run_dir / DIAGNOSIS, findings)


CHANCE_POINTS = 1.0
"""An attack may fall this far behind one that ought to be weaker: both draw at random."""
CHANCE = 0.025
"""Beyond that, it fails the check only if a sign test gives chance less than this."""
FGSM_POINTS = 30.0
"""PGD-20 leads FGSM by 10 to 29 points in the paper's adversarially trained rows but one: there by
40, as by up to 72 in rows trained without an attack, whose FGSM error looks low."""
CONVERGED_POINTS = 3.0
"""Steps 20 to 100 add under half a point in the paper's Table 7; more than 3 is unfinished."""
UNBOUNDED = (99.0, 95.0)
"""Error in % to pass and to warn when any image is allowed; a stray one may need more steps."""
NOISE_SHARE = (0.5, 0.9)
"""Share of PGD's added error that noise may reach to pass and to warn. Without gradients it is 1
or more, as PGD is then a single random point."""
ZERO_PERCENT = (1.0, 10.0)
"""Images without any gradient to pass and to warn: honest networks have them on stray images
only, where a float32 softmax is certain."""
RISING_PERCENT = (90.0, 75.0)
"""Images whose loss does as its gradient says, to pass and to warn; a coin would give 50."""
MARGIN_POINTS = (3.0, 10.0)
"""Lead of the margin loss to pass and to warn: 1 to 3 points are usual after adversarial
training, where the softmax is far from certain."""
AUTOATTACK_POINTS = (5.0, 10.0)
"""Lead of AutoAttack to pass and to warn: about 3 points for adversarial training, about 30 for
interpolating defences that turned out to mask (Croce & Hein 2020, table 2)."""

WORSE: tuple[Verdict, ...] = ("pass", "warn", "fail")


def fgsm_weaker(fgsm: Tensor, pgd: Tensor) -> Finding:
    """Many small steps must fool at least the images that one big step fools."""
    verdict = outranks(pgd, fgsm)
    lead = percent(pgd) - percent(fgsm)
    sentence = {
        "pass": "PGD's many small steps fool at least as many images as FGSM's single big one.",
        "warn": f"FGSM's single step seems to beat PGD's many, {TOO_FEW}",
        "fail": "FGSM's single big step fools more images than PGD's many small ones: these are "
        "led astray, so the gradients cannot be trusted.",
    }[verdict]
    if verdict == "pass" and lead > FGSM_POINTS:
        verdict = "warn"
        sentence = (
            "PGD fools far more images than FGSM: a robustness figure from FGSM means nothing for "
            "this network, quote PGD's."
        )
    figures = {"fgsm_error_percent": percent(fgsm), "pgd_error_percent": percent(pgd)}
    return Finding("FGSM weaker than PGD", verdict, figures | {"n": len(pgd)}, sentence)


def more_steps(by_steps: dict[int, Tensor]) -> Finding:
    """Along one run of PGD, {steps: fooled} in rising order, later must not be weaker."""
    fooled = list(by_steps.values())
    verdict = worst(outranks(b, a) for a, b in itertools.pairwise(fooled))
    sentence = {
        "pass": "More steps fool as many images or more, and the last ones add next to nothing: "
        "the attack has converged.",
        "warn": f"More steps seem to fool fewer images, {TOO_FEW}",
        "fail": "More steps fool fewer images: they lead away from adversarial examples, so the "
        "gradients cannot be trusted.",
    }[verdict]
    longest, before = list(by_steps)[-1], list(by_steps)[-2]
    if verdict == "pass" and percent(fooled[-1]) - percent(fooled[-2]) > CONVERGED_POINTS:
        verdict = "warn"
        sentence = (
            f"Going from {before} to {longest} steps still fools more images: the shorter attack "
            f"overstates robustness, quote the longer."
        )
    figures = {"steps": list(by_steps), "error_percent": [percent(f) for f in fooled]}
    return Finding("more steps never weaker", verdict, figures | {"n": len(fooled[0])}, sentence)


def larger_eps(by_eps: dict[float, Tensor]) -> Finding:
    """With a growing ball, {eps: fooled} in rising order, the error must grow, and reach 100 %.

    The last ball holds every image there is.
    """
    fooled = list(by_eps.values())
    growing = worst(outranks(b, a) for a, b in itertools.pairwise(fooled))
    reaching = at_least(percent(fooled[-1]), UNBOUNDED)
    verdict = worst((growing, reaching))
    if growing != "pass" and reaching == "pass":
        sentence = {
            "warn": f"A larger ball seems to make the attack weaker, {TOO_FEW}",
            "fail": "A larger ball makes the attack weaker though it holds the smaller one: the "
            "attack loses its way, so the error at this eps is an underestimate.",
        }[verdict]
    else:
        sentence = {
            "pass": "An attack that may change every pixel at will fools every image, as it must.",
            "warn": "Even an attack that may change every pixel at will misses a few images: "
            "it loses its way on them.",
            "fail": "Even an attack that may change every pixel at will fails on images that it "
            "could turn into any other: the attack is blinded, the network is not robust.",
        }[verdict]
    figures = {"eps": list(by_eps), "error_percent": [percent(f) for f in fooled]}
    return Finding("larger eps reaches 100 %", verdict, figures | {"n": len(fooled[0])}, sentence)


def white_box(transferred: Tensor | None, own: Tensor) -> Finding:
    """Examples made for another network must not beat those made for this one."""
    check = "white-box beats transfer"
    if transferred is None:
        return Finding(
            check,
            "not done",
            {},
            "Name another run for the same images with --partner, such as one of another seed.",
        )
    verdict = outranks(own, transferred)
    sentence = {
        "pass": "Examples made for another network are no stronger than those made for this one.",
        "warn": f"Examples made for another network seem to beat those made for this, {TOO_FEW}",
        "fail": "Examples made for another network fool more images than those made for this one: "
        "adversarial examples are there, and its own gradients hide them.",
    }[verdict]
    figures = {"transfer_error_percent": percent(transferred), "pgd_error_percent": percent(own)}
    return Finding(check, verdict, figures | {"n": len(own)}, sentence)


def noise_weaker(clean: Tensor, noise: Tensor, pgd: Tensor, *, eps: float, points: int) -> Finding:
    """Noise, the worst of `points` random points a ball, must add far less error than PGD."""
    gains = [percent(fooled) - percent(clean) for fooled in (noise, pgd)]
    share = gains[0] / gains[1] if gains[1] > 0 else None
    verdict = "fail" if share is None else at_most(share, NOISE_SHARE)
    sentence = {
        "pass": "Random noise of the same size adds far fewer errors than the attack: its "
        "gradients are worth something.",
        "warn": "Random noise of the same size comes near the attack: its gradients are worth "
        "little.",
        "fail": "Random noise of the same size does as well as the attack: the gradients are "
        "worth nothing.",
    }[verdict]
    figures = {
        "eps": eps,
        "points": points,
        "clean_error_percent": percent(clean),
        "noise_error_percent": percent(noise),
        "pgd_error_percent": percent(pgd),
        "share_of_pgds_gain": share,
        "n": len(pgd),
    }
    return Finding("noise far weaker than gradients", verdict, figures, sentence)


def gradients(norms: Tensor) -> Finding:
    """Images, by the L2 norms (N,) of their loss's gradient, must have one to follow."""
    finite = norms[norms.isfinite()]
    zero, broken = percent(norms == 0), percent(~norms.isfinite())
    verdict = "fail" if broken else at_most(zero, ZERO_PERCENT)
    sentence = {
        "pass": "Nearly every image has a gradient that an attack can follow.",
        "warn": "Some images have no gradient at all: attacks on them are blind.",
        "fail": "Gradients are zero or not finite: an attack that follows them is blind, and its "
        "failure says nothing about robustness.",
    }[verdict]
    figures = {
        "zero_percent": zero,
        "not_finite_percent": broken,
        "median_norm": float(finite.median()) if len(finite) else None,
        "n": len(norms),
    }
    return Finding("gradients are there", verdict, figures, sentence)


def surface(rise: Tensor, drift: Tensor, curvature: Tensor, fractions: list[float]) -> Finding:
    """The loss must rise along its gradient, and by more than along a random direction.

    `rise` and `drift` are the loss, (F, N), along the gradient and a random direction at the F
    `fractions` of eps, the first of which is 0; `curvature`, (N,), how far the loss at eps misses
    what the gradient foretold, as a share of that.
    """
    shares = {
        "first_step_rises_percent": percent(rise[1] > rise[0]),
        "beats_random_percent": percent(rise[-1] > drift[-1]),
    }
    verdict = at_least(min(shares.values()), RISING_PERCENT)
    sentence = {
        "pass": "The loss rises where its gradient points, and by more than elsewhere: gradients "
        "lead an attack uphill.",
        "warn": "For a good part of the images the loss does not rise where its gradient points: "
        "attacks lose their way on them.",
        "fail": "The loss does not rise where its gradient points: it is flat or jagged, and "
        "attacks that follow gradients are lost on it.",
    }[verdict]
    figures = shares | {
        "monotone_percent": percent((rise.diff(dim=0) >= 0).all(0)),
        "median_linearity_error": _finite(curvature.nanmedian()),
        "fractions_of_eps": fractions,
        "median_loss_along_gradient": [_finite(loss.median()) for loss in rise],
        "median_loss_along_random": [_finite(loss.median()) for loss in drift],
        "n": rise.shape[1],
    }
    return Finding("loss rises along its gradient", verdict, figures, sentence)


def cross_entropy(ce: Tensor, margin: Tensor) -> Finding:
    """The margin loss must not find much that cross-entropy, which can saturate, misses."""
    verdict = _lead(ce, margin, MARGIN_POINTS)
    sentence = {
        "pass": "Attacks through the margin of the logits find little that those through "
        "cross-entropy miss.",
        "warn": "Attacks through the margin of the logits fool more images than those through "
        "cross-entropy: quote the larger error.",
        "fail": "Attacks through the margin of the logits fool far more images than those through "
        "cross-entropy: the softmax is so certain that it hides the gradient.",
    }[verdict]
    figures = {"ce_error_percent": percent(ce), "margin_error_percent": percent(margin)}
    return Finding("cross-entropy against margin", verdict, figures | {"n": len(ce)}, sentence)


def autoattack_gap(auto: Tensor | None, pgd: Tensor) -> Finding:
    """AutoAttack, which needs no gradient for one of its parts, must not find much more."""
    check = "AutoAttack gap"
    if auto is None:
        return Finding(check, "not done", {}, "Add --autoattack: it takes minutes to hours.")
    verdict = _lead(pgd, auto, AUTOATTACK_POINTS)
    sentence = {
        "pass": "AutoAttack, the field's standard, finds little more than PGD.",
        "warn": "AutoAttack, the field's standard, finds clearly more than PGD: quote its error.",
        "fail": "AutoAttack, the field's standard, finds far more than PGD: the robustness that "
        "PGD shows is not real.",
    }[verdict]
    figures = {"autoattack_error_percent": percent(auto), "pgd_error_percent": percent(pgd)}
    return Finding(check, verdict, figures | {"n": len(pgd)}, sentence)


TOO_FEW = "but on too few images to rule out chance: repeat it with a larger --limit."


def outranks(stronger: Tensor, weaker: Tensor) -> Verdict:
    """Judge whether an attack is as strong as it ought to be, on the same images, (N,) bool.

    It may lose by `CHANCE_POINTS`; by more it fails if a sign test over the images on which the
    two differ rules out chance.
    """
    if percent(weaker) - percent(stronger) <= CHANCE_POINTS:
        return "pass"
    lost, won = int((weaker & ~stronger).sum()), int((stronger & ~weaker).sum())
    p = binomtest(lost, lost + won, alternative="greater").pvalue
    return "fail" if p < CHANCE else "warn"


def _lead(usual: Tensor, other: Tensor, points: tuple[float, float]) -> Verdict:
    """Judge by how many points `other` leads; beyond the last it must also rule out chance."""
    verdict = at_most(percent(other) - percent(usual), points)
    return "warn" if verdict == "fail" and outranks(usual, other) != "fail" else verdict


def at_least(value: float, limits: tuple[float, float]) -> Verdict:
    """Return pass from the first limit up, warn from the second, else fail."""
    return WORSE[sum(value < limit for limit in limits)]


def at_most(value: float, limits: tuple[float, float]) -> Verdict:
    """Return pass up to the first limit, warn up to the second, else fail."""
    return WORSE[sum(value > limit for limit in limits)]


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the most severe verdict."""
    return max(verdicts, key=WORSE.index)


def percent(which: Tensor) -> float:
    """Return the share of true values in percent."""
    return 100 * int(which.sum()) / which.numel()


def _finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None
