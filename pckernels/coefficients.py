"""c_k(T): how much of backprop's delta fixed prediction has delivered at distance k after T steps.

From a feed-forward start with Jacobi steps and one rate, the error of a vertex at distance k on a chain is exactly
c_k(T) * delta, with c_k(T) = P(Binomial(T, rate) >= k). The recursion is used in place of the binomial sum, which
cancels badly for rate > 1.
"""

from collections.abc import Iterator


def coefficients(steps: int, rate: float, longest: int) -> list[float]:
    """c_0(T) .. c_longest(T) after T = `steps` steps."""
    last: list[float] = []
    for row in _rows(steps, rate, longest):
        last = row
    return last


def trajectory(steps: int, rate: float, longest: int) -> list[list[float]]:
    """The rows [c_0(t) .. c_longest(t)] for t = 0 .. T: c_k(t+1) = (1 - rate) c_k(t) + rate c_{k-1}(t)."""
    return list(_rows(steps, rate, longest))


def largest(steps: int, rate: float, longest: int) -> float:
    """m = max(1, max over t <= T and k of |c_k(t)|), the growth that bounds rounding for rate > 1."""
    return max(1.0, max(abs(c) for row in _rows(steps, rate, longest) for c in row))


def _rows(steps: int, rate: float, longest: int) -> Iterator[list[float]]:
    """The rows in turn. 1 - c obeys the recursion too, and is carried beside c: near 1, c alone stalls some roundings short."""
    arrived, missing = [1.0] + [0.0] * longest, [0.0] + [1.0] * longest
    yield arrived
    for _ in range(steps):
        arrived, missing = _moved(arrived, rate), _moved(missing, rate)
        yield [c if abs(c) < 0.5 else 1.0 - rest for c, rest in zip(arrived, missing, strict=True)]


def _moved(row: list[float], rate: float) -> list[float]:
    return row[:1] + [(1.0 - rate) * row[k] + rate * row[k - 1] for k in range(1, len(row))]
