"""The elliptic curve FourQ in affine and extended coordinates.

Sources: Costello and Longa, "FourQ: four-dimensional decompositions on a Q-curve over the Mersenne prime" (ASIACRYPT
2015); draft-ladd-cfrg-4q (parameters, encoding of a point); Hisil, Wong, Carter and Dawson, "Twisted Edwards Curves
Revisited" (2008; formulas for a = -1).

-x^2 + y^2 = 1 + d x^2 y^2 over GF(p^2), p = 2^127 - 1, i^2 = -1. Python integers, plain windows, no endomorphisms.
**Not constant-time**: use it only with a key whose loss is acceptable.
"""

from __future__ import annotations

from functools import cache

Fp2 = tuple[int, int]
"""a + b i as (a, b), both in 0 .. p-1."""

Point = tuple[Fp2, Fp2, Fp2, Fp2]
"""Extended coordinates (X, Y, Z, T): x = X/Z, y = Y/Z, T = XY/Z."""

P = 2**127 - 1
N = 0x29CBC14E5E0A72F05397829CBC14E5DFBD004DFE0F79992FB2540EC7768CE7
"""Prime order of the subgroup of G."""
COFACTOR = 392
D: Fp2 = (4205857648805777768770, 125317048443780598345676279555970305165)
_TWO_D: Fp2 = (2 * D[0] % P, 2 * D[1] % P)

_ONE: Fp2 = (1, 0)
_ZERO: Fp2 = (0, 0)
IDENTITY: Point = (_ZERO, _ONE, _ONE, _ZERO)


def _mul(a: Fp2, b: Fp2) -> Fp2:
    a0, a1 = a
    b0, b1 = b
    return (a0 * b0 - a1 * b1) % P, (a0 * b1 + a1 * b0) % P


def _square(a: Fp2) -> Fp2:
    a0, a1 = a
    return (a0 + a1) * (a0 - a1) % P, 2 * a0 * a1 % P


# Sums and differences stay unreduced: Python's integers are unbounded, and every product is reduced.
def _add(a: Fp2, b: Fp2) -> Fp2:
    return a[0] + b[0], a[1] + b[1]


def _sub(a: Fp2, b: Fp2) -> Fp2:
    return a[0] - b[0], a[1] - b[1]


def _inverse(a: Fp2) -> Fp2:
    norm = pow(a[0] * a[0] + a[1] * a[1], -1, P)
    return a[0] * norm % P, -a[1] * norm % P


