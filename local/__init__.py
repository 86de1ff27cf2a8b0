"""The local cloud: an AWS in one process, the deployed template, and a proxy, all on the loopback interface."""
