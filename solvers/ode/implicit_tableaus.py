"""Coefficients of the diagonally implicit Runge-Kutta methods with an explicit first stage, each with its source."""

from __future__ import annotations

from .tableau import Row, Tableau

# The implicit Euler method with an explicit first stage, which makes the trapezoidal rule the embedded method.
IMPLICIT_EULER = Tableau(a=((0.0,), (0.0, 1.0)), b=(0.0, 1.0), error=(-0.5, 0.5))


def _stiffly_accurate_pair(*rows: Row, weights: tuple[Row, ...] | None = None) -> Tableau:
    """A method whose last two rows are the weights of its solution and of the embedded one."""
    last, before = rows[-1], (*rows[-2], 0.0)
    return Tableau(a=rows, b=last, error=tuple(x - y for x, y in zip(last, before)), weights=weights)


def _kvaerno3() -> Tableau:
    """Kvaerno 2004, section 4: order 3(2) in four stages. gamma is a root of 6 x^3 - 18 x^2 + 9 x - 1."""
    g = 0.43586652150845899942
    weights = ((6 * g - 1) / (12 * g), -1 / ((24 * g - 12) * g), (-6 * g * g + 6 * g - 1) / (6 * g - 3), g)
    embedded = ((-4 * g * g + 6 * g - 1) / (4 * g), (1 - 2 * g) / (4 * g), g)
    return _stiffly_accurate_pair((0.0,), (g, g), embedded, weights)


def _kvaerno5() -> Tableau:
    """Kvaerno 2004, section 4: order 5(4) in seven stages.

    Its dense output is our own: of order 4, continuous with its derivative at the steps' ends. The conditions leave
    two parameters free in the coefficients of theta^4; these have the smallest norm.
    """
    g = 0.26
    rows: tuple[Row, ...] = (
        (0.0,),
        (g, g),
        (0.13, 0.84033320996790809, g),
        (0.22371961478320505, 0.47675532319799699, -0.06470895363112615, g),
        (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998, g),
        (0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676, g),
        (
            0.13659751177640291,
            0.0,
            -0.05496908796538376,
            -0.04118626728321046,
            0.62993304899016403,
            0.06962479448202728,
            g,
        ),
    )
    fourth = (
        -0.484249349645859158,
        0.0,
        0.992174701180346153,
        -0.624108033102156112,
        1.38010042737842507,
        -0.631958872905377858,
        -0.63195887290537799,
    )
    first = tuple(float(i == 0) for i in range(7))
    end = tuple(float(i == 6) for i in range(7))
    value = tuple(b - f - w for b, f, w in zip(rows[-1], first, fourth))
    slope = tuple(e - f - 4 * w for e, f, w in zip(end, first, fourth))
    third = tuple(s - 2 * v for v, s in zip(value, slope))
    second = tuple(v - t for v, t in zip(value, third))
    return _stiffly_accurate_pair(*rows, weights=(first, second, third, fourth))


KVAERNO3 = _kvaerno3()
KVAERNO5 = _kvaerno5()
