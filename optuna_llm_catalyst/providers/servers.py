"""What holds for every LLM server, whichever client asks it."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


#: The longest body that is read, in bytes.
MAX_BODY = 4 * 2**20
CONNECT_TIMEOUT_S = 10.0
#: HTTP statuses after which the same request may succeed a little later.
TRANSIENT_STATUS = (408, 429, 502, 503, 504)


def is_loopback(url: str) -> bool:
    """Whether a URL, or a host alone, is this machine."""
    name = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    try:
        address = ipaddress.ip_address(name)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return name in ("", "localhost")
