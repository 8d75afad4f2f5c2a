"""Addresses and ports of this machine."""

import ipaddress
import socket

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
