"""Findings of a diagnosis: what its measurements mean, and the thresholds with their reasons.

Most checks take tensors that say which images an attack has fooled, (N,) bool. Every check returns
a `Finding`. "Points" are percentage points of error.
"""

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import binomtest
from torch import Tensor

from fastiat.measuring.rows import read_rows

DIAGNOSIS = "diagnosis.json"
Verdict = Literal["pass", "warn", "fail", "not done"]
WORSE: tuple[Verdict, ...] = ("pass", "warn", "fail")
Sentences = str | tuple[str, str, str]
"""The meaning of a finding: one sentence, or a sentence each for pass, warn and fail."""

CHANCE_POINTS = 1.0
"""Difference in points that passes if the attack that should be stronger is weaker. The attacks
have random starts, so small differences are chance."""
CHANCE = 0.025
"""A larger difference fails only if a sign test gives a p-value below this; else it warns."""
FGSM_POINTS = 30.0
"""Lead of PGD over FGSM above which the check warns. In the paper's adversarially trained rows,
PGD-20 is 10 to 29 points stronger than FGSM, with one exception (40 points). In rows trained
without an attack the lead is up to 72 points, because FGSM's error is far too low."""
CONVERGED_POINTS = 3.0
"""Error added by the last steps above which the check warns. In the paper's Table 7, steps 20 to
100 add less than half a point."""
UNBOUNDED = (99.0, 95.0)
"""Least error in % that passes, and that warns, if every image is allowed: an attack may need more
steps for some images."""
NOISE_SHARE = (0.5, 0.9)
"""Largest ratio that passes, and that warns: the error added by noise divided by the error added by
PGD. If gradients are useless, PGD is one more random point, and the ratio is 1 or more."""
ZERO_PERCENT = (1.0, 10.0)
"""Largest share in % of images with a zero gradient that passes, and that warns. Without masking, a
gradient is zero only if the float32 softmax rounds to 1."""
RISING_PERCENT = (90.0, 75.0)
"""Least share in % of images whose loss rises along the gradient that passes, and that warns; a
random direction gives 50."""
MARGIN_POINTS = (3.0, 10.0)
"""Largest lead of the margin loss over cross-entropy that passes, and that warns. Usual are 1 to 3
points after adversarial training, where the softmax is far from 1."""
AUTOATTACK_POINTS = (5.0, 10.0)
"""Largest lead of AutoAttack over PGD that passes, and that warns. The lead is about 3 points for
adversarial training, and about 30 for interpolation defences whose gradients were masked (Croce &
Hein 2020, table 2)."""
TOO_FEW = "but on too few images to rule out chance: repeat it with a larger --limit."


@dataclass(frozen=True)
class Finding:
    """The result of one check; diagnosis.json is a list of findings."""

    check: str
    """Name of the check, such as "FGSM weaker than PGD"."""
    verdict: Verdict
    figures: dict
    """The measurements by name, which contains the unit: numbers, lists of numbers, text, None."""
    sentence: str
    """The meaning of the finding, for a newcomer."""


def read_diagnosis(run_dir: str | os.PathLike[str]) -> list[Finding]:
    """Return the findings of the last `fastiat diagnose` on a run, or [] if there are none.

    Raises `InputError` for a damaged diagnosis.json.
    """
    return read_rows(run_dir, DIAGNOSIS, Finding)


def fgsm_weaker(fgsm: Tensor, pgd: Tensor) -> Finding:
    """Check that PGD's small steps fool at least as many images as FGSM's single large step."""
    verdict = outranks(pgd, fgsm)
    sentences: Sentences = (
        "PGD's many small steps fool at least as many images as FGSM's single large step.",
        f"FGSM's single step seems to fool more images than PGD's many steps, {TOO_FEW}",
        "FGSM's single large step fools more images than PGD's many small steps: PGD's gradients "
        "point in wrong directions, so they cannot be trusted.",
    )
    if verdict == "pass" and percent(pgd) - percent(fgsm) > FGSM_POINTS:
        verdict = "warn"
        sentences = (
            "PGD fools far more images than FGSM: an error under FGSM says nothing about the "
            "robustness of this network; quote the error under PGD."
        )
    return _finding(
        "FGSM weaker than PGD", verdict, sentences, pgd,
        fgsm_error_percent=percent(fgsm), pgd_error_percent=percent(pgd),
    )  # fmt: skip


