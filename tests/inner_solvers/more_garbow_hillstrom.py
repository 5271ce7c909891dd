"""The test problems of Moré, Garbow and Hillstrom (1981, ACM TOMS 7(1), 17-41): minimise the sum of squares Σ rᵢ(x)².

All 35, in float64, in the order of their section 3, with the standard starts. ``optima`` are the values of Σ rᵢ² at the
known minima (to the digits that the paper gives), the global one first. Most are good for root finders too: where there
are as many residuals as unknowns and the optimum is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problems import vector

Residuals = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LeastSquaresProblem:
    """Residuals r: (n,) → (m,), the standard start, and the values of Σ rᵢ² at the known minima."""

    name: str
    residuals: Residuals
    start: Tensor
    optima: tuple[float, ...]

    def objective(self, x: Tensor) -> Tensor:
        return (self.residuals(x) ** 2).sum()

    @property
    def is_square(self) -> bool:
        """Whether it is a system of equations with a root."""
        return len(self.residuals(self.start)) == len(self.start) and self.optima[0] == 0


def _counted(first: int, last: int) -> Tensor:
    return torch.arange(first, last + 1, dtype=torch.float64)


def _rosenbrock(x: Tensor) -> Tensor:
    """Problems 1 and 21."""
    odd, even = x[0::2], x[1::2]
    return torch.stack([10 * (even - odd**2), 1 - odd], -1).reshape(-1)


def _freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def _powell_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x).sum() - 1.0001])


def _brown_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def _beale(x: Tensor) -> Tensor:
    return vector(1.5, 2.25, 2.625) - x[0] * (1 - x[1] ** _counted(1, 3))


def _jennrich_sampson(x: Tensor) -> Tensor:
    i = _counted(1, 10)
    return 2 + 2 * i - (torch.exp(i * x[0]) + torch.exp(i * x[1]))


def _helical_valley(x: Tensor) -> Tensor:
    a, b, c = x
    turns = torch.atan(b / a) / (2 * torch.pi) + torch.where(a > 0, 0.0, 0.5)
    return torch.stack([10 * (c - 10 * turns), 10 * ((a**2 + b**2).sqrt() - 1), c])


def _bard(x: Tensor) -> Tensor:
    y = vector(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)
    u = _counted(1, 15)
    v = 16 - u
    return y - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def _gaussian(x: Tensor) -> Tensor:
    half = vector(0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521)
    y = torch.cat([half, vector(0.3989), half.flip(0)])
    t = (8 - _counted(1, 15)) / 2
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


def _meyer(x: Tensor) -> Tensor:
    y = vector(34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872)
    t = 45 + 5 * _counted(1, 16)
    return x[0] * torch.exp(x[1] / (t + x[2])) - y


def _gulf(x: Tensor) -> Tensor:
    """Its y − x₂ is misprinted in the paper."""
    t = _counted(1, 99) / 100
    y = 25 + (-50 * torch.log(t)) ** (2 / 3)
    return torch.exp(-((y - x[1]).abs() ** x[2]) / x[0]) - t


def _box(x: Tensor) -> Tensor:
    t = _counted(1, 10) / 10
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def _powell_singular(x: Tensor) -> Tensor:
    """Problems 13 and 22."""
    a, b, c, d = x.reshape(-1, 4).T
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2], -1).reshape(-1)


def _wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    return torch.stack(
        [
            10 * (b - a**2),
            1 - a,
            90**0.5 * (d - c**2),
            1 - c,
            10**0.5 * (b + d - 2),
            (b - d) / 10**0.5,
        ]
    )


def _kowalik_osborne(x: Tensor) -> Tensor:
    y = vector(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
    u = vector(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def _brown_dennis(x: Tensor) -> Tensor:
    t = _counted(1, 20) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


# fmt: off
_OSBORNE_1 = vector(
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603,
    0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411,
    0.406,
)
_OSBORNE_2 = vector(
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606,
    0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423,
    0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
    0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098,
    0.054,
)
# fmt: on


def _osborne_1(x: Tensor) -> Tensor:
    t = 10 * _counted(0, 32)
    return _OSBORNE_1 - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def _biggs(x: Tensor) -> Tensor:
    t = _counted(1, 13) / 10
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


def _osborne_2(x: Tensor) -> Tensor:
    t = _counted(0, 64) / 10
    peaks = x[1:4] * torch.exp(-((t.unsqueeze(-1) - x[8:11]) ** 2) * x[5:8])
    return _OSBORNE_2 - (x[0] * torch.exp(-t * x[4]) + peaks.sum(-1))


def _watson(x: Tensor) -> Tensor:
    t, j = _counted(1, 29).unsqueeze(-1) / 29, _counted(0, len(x) - 1)
    polynomial = (x * t**j).sum(-1)
    derivative = (j[1:] * x[1:] * t ** j[:-1]).sum(-1)
    return torch.cat([derivative - polynomial**2 - 1, torch.stack([x[0], x[1] - x[0] ** 2 - 1])])


def _penalty_1(x: Tensor) -> Tensor:
    return torch.cat([1e-5**0.5 * (x - 1), ((x**2).sum() - 0.25).reshape(1)])


def _penalty_2(x: Tensor) -> Tensor:
    n, e = len(x), torch.exp(x / 10)
    i = _counted(2, n)
    y = torch.exp(i / 10) + torch.exp((i - 1) / 10)
    last = ((n - _counted(0, n - 1)) * x**2).sum() - 1
    middle = 1e-5**0.5 * torch.cat([e[1:] + e[:-1] - y, e[1:] - torch.exp(vector(-0.1))])
    return torch.cat([(x[0] - 0.2).reshape(1), middle, last.reshape(1)])


def _variably_dimensioned(x: Tensor) -> Tensor:
    weighted = (_counted(1, len(x)) * (x - 1)).sum()
    return torch.cat([x - 1, torch.stack([weighted, weighted**2])])


def _trigonometric(x: Tensor) -> Tensor:
    n = len(x)
    return n - torch.cos(x).sum() + _counted(1, n) * (1 - torch.cos(x)) - torch.sin(x)


def _brown_almost_linear(x: Tensor) -> Tensor:
    return torch.cat([x[:-1] + x.sum() - (len(x) + 1), (x.prod() - 1).reshape(1)])


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(x[:1])
    return torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])


def _grid(n: int) -> Tensor:
    return _counted(1, n) / (n + 1)


def _discrete_boundary_value(x: Tensor) -> Tensor:
    left, right = _neighbours(x)
    return 2 * x - left - right + (x + _grid(len(x)) + 1) ** 3 / (2 * (len(x) + 1) ** 2)


def _discrete_integral_equation(x: Tensor) -> Tensor:
    t = _grid(len(x))
    kernel = torch.minimum(t, t.unsqueeze(-1)) * (1 - torch.maximum(t, t.unsqueeze(-1)))
    return x + kernel @ (x + t + 1) ** 3 / (2 * (len(x) + 1))


def _broyden_tridiagonal(x: Tensor) -> Tensor:
    left, right = _neighbours(x)
    return (3 - 2 * x) * x - left - 2 * right + 1


def _broyden_banded(x: Tensor) -> Tensor:
    i = _counted(1, len(x))
    ahead = i - i.unsqueeze(-1)
    band = ((ahead >= -5) & (ahead <= 1) & (ahead != 0)).to(x)
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


def _linear_full_rank(x: Tensor) -> Tensor:
    m, shift = 20, 2 * x.sum() / 20 + 1
    return torch.cat([x - shift, -shift.expand(m - len(x))])


def _linear_rank_one(x: Tensor) -> Tensor:
    return _counted(1, 20) * (_counted(1, len(x)) * x).sum() - 1


def _linear_rank_one_with_zeros(x: Tensor) -> Tensor:
    inner = (_counted(2, len(x) - 1) * x[1:-1]).sum()
    factors = torch.cat([_counted(0, 18), vector(0)])
    return factors * inner - 1


def _chebyquad(x: Tensor) -> Tensor:
    n, shifted = len(x), 2 * x - 1
    polynomials = [torch.ones_like(x), shifted]
    while len(polynomials) <= n:
        polynomials.append(2 * shifted * polynomials[-1] - polynomials[-2])
    i = _counted(1, n)
    integrals = torch.where(i % 2 == 0, -1 / (i**2 - 1).clamp(min=1), 0.0)
    return torch.stack([p.mean() for p in polynomials[1:]]) - integrals


def _problems() -> list[LeastSquaresProblem]:
    P = LeastSquaresProblem
    ones = torch.ones(10, dtype=torch.float64)
    return [
        P("Rosenbrock", _rosenbrock, vector(-1.2, 1), (0.0,)),
        P("Freudenstein and Roth", _freudenstein_roth, vector(0.5, -2), (0.0, 48.9842)),
        P("Powell badly scaled", _powell_badly_scaled, vector(0, 1), (0.0,)),
        P("Brown badly scaled", _brown_badly_scaled, vector(1, 1), (0.0,)),
        P("Beale", _beale, vector(1, 1), (0.0,)),
        P("Jennrich and Sampson", _jennrich_sampson, vector(0.3, 0.4), (124.362,)),
        P("helical valley", _helical_valley, vector(-1, 0, 0), (0.0,)),
        P("Bard", _bard, vector(1, 1, 1), (8.21487e-3, 17.4286)),
        P("Gaussian", _gaussian, vector(0.4, 1, 0), (1.12793e-8,)),
        P("Meyer", _meyer, vector(0.02, 4000, 250), (87.9458,)),
        P("Gulf research and development", _gulf, vector(5, 2.5, 0.15), (0.0,)),
        P("Box three-dimensional", _box, vector(0, 10, 20), (0.0,)),
        P("Powell singular", _powell_singular, vector(3, -1, 0, 1), (0.0,)),
        P("Wood", _wood, vector(-3, -1, -3, -1), (0.0,)),
        P("Kowalik and Osborne", _kowalik_osborne, vector(0.25, 0.39, 0.415, 0.39), (3.07505e-4, 1.02734e-3)),
        P("Brown and Dennis", _brown_dennis, vector(25, 5, -5, -1), (85822.2,)),
        P("Osborne 1", _osborne_1, vector(0.5, 1.5, -1, 0.01, 0.02), (5.46489e-5,)),
        P("Biggs EXP6", _biggs, vector(1, 2, 1, 1, 1, 1), (0.0, 5.65565e-3)),
        P("Osborne 2", _osborne_2, vector(1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5), (4.01377e-2,)),
        P("Watson", _watson, 0 * ones[:6], (2.28767e-3,)),
        P("extended Rosenbrock", _rosenbrock, vector(-1.2, 1).repeat(5), (0.0,)),
        P("extended Powell singular", _powell_singular, vector(3, -1, 0, 1).repeat(3), (0.0,)),
        P("penalty I", _penalty_1, _counted(1, 4), (2.24997e-5,)),
        P("penalty II", _penalty_2, 0.5 * ones[:4], (9.37629e-6,)),
        P("variably dimensioned", _variably_dimensioned, 1 - _counted(1, 10) / 10, (0.0,)),
        P("trigonometric", _trigonometric, ones / 10, (0.0, 2.79506e-5)),
        P("Brown almost-linear", _brown_almost_linear, ones / 2, (0.0, 1.0)),
        P("discrete boundary value", _discrete_boundary_value, _grid(10) * (_grid(10) - 1), (0.0,)),
        P("discrete integral equation", _discrete_integral_equation, _grid(10) * (_grid(10) - 1), (0.0,)),
        P("Broyden tridiagonal", _broyden_tridiagonal, -ones, (0.0,)),
        P("Broyden banded", _broyden_banded, -ones, (0.0,)),
        P("linear, full rank", _linear_full_rank, ones, (10.0,)),
        P("linear, rank 1", _linear_rank_one, ones, (20 * 19 / (2 * 41),)),
        P("linear, rank 1 with zeros", _linear_rank_one_with_zeros, ones, ((20**2 + 3 * 20 - 6) / (2 * 37),)),
        P("Chebyquad", _chebyquad, _counted(1, 7) / 8, (0.0,)),
    ]


PROBLEMS = {problem.name: problem for problem in _problems()}
