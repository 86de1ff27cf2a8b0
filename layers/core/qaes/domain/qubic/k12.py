"""KangarooTwelve (KT128) for messages of one chunk.

Source: RFC 9861, "KangarooTwelve and TurboSHAKE" (sections 2.2 and 3.2), with an empty customization string.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_RATE = 168
_DOMAIN = 0x07
MAX_BYTES = 8191
"""Maximum length of a message of one chunk: 8,192 bytes less one byte for the empty customization string."""

_ROUND_CONSTANTS = (
    0x000000008000808B,
    0x800000000000008B,
    0x8000000000008089,
    0x8000000000008003,
    0x8000000000008002,
    0x8000000000000080,
    0x000000000000800A,
    0x800000008000000A,
    0x8000000080008081,
    0x8000000000008080,
    0x0000000080000001,
    0x8000000080008008,
)


def _rho_pi() -> tuple[tuple[int, int, int], ...]:
    # (from, rotation, to): lane (x, y), at index x + 5y, moves to (y, 2x + 3y) and rotates (FIPS 202, 3.2.2 and 3.2.3).
    moves = [(0, 0, 0)]
    x, y = 1, 0
    for t in range(24):
        moves.append((x + 5 * y, (t + 1) * (t + 2) // 2 % 64, y + 5 * ((2 * x + 3 * y) % 5)))
        x, y = y, (2 * x + 3 * y) % 5
    return tuple(moves)


_RHO_PI = _rho_pi()


def _permute(a: list[int]) -> None:
    """Keccak-p[1600, 12] on 25 lanes, in place."""
    mask = _MASK
    b = [0] * 25
    for constant in _ROUND_CONSTANTS:
        c0 = a[0] ^ a[5] ^ a[10] ^ a[15] ^ a[20]
        c1 = a[1] ^ a[6] ^ a[11] ^ a[16] ^ a[21]
        c2 = a[2] ^ a[7] ^ a[12] ^ a[17] ^ a[22]
        c3 = a[3] ^ a[8] ^ a[13] ^ a[18] ^ a[23]
        c4 = a[4] ^ a[9] ^ a[14] ^ a[19] ^ a[24]
        d = (
            c4 ^ ((c1 << 1 | c1 >> 63) & mask),
            c0 ^ ((c2 << 1 | c2 >> 63) & mask),
            c1 ^ ((c3 << 1 | c3 >> 63) & mask),
            c2 ^ ((c4 << 1 | c4 >> 63) & mask),
            c3 ^ ((c0 << 1 | c0 >> 63) & mask),
        )
        for source, rotation, target in _RHO_PI:
            lane = a[source] ^ d[source % 5]
            b[target] = (lane << rotation | lane >> (64 - rotation)) & mask
        for y in (0, 5, 10, 15, 20):
            b0, b1, b2, b3, b4 = b[y : y + 5]
            a[y] = b0 ^ (~b1 & b2)
            a[y + 1] = b1 ^ (~b2 & b3)
            a[y + 2] = b2 ^ (~b3 & b4)
            a[y + 3] = b3 ^ (~b4 & b0)
            a[y + 4] = b4 ^ (~b0 & b1)
        a[0] ^= constant


def k12(message: bytes, size: int = 32) -> bytes:
    """Return the first `size` bytes of KT128 of `message`.

    Raises
    ------
    ValueError
        The message does not fit one chunk (more than 8,191 bytes), or `size` is negative.
    """
    if len(message) > MAX_BYTES:
        raise ValueError(f"a message of one chunk must have at most {MAX_BYTES} bytes")
    if size < 0:
        raise ValueError("the size must not be negative")
    padded = bytearray(message)
    padded.append(0)  # encoded length of the empty customization string
    padded.append(_DOMAIN)
    padded.extend(bytes(-len(padded) % _RATE))
    padded[-1] ^= 0x80
    state = [0] * 25
    for start in range(0, len(padded), _RATE):
        for lane in range(_RATE // 8):
            at = start + 8 * lane
            state[lane] ^= int.from_bytes(padded[at : at + 8], "little")
        _permute(state)
    out = bytearray()
    while True:
        out += b"".join(lane.to_bytes(8, "little") for lane in state[: _RATE // 8])
        if len(out) >= size:
            return bytes(out[:size])
        _permute(state)
