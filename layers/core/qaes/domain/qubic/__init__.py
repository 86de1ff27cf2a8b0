"""Qubic's primitives in plain Python: hashing, keys, signatures, identities, transactions.

Written from the public specifications that each module names. Import the module that is needed: `identity`, which
every address check uses, loads no curve arithmetic.
"""

MAX_QU = 10**15
"""Most QU in one amount; the whole supply is of that order."""
SIGNATURE_BYTES = 64
OPEN_STATES = frozenset({"signed", "broadcast"})
"""The states of a submission whose transaction can still take effect."""
