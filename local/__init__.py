"""The local cloud: an AWS in one process, the deployed template, and a front door, all on the loopback interface."""