def more_steps(by_steps: dict[int, Tensor]) -> Finding:
    """Check that more steps of PGD, {steps: fooled} in rising order, do not fool fewer images."""
    fooled = list(by_steps.values())
    verdict = worst(outranks(b, a) for a, b in itertools.pairwise(fooled))
    sentences: Sentences = (
        "More steps fool at least as many images, and the last steps add very little: the attack "
        "has converged.",
        f"More steps seem to fool fewer images, {TOO_FEW}",
        "More steps fool fewer images: they lead away from adversarial examples, so the gradients "
        "cannot be trusted.",
    )
    *_, before, longest = by_steps
    if verdict == "pass" and percent(fooled[-1]) - percent(fooled[-2]) > CONVERGED_POINTS:
        verdict = "warn"
        sentences = (
            f"{longest} steps fool more images than {before}: the shorter attack overstates "
            f"robustness; quote the error under the longer attack."
        )
    return _finding(
        "more steps never weaker", verdict, sentences, fooled[0],
        steps=list(by_steps), error_percent=[percent(f) for f in fooled],
    )  # fmt: skip


def larger_eps(by_eps: dict[float, Tensor]) -> Finding:
    """Check that the error grows with eps, {eps: fooled} in rising order, and reaches 100 %.

    The ball of the last eps must contain every image.
    """
    fooled = list(by_eps.values())
    growing = worst(outranks(b, a) for a, b in itertools.pairwise(fooled))
    reaching = at_least(percent(fooled[-1]), UNBOUNDED)
    sentences: Sentences = (
        "An attack that may change every pixel freely fools every image, as it should.",
        "Even an attack that may change every pixel freely misses a few images: its steps do not "
        "find the adversarial examples of these images.",
        "Even an attack that may change every pixel freely misses many images, although it could "
        "turn them into any other: it follows useless gradients, and the network is not robust.",
    )
    if growing != "pass" and reaching == "pass":
        sentences = (
            "",
            f"A larger ball seems to make the attack weaker, {TOO_FEW}",
            "A larger ball makes the attack weaker, although it contains the smaller ball: the "
            "attack misses adversarial examples, so the error at this eps is an underestimate.",
        )
    return _finding(
        "larger eps reaches 100 %", worst((growing, reaching)), sentences, fooled[0],
        eps=list(by_eps), error_percent=[percent(f) for f in fooled],
    )  # fmt: skip


def white_box(transferred: Tensor | None, own: Tensor) -> Finding:
    """Check that examples made on another network do not fool more images than this network's own.

    `transferred` is None if there is no other network: then the check is not done.
    """
    check = "white-box beats transfer"
    if transferred is None:
        sentence = "Give a run on the same images, such as one with another seed, with --partner."
        return Finding(check, "not done", {}, sentence)
    sentences = (
        "Examples made on another network fool no more images than examples made on this network.",
        "Examples made on another network seem to fool more images than examples made on this "
        f"network, {TOO_FEW}",
        "Examples made on another network fool more images than examples made on this network: "
        "adversarial examples exist, and this network's gradients hide them.",
    )
    return _finding(
        check, outranks(own, transferred), sentences, own,
        transfer_error_percent=percent(transferred), pgd_error_percent=percent(own),
    )  # fmt: skip


def noise_weaker(clean: Tensor, noise: Tensor, pgd: Tensor, *, eps: float, points: int) -> Finding:
    """Check that noise adds far less error than PGD.

    clean: images that are misclassified without an attack.
    noise: images that are misclassified at any of `points` random points in the ball.
    pgd: images that PGD fools.
    eps: radius of the ball of both.
    """
    gains = [percent(fooled) - percent(clean) for fooled in (noise, pgd)]
    share = gains[0] / gains[1] if gains[1] > 0 else None
    sentences = (
        "Random noise of the same size adds far fewer errors than the attack: the gradients help "
        "the attack.",
        "Random noise of the same size adds a large part of the errors that the attack adds: the "
        "gradients help the attack little.",
        "Random noise of the same size adds about as many errors as the attack: the gradients do "
        "not help the attack.",
    )
    verdict: Verdict = "fail" if share is None else at_most(share, NOISE_SHARE)
    return _finding(
        "noise far weaker than gradients", verdict, sentences, pgd, eps=eps, points=points,
        clean_error_percent=percent(clean), noise_error_percent=percent(noise),
        pgd_error_percent=percent(pgd), share_of_pgds_gain=share,
    )  # fmt: skip


def gradients(norms: Tensor) -> Finding:
    """Check that every image has a gradient; `norms`, (N,), are the L2 norms of the gradients."""
    finite = norms[norms.isfinite()]
    zero, broken = percent(norms == 0), percent(~norms.isfinite())
    sentences = (
        "Nearly every image has a gradient that an attack can follow.",
        "The gradient of some images is zero: attacks cannot follow it.",
        "Gradients are zero or not finite: an attack cannot follow them, and its failure says "
        "nothing about robustness.",
    )
    verdict: Verdict = "fail" if broken else at_most(zero, ZERO_PERCENT)
    return _finding(
        "gradients are there", verdict, sentences, norms,
        zero_percent=zero, not_finite_percent=broken,
        median_norm=float(finite.median()) if len(finite) else None,
    )  # fmt: skip


