"""What the measurements of a diagnosis mean: findings, and their thresholds with reasons.

Every check takes the images that attacks have fooled, (N,) bool, and returns a `Finding`. "Points"
are percentage points of error.
"""

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scipy.stats import binomtest
from torch import Tensor

from fastiat.measuring.rows import read_rows, write_rows

DIAGNOSIS = "diagnosis.json"
Verdict = Literal["pass", "warn", "fail", "not done"]
WORSE: tuple[Verdict, ...] = ("pass", "warn", "fail")
Sentences = str | tuple[str, str, str]
"""What a finding means: one sentence, or those of pass, warn and fail."""

CHANCE_POINTS = 1.0
"""An attack may be this much weaker than one that should not beat it: both start at random."""
CHANCE = 0.025
"""If it is weaker still, the check fails only where a sign test gives a p-value below this."""
FGSM_POINTS = 30.0
"""PGD-20 is 10 to 29 points stronger than FGSM in the paper's adversarially trained rows but one
(40 points); up to 72 in rows trained without an attack, where FGSM's error is far too low."""
CONVERGED_POINTS = 3.0
"""Steps 20 to 100 add less than half a point in the paper's Table 7."""
UNBOUNDED = (99.0, 95.0)
"""Error in % that passes and that warns where every image is allowed: an attack may need more steps
on single images."""
NOISE_SHARE = (0.5, 0.9)
"""Noise's added error divided by PGD's that passes and that warns. Where gradients are useless, PGD
is one more random point, and the ratio is 1 or more."""
ZERO_PERCENT = (1.0, 10.0)
"""Images without a gradient that pass and that warn. Unmasked networks have them only where the
float32 softmax rounds to certainty."""
RISING_PERCENT = (90.0, 75.0)
"""Images whose loss rises along the gradient that pass and that warn; chance gives 50."""
MARGIN_POINTS = (3.0, 10.0)
"""Lead of the margin loss that passes and that warns: 1 to 3 points are usual after adversarial
training, where the softmax is far from certain."""
AUTOATTACK_POINTS = (5.0, 10.0)
"""Lead of AutoAttack that passes and that warns: about 3 points for adversarial training, about 30
for interpolation defences whose gradients were masked (Croce & Hein 2020, table 2)."""
TOO_FEW = "but on too few images to rule out chance: repeat it with a larger --limit."


@dataclass(frozen=True)
class Finding:
    """What one check found; diagnosis.json is a list of these."""

    check: str
    """Name of the check, such as "FGSM weaker than PGD"."""
    verdict: Verdict
    figures: dict
    """The measurements, by name with unit: numbers, lists of numbers, text or None."""
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


def fgsm_weaker(fgsm: Tensor, pgd: Tensor) -> Finding:
    """PGD's many small steps must fool at least as many images as FGSM's one large step."""
    verdict = outranks(pgd, fgsm)
    sentences: Sentences = (
        "PGD's many small steps fool at least as many images as FGSM's single large one.",
        f"FGSM's single step seems to beat PGD's many, {TOO_FEW}",
        "FGSM's single large step fools more images than PGD's many small ones: the gradients on "
        "PGD's way point in wrong directions, so they cannot be trusted.",
    )
    if verdict == "pass" and percent(pgd) - percent(fgsm) > FGSM_POINTS:
        verdict = "warn"
        sentences = (
            "PGD fools far more images than FGSM: a robustness figure from FGSM means nothing for "
            "this network, quote PGD's."
        )
    return _finding(
        "FGSM weaker than PGD", verdict, sentences, pgd,
        fgsm_error_percent=percent(fgsm), pgd_error_percent=percent(pgd),
    )  # fmt: skip


def more_steps(by_steps: dict[int, Tensor]) -> Finding:
    """More steps of one PGD run, {steps: fooled} in rising order, must not fool fewer images."""
    fooled = list(by_steps.values())
    verdict = worst(outranks(b, a) for a, b in itertools.pairwise(fooled))
    sentences: Sentences = (
        "More steps fool as many images or more, and the last ones add next to nothing: the attack "
        "has converged.",
        f"More steps seem to fool fewer images, {TOO_FEW}",
        "More steps fool fewer images: they lead away from adversarial examples, so the gradients "
        "cannot be trusted.",
    )
    *_, before, longest = by_steps
    if verdict == "pass" and percent(fooled[-1]) - percent(fooled[-2]) > CONVERGED_POINTS:
        verdict = "warn"
        sentences = (
            f"Going from {before} to {longest} steps still fools more images: the shorter attack "
            f"overstates robustness, quote the longer."
        )
    return _finding(
        "more steps never weaker", verdict, sentences, fooled[0],
        steps=list(by_steps), error_percent=[percent(f) for f in fooled],
    )  # fmt: skip


