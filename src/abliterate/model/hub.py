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


@functools.cache
def skip_retries_without_network() -> None:
    """Ask the Hub once per process; where there is no network, switch its libraries to their offline mode.

    What was downloaded before still loads then; the rest fails at once. There is no way back within the process.
    """
    if _reachable(constants.ENDPOINT):
        return
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # copies the constant when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


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
