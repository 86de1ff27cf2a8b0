"""ministack, with one change: it unpacks each layer and each package of code once.

ministack's local executor unpacks the whole layer anew for each execution environment, some 50 MB and 3,000 files for
each process. AWS mounts `/opt` and `/var/task` read-only, so environments cannot tell whether they share one copy.
`python -m local.guard local.emulator` therefore replaces the class with which that executor reads its archives.
"""

from __future__ import annotations

import hashlib
import os
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
    """An archive of a layer or a package, which is unpacked when the first environment needs it.

    `extractall` makes the target a link to the one unpacked copy, and closing the archive deletes the file: each
    environment writes the archive anew.
    """

    def namelist(self) -> list[str]:
        """Return the names to check; none once the archive is unpacked, and so was checked before."""
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
    """Let the local executor of the running interpreter unpack each archive once."""
    from ministack.core import lambda_runtime

    names = {"BadZipFile": zipfile.BadZipFile, "LargeFileError": zipfile.LargeZipFile}  # all that it reads of zipfile
    lambda_runtime.zipfile = SimpleNamespace(ZipFile=SharedZipFile, **names)


if __name__ == "__main__":
    share_unpacked_archives()
    runpy.run_module("ministack", run_name="__main__", alter_sys=True)
