"""`python -m local up | down | run | status | logs | token | demo`."""

from __future__ import annotations

import argparse
import sys

from local import demo, lifecycle
from local.cloud import LocalCloudError, Ports, auth_mode
from local.tokens import TokenRequestError


def main() -> int:
    """Do what the command line says; return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m local", description="The local cloud.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("up", help="start it in the background")
    commands.add_parser("down", help="stop it")
    commands.add_parser("run", help="run it in the foreground")
    commands.add_parser("status", help="say whether it runs")
    commands.add_parser("logs", help="print what the services logged").add_argument("--task", help="only for this task")
    token = commands.add_parser("token", help="print a token")
    token.add_argument("--role", required=True, help="one role, or several separated by spaces")
    token.add_argument("--subject", default="", help="who the token is for")
    commands.add_parser("demo", help="run two tasks on a local cloud of their own, and check all that they say")
    arguments = parser.parse_args()
    match arguments.command:
        case "up":
            return lifecycle.up(auth_mode(), Ports.from_environment())
        case "down":
            lifecycle.down()
        case "run":
            lifecycle.run(auth_mode(), Ports.from_environment())
        case "status":
            print(lifecycle.status())
        case "logs":
            lifecycle.logs(arguments.task)
        case "token":
            print(lifecycle.token(arguments.role, arguments.subject))
        case "demo":
            return demo.main()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LocalCloudError, TokenRequestError) as error:
        sys.exit(str(error))
