"""Addresses and ports of this machine, and the place of its unix sockets."""

import ipaddress
import os
import socket

from mmopd.errors import UserError

SOCKET_BYTES = 107  # longest path of a unix socket
SHORT = "/tmp"
HOST = "127.0.0.1"  # default address of servers; other machines cannot reach it
ANY_HOST = "0.0.0.0"


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def local(host: str) -> str:
    """Return the address by which this machine reaches a server that listens on `host`."""
    return HOST if host == ANY_HOST else host


def public_url(url: str, host: str) -> str:
    """Return the URL by which other machines reach a server that listens on `host`."""
    return url.replace(HOST, socket.gethostname(), 1) if host == ANY_HOST else url


def is_loopback(host: str) -> bool:
    """Return true if only this machine can reach a server that listens on `host`."""
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET)
    except OSError:
        return False
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def socket_place(below: int) -> str:
    """Return the temporary folder; or /tmp, if the path of a unix socket below that folder would be too long.

    Args:
        below: bytes of the path after the folder.

    Raises:
        UserError: it is too long, and /tmp cannot be written.
    """
    import tempfile  # a command without sockets does not need it

    place = tempfile.gettempdir()
    if len(os.fsencode(place)) + below <= SOCKET_BYTES:
        return place
    if os.access(SHORT, os.W_OK | os.X_OK):
        return SHORT
    raise UserError(
        f"TMPDIR={place}: a path of {len(os.fsencode(place))} bytes is too long for unix sockets (at most "
        f"{SOCKET_BYTES - below}), and {SHORT} cannot be written: set TMPDIR to a shorter one"
    )
