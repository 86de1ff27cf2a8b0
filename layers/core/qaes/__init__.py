"""Code that the services share: `domain` is pure, `adapters` call AWS."""

VERSION = "0.2.0"
"""Version of the project, of its API document and of each health response."""
