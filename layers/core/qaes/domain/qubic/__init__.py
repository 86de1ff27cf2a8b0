"""Qubic's primitives in plain Python: hashing, keys, signatures, identities, transactions.

Each module names the public specification that it implements. Import only the modules that you need: `identity`, which
every check of an address uses, loads no curve arithmetic.
"""

MAX_QU = 10**15
"""Maximum amount in QU; the whole supply has this order of magnitude."""
SIGNATURE_BYTES = 64
OPEN_STATES = frozenset({"signed", "broadcast"})
"""States of a submission whose transaction can still take effect."""
