"""Coefficients of the explicit Runge-Kutta methods, each with its source."""

from __future__ import annotations

from fractions import Fraction as F

from .tableau import Row, Tableau


def row(*values: float | int | F) -> Row:
    """A row of floats."""
    return tuple(float(v) for v in values)


EULER = Tableau(a=((),), b=(1.0,))

MIDPOINT = Tableau(a=((), (0.5,)), b=(0.0, 1.0))

# Ralston 1962: the second-order method with the smallest bound on its truncation error.
RALSTON = Tableau(a=((), row(F(2, 3))), b=(0.25, 0.75))

# Heun's second-order method with Euler's embedded.
HEUN = Tableau(a=((), (1.0,)), b=(0.5, 0.5), error=(-0.5, 0.5))

# Kutta 1901.
RK4 = Tableau(a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), b=row(F(1, 6), F(1, 3), F(1, 3), F(1, 6)))

# Bogacki and Shampine 1989, "A 3(2) pair of Runge-Kutta formulas".
BOSH3 = Tableau(
    a=((), (0.5,), (0.0, 0.75), row(F(2, 9), F(1, 3), F(4, 9))),
    b=row(F(2, 9), F(1, 3), F(4, 9), 0),
    error=row(F(2, 9) - F(7, 24), F(1, 3) - F(1, 4), F(4, 9) - F(1, 3), F(-1, 8)),
)


def _dopri5() -> Tableau:
    """Dormand and Prince 1980, with the error estimate of Shampine 1986, "Some practical Runge-Kutta formulas", and the
    dense output of Hairer, Norsett, Wanner 1993, section II.6.

    The original estimate is half as large again: it takes more steps than the accuracy asked for needs.
    """
    b = [F(35, 384), F(0), F(500, 1113), F(125, 192), F(-2187, 6784), F(11, 84), F(0)]
    embedded = [F(1951, 21600), F(0), F(22642, 50085), F(451, 720), F(-12231, 42400), F(649, 6300), F(1, 60)]
    d = [
        F(-12715105075, 11282082432),
        F(0),
        F(87487479700, 32700410799),
        F(-10690763975, 1880347072),
        F(701980252875, 199316789632),
        F(-1453857185, 822651844),
        F(69997945, 29380423),
    ]
    start, end = [F(i == 0) for i in range(7)], [F(i == 6) for i in range(7)]
    # theta (b + (1 - theta) (bump + theta (rest + (1 - theta) d))), bump = k_0 - b, rest = 2 b - k_0 - k_6.
    bump = [s - x for s, x in zip(start, b)]
    rest = [x - e - p for x, e, p in zip(b, end, bump)]
    powers = (
        [x + p for x, p in zip(b, bump)],
        [r + q - p for p, r, q in zip(bump, rest, d)],
        [-r - 2 * q for r, q in zip(rest, d)],
        d,
    )
    return Tableau(
        a=(
            (),
            row(F(1, 5)),
            row(F(3, 40), F(9, 40)),
            row(F(44, 45), F(-56, 15), F(32, 9)),
            row(F(19372, 6561), F(-25360, 2187), F(64448, 6561), F(-212, 729)),
            row(F(9017, 3168), F(-355, 33), F(46732, 5247), F(49, 176), F(-5103, 18656)),
            row(*b[:6]),
        ),
        b=row(*b),
        error=row(*(x - y for x, y in zip(b, embedded))),
        weights=tuple(row(*power) for power in powers),
    )


def _tsit5() -> Tableau:
    """Tsitouras 2011, "Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption"."""
    b = (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774)

    def product(scale: float, power: int, *factors: Row) -> Row:
        """Coefficients of theta to theta^4 of scale theta^power times polynomials, given from their constant terms."""
        powers: list[float] = [0.0] * power + [scale]
        for factor in factors:
            longer = [0.0] * (len(powers) + len(factor) - 1)
            for i, x in enumerate(powers):
                for j, y in enumerate(factor):
                    longer[i + j] += x * y
            powers = longer
        return tuple(powers[1:5])

    by_stage = (
        product(-1.0530884977290216, 1, (-1.3299890189751412, 1.0), (0.7139816917074209, -1.4364028541716351, 1.0)),
        product(0.1017, 2, (1.2949852507374631, -2.1966568338249754, 1.0)),
        product(2.490627285651252793, 2, (1.57803468208092486, -2.38535645472061657, 1.0)),
        product(-16.54810288924490272, 2, (-1.21712927295533244, 1.0), (-0.61620406037800089, 1.0)),
        product(47.37952196281928122, 2, (-1.203071208372362603, 1.0), (-0.658047292653547382, 1.0)),
        product(-34.87065786149660974, 2, (-1.2, 1.0), (-0.666666666666666667, 1.0)),
        product(2.5, 2, (-1.0, 1.0), (-0.6, 1.0)),
    )
    return Tableau(
        a=(
            (),
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            b,
        ),
        b=(*b, 0.0),
        error=(
            -0.00178001105222577714,
            -0.0008164344596567469,
            0.007880878010261995,
            -0.1447110071732629,
            0.5823571654525552,
            -0.45808210592918697,
            1 / 66,
        ),
        weights=tuple(zip(*by_stage)),
    )


DOPRI5 = _dopri5()
TSIT5 = _tsit5()
