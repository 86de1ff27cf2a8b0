"""The conformance kit: does a handler keep the contract of docs/actions.md? `make check-handler`."""