def _root(n: int) -> int | None:
    """Return a square root in GF(p): p = 3 mod 4."""
    root = pow(n, (P + 1) // 4, P)
    return root if (root * root - n) % P == 0 else None


def _root2(a: Fp2) -> Fp2 | None:
    """Return a square root in GF(p^2) by the norm, or None."""
    a0, a1 = a
    if a1 == 0:
        real = _root(a0)
        if real is not None:
            return real, 0
        imaginary = _root(-a0 % P)
        return None if imaginary is None else (0, imaginary)
    norm = _root((a0 * a0 + a1 * a1) % P)
    if norm is None:
        return None
    half = (P + 1) // 2
    x0 = _root((a0 + norm) * half % P)
    if x0 is None:
        x0 = _root((a0 - norm) * half % P)
    if not x0:
        return None
    return x0, a1 * half * pow(x0, -1, P) % P


def point(x: Fp2, y: Fp2) -> Point:
    """Return the extended coordinates of the affine point (x, y)."""
    return x, y, _ONE, _mul(x, y)


G: Point = point(
    (0x1A3472237C2FB305286592AD7B3833AA, 0x1E1F553F2878AA9C96869FB360AC77F6),
    (0x0E3FEE9BA120785AB924A2462BCBB287, 0x6E1C4AF8630E024249A7C344844C8B5C),
)
"""Generator of the subgroup of order N."""


def affine(p: Point) -> tuple[Fp2, Fp2]:
    """Return (x, y) of a point."""
    z = _inverse(p[2])
    return _mul(p[0], z), _mul(p[1], z)


def on_curve(x: Fp2, y: Fp2) -> bool:
    """Return whether (x, y) satisfies the curve's equation."""
    xx, yy = _square(x), _square(y)
    left, right = _sub(yy, xx), _add(_ONE, _mul(D, _mul(xx, yy)))
    return (left[0] - right[0]) % P == 0 and (left[1] - right[1]) % P == 0


def add(p: Point, q: Point) -> Point:
    """Add two points. The formula is complete."""
    x1, y1, z1, t1 = p
    x2, y2, z2, t2 = q
    a = _mul(_sub(y1, x1), _sub(y2, x2))
    b = _mul(_add(y1, x1), _add(y2, x2))
    c = _mul(_mul(t1, _TWO_D), t2)
    d = _mul(z1, z2)
    d = _add(d, d)
    e, f, g, h = _sub(b, a), _sub(d, c), _add(d, c), _add(b, a)
    return _mul(e, f), _mul(g, h), _mul(f, g), _mul(e, h)


def double(p: Point) -> Point:
    """Add a point to itself."""
    x, y, z, _ = p
    a, b, c = _square(x), _square(y), _square(z)
    e = _sub(_sub(_square(_add(x, y)), a), b)
    g = _sub(b, a)
    f = _sub(g, _add(c, c))
    h = (-a[0] - b[0], -a[1] - b[1])
    return _mul(e, f), _mul(g, h), _mul(f, g), _mul(e, h)


def equal(p: Point, q: Point) -> bool:
    """Return whether both are the same point."""
    left, right = _mul(p[0], q[2]), _mul(q[0], p[2])
    return left == right and _mul(p[1], q[2]) == _mul(q[1], p[2])


def _multiples(p: Point) -> tuple[Point, ...]:
    found = [IDENTITY, p]
    while len(found) < 16:
        found.append(add(found[-1], p))
    return tuple(found)


@cache
def _multiples_of_g() -> tuple[Point, ...]:
    return _multiples(G)


def multiply(scalar: int, p: Point = G) -> Point:
    """Add `p` to itself `scalar` (>= 0) times."""
    return multiply_add((scalar, p))


def multiply_add(*terms: tuple[int, Point]) -> Point:
    """Return the sum of scalar * point over all terms, by windows of four bits that share the doublings (Straus)."""
    tables = [(scalar, _multiples_of_g() if p is G else _multiples(p)) for scalar, p in terms]
    windows = (max(scalar for scalar, _ in terms).bit_length() + 3) // 4
    sum_ = IDENTITY
    for window in range(windows - 1, -1, -1):
        for _ in range(4):
            sum_ = double(sum_)
        for scalar, multiples in tables:
            digit = scalar >> 4 * window & 15
            if digit:
                sum_ = add(sum_, multiples[digit])
    return sum_


def has_low_order(p: Point) -> bool:
    """Return whether the cofactor alone takes p to the neutral element."""
    return equal(multiply(COFACTOR, p), IDENTITY)


def _sign(x: Fp2) -> int:
    return (x[0] or x[1]) >> 126


def encode(p: Point) -> bytes:
    """Return 32 bytes: y, with the sign of x in the highest bit."""
    x, y = affine(p)
    return (y[0] | y[1] << 128 | _sign(x) << 255).to_bytes(32, "little")


def decode(data: bytes) -> Point:
    """Decode a point of 32 bytes.

    Raises
    ------
    ValueError
        Wrong length, an unreduced coordinate, no point of the curve, or a wrong sign.
    """
    if len(data) != 32:
        raise ValueError("a point must have 32 bytes")
    value = int.from_bytes(data, "little")
    sign = value >> 255
    y = (value & (1 << 128) - 1, value >> 128 & (1 << 127) - 1)
    if y[0] >= P or y[1] >= P:
        raise ValueError("a coordinate of the point is not reduced")
    yy = _square(y)
    numerator = ((yy[0] - 1) % P, yy[1])
    d_yy = _mul(D, yy)
    x = _root2(_mul(numerator, _inverse((d_yy[0] + 1, d_yy[1]))))
    if x is None:
        raise ValueError("the bytes are not a point of the curve")
    if _sign(x) != sign:
        x = (-x[0] % P, -x[1] % P)
    if _sign(x) != sign or not on_curve(x, y):
        raise ValueError("the bytes are not a point of the curve")
    return point(x, y)
