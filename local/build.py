"""Build the functions and the layer with `sam build`, in separate folders for the local cloud.

A plain `sam build` writes to `.aws-sam/build`, which `sam deploy` deploys. The local cloud does not touch that folder:
its build is for this machine's Python, which can differ from the Python of the deployed functions.
"""

from __future__ import annotations

import compileall
import hashlib
import platform
import py_compile
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from local.environment import ROOT, WORK

FOLDER = WORK / "sam"
BUILD = FOLDER / "build"
TEMPLATE = BUILD / "template.yaml"
LAYER = "CoreLayer"
PYTHONS = range(11, 15)  # minor versions of Lambda and of the template's parameter PythonRuntime


def runtime() -> str:
    """Return the name of Lambda's runtime for this Python version."""
    return f"python3.{sys.version_info.minor}"


def architecture() -> str:
    """Return Lambda's name for this machine's instruction set: the local AWS runs the functions on it."""
    return "arm64" if platform.machine().lower() in {"arm64", "aarch64"} else "x86_64"


def build(sam: Callable[..., None], progress: Callable[[str], None]) -> None:
    """Build the parts that have changed since the last build; `sam` runs the SAM CLI."""
    stamp = BUILD / ".fingerprint"  # sam empties the folder, so the stamp belongs to the latest build
    wanted = fingerprint(ROOT, runtime())
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    progress("building functions and layer (sam build)")
    parameters = (f"PythonRuntime={runtime()}", f"Architecture={architecture()}", "Stage=local", "AuthMode=stub")
    folders = ("--build-dir", str(BUILD), "--cache-dir", str(FOLDER / "cache"))
    sam("build", "--template-file", str(ROOT / "template.yaml"), *folders, "--parameter-overrides", *parameters)
    progress("compiling the functions")
    compile_sources(BUILD)
    stamp.write_text(wanted)


def fingerprint(root: Path, runtime: str) -> str:
    """Return a SHA-256 over all inputs of a build."""
    digest = hashlib.sha256(runtime.encode())
    files = [root / "template.yaml", root / "samconfig.toml"]
    for folder in ("functions", "layers/core", "statemachine"):
        files += [path for path in (root / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def compile_sources(directory: Path) -> None:
    """Add byte code that works without its source: otherwise every process would compile the functions again.

    The layer has its own byte code (layers/core/targets). sam copies the same code for each function, so the byte code
    is also compiled once and copied.
    """
    compiled: dict[str, Path] = {}
    for folder in sorted(each for each in directory.iterdir() if each.is_dir() and each.name != LAYER):
        same = compiled.setdefault(_digest(folder), folder)
        if same != folder:
            for cache in same.rglob("__pycache__"):
                shutil.copytree(cache, folder / cache.relative_to(same), dirs_exist_ok=True)
            continue
        # The same path in every function's folder keeps equal code equal, so it is uploaded once.
        compileall.compile_dir(
            folder,
            quiet=2,
            workers=0,
            stripdir=str(folder),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.py") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()
