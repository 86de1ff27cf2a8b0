"""Check a handler: `make check-handler HANDLER=<URL or Lambda function> ACTION=<folder>`.

The kit executes the action for real: run it against a test environment. Exit status 0: the handler keeps the
contract; 1: it breaks it, for the printed reasons; 2: the kit cannot begin.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dispatcher.credentials import Basic, Bearer, Credential, Header, OAuth2
from dispatcher.handlers import HttpsHandler
from dispatcher.signatures import Signer, directory
from local.check_handler.callbacks import receiving
from local.check_handler.checks import run_checks
from local.check_handler.target import KitError, Target, effects_of, handler_of, read_sample
from local.environment import WORK
from local.terminal import inert
from qaes.domain.errors import InvalidInputError

KEY_FILE = WORK / "check-handler.key"
_MARKS = {"passed": "✓", "failed": "✗", "skipped": "–"}
_CREDENTIALS = {"bearer": Bearer, "basic": Basic, "header": Header, "oauth2": OAuth2}


def main(arguments: list[str] | None = None) -> int:
    """Run the kit, print each result, and return the exit status."""
    parser = argparse.ArgumentParser(prog="make check-handler", description=__doc__)
    parser.add_argument("--handler", default=os.environ.get("HANDLER", ""))
    parser.add_argument("--action", default=os.environ.get("ACTION", ""))
    options = parser.parse_args(arguments)
    signer = Signer(_key(KEY_FILE))
    if not options.handler or not options.action:
        print("usage: make check-handler HANDLER=<URL or Lambda function> ACTION=<folder>")
        print("       [EFFECTS=<command>] [CALLBACK=<URL>] [CREDENTIAL=<JSON>]")
        print("An HTTPS handler must trust the kit's key, which is in this directory:")
        print(directory([signer.private_key.public_key()]))
        return 2
    try:
        return _check(options.handler, Path(options.action), signer)
    except (KitError, InvalidInputError) as error:
        print(f"The kit cannot begin: {error}", file=sys.stderr)
        return 2


def _check(handler: str, folder: Path, signer: Signer) -> int:
    sample = read_sample(folder)
    effects = os.environ.get("EFFECTS", "")
    target = Target(
        handler_of(handler, _credential(os.environ.get("CREDENTIAL", ""))),
        sample,
        signer=signer,
        effects=effects_of(effects) if effects else None,
    )
    if isinstance(target.handler, HttpsHandler):
        target.egress.url(handler)
    failed = 0
    with ExitStack() as stack:
        if base := os.environ.get("CALLBACK", ""):
            target.wait_for_callback = stack.enter_context(receiving(base, sample)).wait
        print(f"{sample.name} at {inert(handler)}")
        for result in run_checks(target):
            failed += result.state == "failed"
            print(f"  {_MARKS[result.state]} {result.check.promise}", flush=True)
            if result.text:
                print(f"      {inert(result.text)}", flush=True)
    if not effects:
        print("  EFFECTS is not set: the kit compared answers, and did not count effects.")
    print("The handler keeps the contract." if not failed else f"The handler breaks the contract: {failed} failed.")
    return 1 if failed else 0


def _key(path: Path) -> Ed25519PrivateKey:
    """Return the kit's signing key; the first run creates it."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123 with its mode
            file.write(pem)
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise KitError(f"{path} is not an Ed25519 key: delete it")
    return key


def _credential(text: str) -> Credential | None:
    if not text:
        return None
    try:
        members = json.loads(text)
        credential: Credential = _CREDENTIALS[members.pop("type")](**members)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise KitError("CREDENTIAL must be JSON: a `type` of bearer, basic, header or oauth2, and its values") from None
    return credential


if __name__ == "__main__":
    sys.exit(main())
