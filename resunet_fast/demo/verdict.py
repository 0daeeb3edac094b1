"""When the demo must call its own result bad, so that running it is a check as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

from resunet_fast.demo.measure import Agreement, Quality

# Training amplifies rounding: a change of one unit in the last place of the initial weights alone
# moved the plain model's loss (half the width, batches of 4) by 0.04 on average within 80 steps,
# 0.17 at most; fast models that agree at equal weights moved by 0.06 in 240 steps and 0.07 in 280.
# So the curves are held to rounding at the first step, to about twice that amplification
# afterwards, and the arithmetic itself is checked at equal weights.
MAXIMUM_FIRST_DIFFERENCE = 1e-4
MAXIMUM_MEAN_DIFFERENCE = 0.15
MAXIMUM_DISAGREEMENT = {
    # 1e-6 and 3e-6 were seen after training, 1e-3 for the gradients of fresh weights, where single
    # ReLUs and maxima flip on rounding.
    "cpu": Agreement(probability=1e-4, gradient=1e-2),
    # By default cuDNN rounds the factors of float32 convolutions to TF32: 10 bits.
    "cuda": Agreement(probability=5e-2, gradient=1e-1),
}
MINIMUM_DICE = 0.8
# Two trainings that part by rounding end in different minima, either way: 0.04 and 0.05 were seen.
MAXIMUM_DICE_DIFFERENCE = 0.1


def agreement_complaints(agreement: Agreement, device: str) -> list[str]:
    """Say where the trained fast network and the plain one differ at equal weights.

    Args:
        agreement: see `measure.agreement`.
        device: "cpu" or "cuda", which sets the tolerance.

    Returns:
        Sentences; empty when they agree.
    """
    allowed = MAXIMUM_DISAGREEMENT[device]
    return [
        f"at equal weights the models' {what} differ by {value:.1e} (allowed: {limit:.0e})"
        for what, value, limit in (
            ("probabilities", agreement.probability, allowed.probability),
            ("gradients", agreement.gradient, allowed.gradient),
        )
        if not value <= limit
    ]


def curve_complaints(fast: Sequence[float], reference: Sequence[float]) -> list[str]:
    """Say what two loss curves show that fp32 rounding does not explain.

    Args:
        fast: loss of each step.
        reference: loss of each step on the same batches.

    Returns:
        Sentences; empty when the curves agree.
    """
    if not all(map(math.isfinite, (*fast, *reference))):
        return ["a loss is not finite"]
    differences = [abs(a - b) for a, b in zip(fast, reference, strict=True)]
    complaints = []
    if differences[0] > MAXIMUM_FIRST_DIFFERENCE:
        complaints.append(
            f"the first losses, from equal weights, differ by {differences[0]:.2e} "
            f"(allowed: {MAXIMUM_FIRST_DIFFERENCE:.0e})"
        )
    mean = sum(differences) / len(differences)
    if mean > MAXIMUM_MEAN_DIFFERENCE:
        complaints.append(
            f"the loss curves differ by {mean:.4f} on average "
            f"(allowed: {MAXIMUM_MEAN_DIFFERENCE:.4f}): more than rounding explains"
        )
    return complaints


def quality_complaints(fast: Quality, reference: Quality) -> list[str]:
    """Say what is wrong with the held-out results of a whole training.

    Args:
        fast: of the fast network.
        reference: of the plain network.

    Returns:
        Sentences; empty when both are good and alike.
    """
    complaints = []
    for label, result in (("fast", fast), ("reference", reference)):
        # Written so that a NaN complains too.
        if not result.dice >= MINIMUM_DICE:
            complaints.append(
                f"the held-out Dice of the {label} model is {result.dice:.3f} "
                f"(expected: at least {MINIMUM_DICE})"
            )
    if not abs(fast.dice - reference.dice) <= MAXIMUM_DICE_DIFFERENCE:
        complaints.append(
            f"the held-out Dice of the two models differs by {abs(fast.dice - reference.dice):.3f} "
            f"(allowed: {MAXIMUM_DICE_DIFFERENCE})"
        )
    return complaints
