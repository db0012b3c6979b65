"""How the kernels compute GELU: on a CPU `x * (1/2 + u * P(2 u^2 / c^2 - 1))`, u = x clamped to [-c, c].

Fits P with each number of terms so that the largest error of GELU is nearly as small as possible (Lawson's reweighted
least squares), under the condition that GELU is exact beyond the clamp. Prints the coefficients that riformer/runtime
uses, and their error in float32. On a GPU it is y * (1 + tanh(y * (y^2 + a))) / (2 s) with
y = s x: fits s and a.

    python tools/fit_gelu.py
"""

import numpy as np
from numpy.polynomial import chebyshev
from scipy.optimize import minimize
from scipy.special import ndtr


def fit(num_terms: int, clamp: float, iterations: int = 80) -> np.ndarray:
    """Coefficients of P, the constant first."""
    x = clamp * np.cos(np.pi * (np.arange(6000) + 0.5) / 12000)
    basis = chebyshev.chebvander(2 * (x / clamp) ** 2 - 1, num_terms - 1) * (x * x)[:, None]
    wanted, weights = x * (ndtr(x) - 0.5), np.ones_like(x)
    for _ in range(iterations):
        root = np.sqrt(weights)  # the first coefficient follows from P(1) = 1 / (2 c)
        free = (basis[:, 1:] - basis[:, :1]) * root[:, None]
        rest = np.linalg.lstsq(free, (wanted - basis[:, 0] * 0.5 / clamp) * root, rcond=None)[0]
        coefficients = np.concatenate([[0.5 / clamp - rest.sum()], rest])
        weights *= abs(basis @ coefficients - wanted) + 1e-13
        weights /= weights.mean()
    return chebyshev.cheb2poly(coefficients)


def largest_error(coefficients: np.ndarray, clamp: float) -> float:
    """Of GELU from -12 to 12, computed in float32."""
    x = np.linspace(-12, 12, 400_001, dtype=np.float32)
    u = np.clip(x, -np.float32(clamp), np.float32(clamp))
    p = np.polynomial.polynomial.polyval(
        u * u * np.float32(2 / clamp**2) - np.float32(1), coefficients.astype(np.float32), tensor=False
    )
    return float(abs(x * (u * p.astype(np.float32) + np.float32(0.5)) - x * ndtr(x.astype(float))).max())


def fit_tanh() -> tuple[float, float, float]:
    """s and a, and their largest error."""
    x = np.linspace(-8, 8, 40_001)

    def error(parameters: np.ndarray) -> float:
        y = parameters[0] * x
        return float(abs(y * (1 + np.tanh(y * (y * y + parameters[1]))) / (2 * parameters[0]) - x * ndtr(x)).max())

    starts = [np.array([0.33, a]) for a in (2.41, 2.42, 2.43)]
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    best = min((minimize(error, start, method="Nelder-Mead", options=options) for start in starts), key=lambda r: r.fun)
    return float(best.x[0]), float(best.x[1]), float(best.fun)


if __name__ == "__main__":
    print("tanh: s {:.11f}, a {:.10f}, largest error {:.1e}".format(*fit_tanh()))
    for name, num_terms, clamp in (("close", 14, 5.3), ("fast", 8, 4.2)):
        coefficients = fit(num_terms, clamp)
        print(f"{name}: {num_terms} terms, clamp {clamp}, largest error {largest_error(coefficients, clamp):.1e}")
        print("  " + ", ".join(f"{value:.9e}f" for value in coefficients))
