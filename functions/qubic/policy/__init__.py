"""The policy's versions: their life, and which of them to believe."""
