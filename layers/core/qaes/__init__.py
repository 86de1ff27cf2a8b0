"""What the services share: `domain` is pure, `adapters` call AWS."""

VERSION = "0.2.0"
"""The version of the project, of its API's document and of each health response."""
