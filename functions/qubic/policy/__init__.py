"""The policy's versions: their lifecycle, and the check of each version against the ledger."""