def larger_eps(by_eps: dict[float, Tensor]) -> Finding:
    """With eps, {eps: fooled} in rising order, the error must grow, and reach 100 %.

    The ball of the last eps contains every image.
    """
    fooled = list(by_eps.values())
    growing = worst(outranks(b, a) for a, b in itertools.pairwise(fooled))
    reaching = at_least(percent(fooled[-1]), UNBOUNDED)
    sentences: Sentences = (
        "An attack that may change every pixel freely fools every image, as it must.",
        "Even an attack that may change every pixel freely misses a few images: its steps do not "
        "find the adversarial examples there.",
        "Even an attack that may change every pixel freely fails on images that it could turn into "
        "any other: the attack is blinded, the network is not robust.",
    )
    if growing != "pass" and reaching == "pass":
        sentences = (
            "",
            f"A larger ball seems to make the attack weaker, {TOO_FEW}",
            "A larger ball makes the attack weaker, although it contains the smaller one: the "
            "attack does not find what is there, so the error at this eps is an underestimate.",
        )
    return _finding(
        "larger eps reaches 100 %", worst((growing, reaching)), sentences, fooled[0],
        eps=list(by_eps), error_percent=[percent(f) for f in fooled],
    )  # fmt: skip


def white_box(transferred: Tensor | None, own: Tensor) -> Finding:
    """Examples made on another network must not beat those made on this one."""
    check = "white-box beats transfer"
    if transferred is None:
        sentence = "Name another run for the same images with --partner, such as another seed's."
        return Finding(check, "not done", {}, sentence)
    sentences = (
        "Examples made on another network are no stronger than those made on this one.",
        f"Examples made on another network seem to beat those made on this one, {TOO_FEW}",
        "Examples made on another network fool more images than those made on this one: "
        "adversarial examples exist, and this network's gradients hide them.",
    )
    return _finding(
        check, outranks(own, transferred), sentences, own,
        transfer_error_percent=percent(transferred), pgd_error_percent=percent(own),
    )  # fmt: skip


def noise_weaker(clean: Tensor, noise: Tensor, pgd: Tensor, *, eps: float, points: int) -> Finding:
    """Noise, the worst of `points` random points in a ball, must add far less error than PGD."""
    gains = [percent(fooled) - percent(clean) for fooled in (noise, pgd)]
    share = gains[0] / gains[1] if gains[1] > 0 else None
    sentences = (
        "Random noise of the same size adds far fewer errors than the attack: its gradients are "
        "worth something.",
        "Random noise of the same size comes near the attack: its gradients are worth little.",
        "Random noise of the same size does as well as the attack: the gradients are worth "
        "nothing.",
    )
    return _finding(
        "noise far weaker than gradients",
        "fail" if share is None else at_most(share, NOISE_SHARE),
        sentences,
        pgd,
        eps=eps,
        points=points,
        clean_error_percent=percent(clean),
        noise_error_percent=percent(noise),
        pgd_error_percent=percent(pgd),
        share_of_pgds_gain=share,
    )


def gradients(norms: Tensor) -> Finding:
    """Every image must have a gradient to follow; `norms`, (N,), are the gradients' L2 norms."""
    finite = norms[norms.isfinite()]
    zero, broken = percent(norms == 0), percent(~norms.isfinite())
    sentences = (
        "Nearly every image has a gradient that an attack can follow.",
        "Some images have no gradient at all: attacks on them are blind.",
        "Gradients are zero or not finite: an attack that follows them is blind, and its failure "
        "says nothing about robustness.",
    )
    return _finding(
        "gradients are there",
        "fail" if broken else at_most(zero, ZERO_PERCENT),
        sentences,
        norms,
        zero_percent=zero,
        not_finite_percent=broken,
        median_norm=float(finite.median()) if len(finite) else None,
    )


