"""Finds out whether the Hub can be reached and pushed to, and switches its libraries to offline mode if it can't be reached.

Without a network they would retry for half a minute before they look into their own cache. This module is free of torch, so
that the command line can refuse a push before torch is loaded.
"""

from __future__ import annotations

import functools
import ssl
import sys
import urllib.error
import urllib.request

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from abliterate.errors import InputError
from abliterate.settings.schema import ExportSettings

TIMEOUT_SECONDS = 10.0
# The mode that the environment requests.
_OFFLINE = constants.HF_HUB_OFFLINE


@functools.cache
def skip_retries_without_network() -> None:
    """Contact the Hub once; without a network, switch its libraries to offline mode until `ask_again`.

    In this mode, downloaded files still load and everything else fails at once.
    """
    if not _reachable(constants.ENDPOINT):
        _switch(offline=True)


def ask_again() -> None:
    """Undo `skip_retries_without_network`: by the next run in this process, the network may be back."""
    skip_retries_without_network.cache_clear()
    _switch(offline=_OFFLINE)


def _switch(*, offline: bool) -> None:
    constants.HF_HUB_OFFLINE = offline
    if "datasets" in sys.modules:  # it copied the constant when it was imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = offline


def _reachable(endpoint: str) -> bool:
    """False only without a connection: any answer, and an invalid certificate, are left to the libraries."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError) or not isinstance(error.reason, OSError)
    except OSError:
        return False
    return True


def check_push(settings: ExportSettings) -> None:
    """InputError if the push that `settings` ask for can't succeed; it is checked before hours of work, not after."""
    repo = settings.push
    if not repo:
        return
    if settings.kind == "none":
        raise InputError(
            f"There is nothing to push to {repo} with --export none; choose merged or adapter, or leave out --push."
        )
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise InputError(f"The repository {settings.push!r} can't be pushed to; name it as owner/name.")
    if not get_token():
        raise InputError(
            f"There is no Hub token to push to {repo} with; log in with hf auth login, or set HF_TOKEN, or leave out --push."
        )
