"""ministack with two changes: it unpacks each archive once, and it names a handler's exception as Lambda does.

ministack's local executor unpacks the whole layer for each execution environment, about 50 MB and 3,000 files for each
process. AWS mounts `/opt` and `/var/task` read-only, so a shared copy makes no difference to an environment.
`python -m local.guard local.emulator` therefore replaces the class that reads the archives.

ministack reports every exception as `Runtime.HandlerError`. On AWS, the error's type is the exception's class, and the
state machine's retry policy depends on it.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import tempfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_lock = threading.Lock()


class SharedZipFile(zipfile.ZipFile):
    """An archive of a layer or a package that is unpacked when the first environment needs it.

    `extractall` makes the target a link to the only unpacked copy, and closing the archive deletes the file: each
    environment writes the archive again.
    """

    def namelist(self) -> list[str]:
        """Return the names to check. An unpacked archive was checked before, so it returns no names."""
        return [] if self._copy().is_dir() else super().namelist()

    def extractall(self, path: Any = None, members: Any = None, pwd: Any = None) -> None:
        """Make `path`, an empty directory, a link to the unpacked copy."""
        copy = self._copy()
        with _lock:
            if not copy.is_dir():
                unfinished = copy.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                super().extractall(unfinished, members, pwd)
                unfinished.rename(copy)
        target = Path(path)
        target.rmdir()
        target.symlink_to(copy, target_is_directory=True)

    def close(self) -> None:
        """Close the archive and delete its file."""
        super().close()
        if self.filename is not None:
            Path(self.filename).unlink(missing_ok=True)

    def _copy(self) -> Path:
        if not hasattr(self, "_digest"):
            with Path(os.fspath(self.filename or "")).open("rb") as file:
                self._digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Path(tempfile.gettempdir()) / "unpacked" / self._digest


def share_unpacked_archives() -> None:
    """Make the local executor of the running interpreter unpack each archive once."""
    from ministack.core import lambda_runtime

    names = {
        "BadZipFile": zipfile.BadZipFile,
        "LargeFileError": zipfile.LargeZipFile,
    }  # all names of zipfile that it uses
    lambda_runtime.zipfile = SimpleNamespace(ZipFile=SharedZipFile, **names)


def exception_name(trace: str) -> str | None:
    """Return the class of the exception at the end of a traceback; None if the text is not a traceback."""
    _, frames, last = trace.rpartition('\n  File "')
    found = re.search(r"^([A-Za-z_][\w.]*)(?::|$)", last, re.MULTILINE) if frames else None
    return found[1].rpartition(".")[2] if found else None


def name_errors_as_lambda_does() -> None:
    """Make the local executor of the running interpreter report the class of a handler's exception."""
    from ministack.core import lambda_runtime
    from ministack.services import lambda_svc

    invoke, execute = lambda_runtime.Worker.invoke, lambda_svc._execute_function_warm  # noqa: SLF001
    raised = threading.local()

    def invoke_and_keep(self: Any, *arguments: Any, **named: Any) -> Any:
        answer = invoke(self, *arguments, **named)
        raised.name = exception_name(str(answer.get("trace", "")))
        return answer

    def execute_and_name(*arguments: Any) -> Any:
        raised.name = None
        answer = execute(*arguments)
        if answer.get("error") and raised.name and answer["body"].get("errorType") == "Runtime.HandlerError":
            answer["body"]["errorType"] = raised.name
        return answer

    lambda_runtime.Worker.invoke = invoke_and_keep
    lambda_svc._execute_function_warm = execute_and_name  # noqa: SLF001


if __name__ == "__main__":
    share_unpacked_archives()
    name_errors_as_lambda_does()
    runpy.run_module("ministack", run_name="__main__", alter_sys=True)