def surface(along: Tensor, aside: Tensor, linearity: Tensor, fractions: list[float]) -> Finding:
    """Check that the loss rises along its gradient, and by more than in a random direction.

    along, aside: the loss, (F, N), along the gradient and in a random direction, at the F
        `fractions` of eps; the first fraction is 0.
    linearity: (N,), |rise of the loss at eps - predicted rise| / |predicted rise|.
    """
    first = percent(along[1] > along[0])
    beats = percent(along[-1] > aside[-1])
    sentences = (
        "The loss rises along its gradient, and by more than in a random direction: gradients lead "
        "an attack to higher loss.",
        "For many images the loss does not rise along its gradient: attacks on these images step "
        "in wrong directions.",
        "The loss does not rise along its gradient: the loss is flat or jagged, and attacks that "
        "follow gradients fail.",
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
    """Check that PGD on the margin loss fools few images that PGD on cross-entropy misses.

    Cross-entropy can saturate, so that its gradient vanishes; the margin loss cannot.
    """
    sentences = (
        "Attacks on the margin of the logits fool few images that attacks on cross-entropy miss.",
        "Attacks on the margin of the logits fool more images than attacks on cross-entropy: quote "
        "the larger error.",
        "Attacks on the margin of the logits fool far more images than attacks on cross-entropy: "
        "the softmax is so close to 0 and 1 that the gradient of cross-entropy vanishes.",
    )
    return _finding(
        "cross-entropy against margin", _lead(ce, margin, MARGIN_POINTS), sentences, ce,
        ce_error_percent=percent(ce), margin_error_percent=percent(margin),
    )  # fmt: skip


def autoattack_gap(auto: Tensor | None, pgd: Tensor) -> Finding:
    """Check that AutoAttack, one part of which needs no gradient, fools few images more than PGD.

    `auto` is None if AutoAttack has not run: then the check is not done.
    """
    check = "AutoAttack gap"
    if auto is None:
        return Finding(check, "not done", {}, "Add --autoattack, which takes minutes to hours.")
    sentences = (
        "AutoAttack, the field's standard, fools few images more than PGD.",
        "AutoAttack, the field's standard, fools clearly more images than PGD: quote its error.",
        "AutoAttack, the field's standard, fools far more images than PGD: the robustness that PGD "
        "shows is not real.",
    )
    return _finding(
        check, _lead(pgd, auto, AUTOATTACK_POINTS), sentences, pgd,
        autoattack_error_percent=percent(auto), pgd_error_percent=percent(pgd),
    )  # fmt: skip


def _finding(
    check: str, verdict: Verdict, sentences: Sentences, images: Tensor, **figures: Any
) -> Finding:
    """Return a finding on N images; `images` is any tensor of length N."""
    if not isinstance(sentences, str):
        sentences = sentences[WORSE.index(verdict)]
    return Finding(check, verdict, figures | {"n": len(images)}, sentences)


def outranks(stronger: Tensor, weaker: Tensor) -> Verdict:
    """Check that the attack `stronger` is not weaker than `weaker`; (N,) bool on the same images.

    A difference of up to `CHANCE_POINTS` passes. A larger one fails if a sign test on the images on
    which the two differ gives a p-value below `CHANCE`, and warns otherwise.
    """
    if percent(weaker) - percent(stronger) <= CHANCE_POINTS:
        return "pass"
    lost, won = int((weaker & ~stronger).sum()), int((stronger & ~weaker).sum())
    p = binomtest(lost, lost + won, alternative="greater").pvalue
    return "fail" if p < CHANCE else "warn"


def _lead(usual: Tensor, other: Tensor, points: tuple[float, float]) -> Verdict:
    """Compare the lead of `other` over `usual` with the limits `points`, as `at_most` does.

    The result is "warn" instead of "fail" if a sign test does not rule out chance, see `outranks`.
    """
    verdict = at_most(percent(other) - percent(usual), points)
    return "warn" if verdict == "fail" and outranks(usual, other) != "fail" else verdict


def at_least(value: float, limits: tuple[float, float]) -> Verdict:
    """Return "pass" for values from the first limit up, "warn" from the second up, else "fail"."""
    return WORSE[sum(value < limit for limit in limits)]


def at_most(value: float, limits: tuple[float, float]) -> Verdict:
    """Return "pass" for values up to the first limit, "warn" up to the second, else "fail"."""
    return WORSE[sum(value > limit for limit in limits)]


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the most severe verdict."""
    return max(verdicts, key=WORSE.index)


def percent(which: Tensor) -> float:
    """Return the share of True values in percent."""
    return 100 * int(which.sum()) / which.numel()


def _finite(value: Tensor) -> float | None:
    """Return `value` as a float, or None, since JSON has no NaN and no infinity."""
    return float(value) if value.isfinite() else None
