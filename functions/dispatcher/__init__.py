"""The dispatcher's inside: calls an operator's handler under the contract of docs/actions.md."""
