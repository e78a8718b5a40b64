"""Whether the Hub can be reached. Knows neither models nor data sets.

Without a network, the Hub's libraries retry for half a minute before they look into their own cache.
"""

from __future__ import annotations

import functools
import ssl
import sys
import urllib.error
import urllib.request

from huggingface_hub import constants

TIMEOUT_SECONDS = 10.0
# As the environment says.
_OFFLINE = constants.HF_HUB_OFFLINE


@functools.cache
def skip_retries_without_network() -> None:
    """Ask the Hub once; where there is no network, switch its libraries to their offline mode, until `ask_again`.

    What was downloaded before still loads then; the rest fails at once.
    """
    if not _reachable(constants.ENDPOINT):
        _switch(offline=True)


def ask_again() -> None:
    """Undo `skip_retries_without_network`: by the next run of this process, the network may be back."""
    skip_retries_without_network.cache_clear()
    _switch(offline=_OFFLINE)


def _switch(*, offline: bool) -> None:
    constants.HF_HUB_OFFLINE = offline
    if "datasets" in sys.modules:  # copies the constant when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = offline


def _reachable(endpoint: str) -> bool:
    """False only where no connection came about: any answer, and a certificate we doubt, are the libraries' to judge."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError) or not isinstance(error.reason, OSError)
    except OSError:
        return False
    return True
