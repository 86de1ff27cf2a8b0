"""The command `python -m qaes.policy`: evaluates cases against a policy, without AWS."""
