"""NumPy references of functions that NumPy lacks or defines only in part.

`erf` and `erfc` are W. J. Cody's rational approximations ("Rational Chebyshev approximations for the error
function", Math. Comp. 23, 1969; coefficients of SPECFUN's CALERF), within a few ulp of f64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Numerator and denominator, highest power first, for |x| <= 0.46875 (in x*x), up to 4 (in x), beyond (in 1/(x*x)).
ERF_SMALL = ((1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
              3.20937758913846947e3),
             (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3))
ERFC_MIDDLE = ((2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
                2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
                1.23033935479799725e3),
               (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
                3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3))
ERFC_LARGE = ((1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
               1.60837851487422766e-2, 6.58749161529837803e-4),
              (1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
               2.33520497626869185e-3))
ONE_OVER_SQRT_PI = 5.6418958354775628695e-1
SMALL, MIDDLE, UNDERFLOW = 0.46875, 4.0, 27.3


def _ratio(coefficients: Any, x: Any) -> Any:
    numerator, denominator = coefficients
    return np.polyval(numerator, x) / np.polyval(denominator, x)


def _erf_small(x: Any) -> Any:
    return x * _ratio(ERF_SMALL, x * x)


def _gauss(y: Any) -> Any:
    """exp(-y*y) in two exact parts: y*y alone would lose the last bits."""
    head = np.trunc(y * 16) / 16
    return np.exp(-head * head) * np.exp(-(y - head) * (y + head))


def _erfc_middle(y: Any) -> Any:
    return _gauss(y) * _ratio(ERFC_MIDDLE, y)


def _erfc_large(y: Any) -> Any:
    z = 1 / (y * y)
    return _gauss(y) * (ONE_OVER_SQRT_PI - z * _ratio(ERFC_LARGE, z)) / y


def _piecewise(x: np.ndarray, small: Any, tail: Any) -> np.ndarray:
    """`small(x)` near zero, else `tail(x, erfc(|x|))`; each approximation sees only the elements it is for."""
    flat = x.astype(np.float64).ravel()
    y = np.abs(flat)
    beyond = np.where(np.isnan(flat), np.nan, 0.0)
    for low, high, fn in ((SMALL, MIDDLE, _erfc_middle), (MIDDLE, UNDERFLOW, _erfc_large)):
        (where,) = np.nonzero((y > low) & (y <= high))
        beyond[where] = fn(y[where])
    out = tail(flat, beyond)
    (where,) = np.nonzero(y <= SMALL)
    out[where] = small(flat[where])
    return out.reshape(x.shape).astype(x.dtype)


def erf(x: np.ndarray) -> np.ndarray:
    """Error function; any float array, computed in f64."""
    return _piecewise(x, _erf_small, lambda x, beyond: np.copysign(1 - beyond, x))


def erfc(x: np.ndarray) -> np.ndarray:
    """1 - erf(x) without cancellation; any float array, computed in f64."""
    return _piecewise(x, lambda x: 1 - _erf_small(x), lambda x, beyond: np.where(x < 0, 2 - beyond, beyond))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)); the exponential never overflows, so small results keep their digits."""
    z = np.exp(-np.abs(x))
    return np.where(x >= 0, x.dtype.type(1), z) / (1 + z)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x))."""
    return np.logaddexp(x, x.dtype.type(0))


def rsqrt(x: np.ndarray) -> np.ndarray:
    """1 / sqrt(x)."""
    return 1 / np.sqrt(x)


def power(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x ** y. An integer to a negative power, which NumPy refuses, is truncated: 0 unless x is 1 or -1."""
    if x.dtype.kind != "i":
        return np.power(x, y)
    odd = (y & 1).astype(bool)
    of_negative = np.where(x == 1, 1, np.where(x == -1, np.where(odd, -1, 1), 0)).astype(x.dtype)
    return np.where(y < 0, of_negative, np.power(x, np.maximum(y, 0)))
