"""HTTP clients for model servers: those that mmopd started, and those that a file of the user names.

The proxies of the environment (http_proxy, ALL_PROXY, ...) lead to the internet. Such a proxy cannot reach 127.0.0.1 or
a node of the cluster for us, so no client here asks it. A server that is reached through a proxy names it in its own
entry (`proxy`). SSL_CERT_FILE and SSL_CERT_DIR count; ~/.netrc does not.
"""

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import aiohttp
    import httpx

SPELLINGS = tuple(
    spelling
    for name in ("http_proxy", "https_proxy", "all_proxy")
    for spelling in (name, name.upper())  # programs read one or the other
)
DIRECT = ("no_proxy", "NO_PROXY")


def client(*, proxy: str = "", keep_alive: bool = True, **settings: Any) -> "httpx.Client":
    """Return a client for single requests; its owner closes it.

    Args:
        proxy: URL of the proxy to ask; empty: none.
        keep_alive: keep connections open between requests.
        **settings: of `httpx.Client`.
    """
    import httpx

    limits = httpx.Limits() if keep_alive else httpx.Limits(max_keepalive_connections=0)
    # With a transport of its own, httpx does not look for proxies in the environment.
    return httpx.Client(transport=httpx.HTTPTransport(limits=limits, proxy=proxy or None), **settings)


def session(**connections: Any) -> "aiohttp.ClientSession":
    """Return a client for many requests in the running event loop, without cookies or limits; its owner closes it.

    The proxy is an argument of each request, since one client may ask several servers.

    Args:
        **connections: settings of `aiohttp.TCPConnector`.
    """
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, **connections),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


def environment(url: str, proxy: str) -> dict[str, str]:
    """Return the variables with which a program that takes proxies from the environment reaches a server as we do.

    Its other requests, such as those to the model hub, keep the proxies of the environment.
    """
    host = urlsplit(url).hostname or ""
    if proxy:
        return dict.fromkeys(SPELLINGS, proxy) | dict.fromkeys(DIRECT, "")
    # A program prefers one spelling, and would not see a host that only the other one names.
    known = [os.environ.get(name) for name in DIRECT]
    return dict.fromkeys(DIRECT, ",".join(dict.fromkeys(filter(None, (*known, host)))))


def proxy_hint() -> str:
    """Return the end of a message about a server that does not answer; empty if the environment names no proxy."""
    named = [name for name in SPELLINGS if os.environ.get(name)]
    if not named:
        return ""
    return f"; {named[0]} is not used for model servers: set `proxy` of this teacher if it is reached through a proxy"
