"""`python -m local up | down | run | status | logs | token | demo`."""

from __future__ import annotations

import sys

from local.interrupts import StopError, stop_on_signals


def main() -> int:
    """Run the command of the command line; return an exit code."""
    import argparse  # after the signals, so that Ctrl-C prints no traceback from here on

    from local import demo, lifecycle
    from local.cloud import auth_mode
    from local.environment import Ports

    parser = argparse.ArgumentParser(prog="python -m local", description="The local cloud.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("up", help="start the local cloud in the background")
    commands.add_parser("down", help="stop it")
    commands.add_parser("run", help="run the local cloud in the foreground")
    commands.add_parser("status", help="show whether the local cloud runs")
    logs = commands.add_parser("logs", help="print the services' log")
    logs.add_argument("--task", default="", help="only the lines of this task")
    logs.add_argument("--all", action="store_true", help="include the platform's lines and the metrics")
    token = commands.add_parser("token", help="print a token")
    token.add_argument("--role", required=True, help="one role, or several separated by spaces")
    token.add_argument("--subject", default="", help="subject of the token")
    commands.add_parser("demo", help="run two tasks on a separate local cloud, and check the results")
    arguments = parser.parse_args()
    match arguments.command:
        case "up":
            return lifecycle.up(auth_mode(), Ports.from_environment())
        case "down":
            lifecycle.down()
        case "run":
            lifecycle.run(auth_mode(), Ports.from_environment())
        case "status":
            text, code = lifecycle.status()
            print(text)
            return code
        case "logs":
            lifecycle.logs(arguments.task, everything=arguments.all)
        case "token":
            print(lifecycle.token(arguments.role, arguments.subject))
        case "demo":
            return demo.main()
    return 0


def run() -> int | str:
    """Run `main`; return an exit code, or one line that describes the error."""
    try:
        return main()
    except StopError:
        return 130
    except Exception as error:
        from local.environment import LocalCloudError
        from local.tokens import TokenRequestError

        if isinstance(error, LocalCloudError | TokenRequestError):
            return str(error)
        if isinstance(error, BrokenPipeError):
            return 1  # the reader of the output has closed it, as `| head` does
        if isinstance(error, OSError) and error.filename:
            return f"{error.filename}: {error.strerror}"
        raise


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(run())
