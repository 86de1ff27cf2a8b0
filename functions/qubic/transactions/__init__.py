"""Signed transactions of the service, from the signature to the final state."""
