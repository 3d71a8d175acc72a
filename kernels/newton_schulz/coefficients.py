"""The polynomials x <- a x + b x^3 + c x^5 that Newton-Schulz applies to singular values. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COEFFICIENTS", "Coefficients"]

Polynomial = tuple[float, float, float]  # a, b, c


@dataclass(frozen=True)
class Coefficients:
    """`of_steps`: one polynomial a step, the last for every step beyond. `margin`: matrices are divided by so many
    times their Frobenius norm, to keep rounding from lifting a singular value to where a polynomial diverges; and
    `epsilon` beside it, so that a matrix of zeros stays one."""

    of_steps: tuple[Polynomial, ...]
    margin: float = 1.0
    epsilon: float = 1e-7

    def polynomials(self, steps: int) -> list[Polynomial]:
        return [self.of_steps[min(i, len(self.of_steps) - 1)] for i in range(steps)]


def _safe(polynomial: Polynomial, by: float) -> Polynomial:
    """x / by in place of x."""
    a, b, c = polynomial
    return a / by, b / by**3, c / by**5


# Amsel et al., "The Polar Express" (arXiv:2505.16932), algorithm 1: each polynomial is the best one for where the one
# before it leaves singular values of [1e-3, 1]; all but the last with the paper's margin for half precision.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

COEFFICIENTS: dict[str, Coefficients] = {
    # Jordan et al. (2024): the greatest slope at zero, so that five steps lift even small singular values into about
    # [0.7, 1.2], where they stay and scatter.
    "classic": Coefficients(((3.4445, -4.7750, 2.0315),)),
    "polar_express": Coefficients(
        (*(_safe(polynomial, 1.01) for polynomial in _POLAR_EXPRESS), (1.875, -1.25, 0.375)), margin=1.01
    ),
    # The same method with wider margins, 2 %, in five steps, as modded-nanogpt (Jordan et al., 2024 to 2026) has it.
    "polar_express_nanogpt": Coefficients(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        margin=1.02,
        epsilon=1e-6,
    ),
}
