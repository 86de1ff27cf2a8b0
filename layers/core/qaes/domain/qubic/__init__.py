"""Qubic's primitives in plain Python: hashing, keys, signatures, identities, transactions.

Written from the public specifications that each module names. Import the module that is needed: `identity`, which
every address check uses, loads no curve arithmetic.
"""