def surface(along: Tensor, aside: Tensor, linearity: Tensor, fractions: list[float]) -> Finding:
    """The loss must rise along its gradient, and by more than in a random direction.

    along, aside: the loss, (F, N), along the gradient and in a random direction, at the F
        `fractions` of eps; the first fraction is 0.
    linearity: (N,), |rise of the loss at eps - predicted rise| / |predicted rise|.
    """
    first = percent(along[1] > along[0])
    beats = percent(along[-1] > aside[-1])
    sentences = (
        "The loss rises along its gradient, and by more than in a random direction: gradients lead "
        "an attack to higher loss.",
        "For a good part of the images the loss does not rise along its gradient: attacks on them "
        "go in wrong directions.",
        "The loss does not rise along its gradient: it is flat or jagged, and attacks that follow "
        "gradients are lost on it.",
    )
    return _finding(
        "loss rises along its gradient",
        at_least(min(first, beats), RISING_PERCENT),
        sentences,
        linearity,
        first_step_rises_percent=first,
        beats_random_percent=beats,
        monotone_percent=percent((along.diff(dim=0) >= 0).all(0)),
        median_linearity_error=_finite(linearity.nanmedian()),
        fractions_of_eps=fractions,
        median_loss_along_gradient=[_finite(loss.median()) for loss in along],
        median_loss_along_random=[_finite(loss.median()) for loss in aside],
    )


def cross_entropy(ce: Tensor, margin: Tensor) -> Finding:
    """The margin loss must not fool many images that cross-entropy, which can saturate, misses."""
    sentences = (
        "Attacks on the margin of the logits find little that attacks on cross-entropy miss.",
        "Attacks on the margin of the logits fool more images than attacks on cross-entropy: quote "
        "the larger error.",
        "Attacks on the margin of the logits fool far more images than attacks on cross-entropy: "
        "the softmax is so certain that it hides the gradient.",
    )
    return _finding(
        "cross-entropy against margin", _lead(ce, margin, MARGIN_POINTS), sentences, ce,
        ce_error_percent=percent(ce), margin_error_percent=percent(margin),
    )  # fmt: skip


def autoattack_gap(auto: Tensor | None, pgd: Tensor) -> Finding:
    """AutoAttack, one of whose parts needs no gradient, must not find much more than PGD."""
    check = "AutoAttack gap"
    if auto is None:
        return Finding(check, "not done", {}, "Add --autoattack: it takes minutes to hours.")
    sentences = (
        "AutoAttack, the field's standard, finds little more than PGD.",
        "AutoAttack, the field's standard, finds clearly more than PGD: quote its error.",
        "AutoAttack, the field's standard, finds far more than PGD: the robustness that PGD shows "
        "is not real.",
    )
    return _finding(
        check, _lead(pgd, auto, AUTOATTACK_POINTS), sentences, pgd,
        autoattack_error_percent=percent(auto), pgd_error_percent=percent(pgd),
    )  # fmt: skip


def _finding(
    check: str, verdict: Verdict, sentences: Sentences, images: Tensor, **figures: Any
) -> Finding:
    """Return a finding on `images`, a tensor of length N."""
    if not isinstance(sentences, str):
        sentences = sentences[WORSE.index(verdict)]
    return Finding(check, verdict, figures | {"n": len(images)}, sentences)


def outranks(stronger: Tensor, weaker: Tensor) -> Verdict:
    """Compare two attacks on the same images, (N,) bool: `stronger` should not be the weaker one.

    It may be weaker by `CHANCE_POINTS`. By more, it fails if a sign test on the images on which the
    two differ gives a p-value below `CHANCE`.
    """
    if percent(weaker) - percent(stronger) <= CHANCE_POINTS:
        return "pass"
    lost, won = int((weaker & ~stronger).sum()), int((stronger & ~weaker).sum())
    p = binomtest(lost, lost + won, alternative="greater").pvalue
    return "fail" if p < CHANCE else "warn"


def _lead(usual: Tensor, other: Tensor, points: tuple[float, float]) -> Verdict:
    """Compare the lead of `other` with `points`; it fails only if chance is ruled out too."""
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
