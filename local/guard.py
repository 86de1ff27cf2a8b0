"""Run a module until its parent process has ended.

`python -m local.guard MODULE` ends its own process group, with every process that the module has started, as soon as
its standard input closes. The operating system closes it at the end of the parent, so no process is left running even
after `kill -9`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    if os.getpgrp() != os.getpid():
        sys.exit("local.guard ends its whole process group: start it as the leader of a new group")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
