"""Wrong keys, by the address they come from: whoever sends too many has to wait. In bounded memory."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

MOST_FAILURES = 10  # at once; then one more each EVERY_S
EVERY_S = 6.0
MOST_ADDRESSES = 10_000
IPV6_PREFIX = 64  # one customer's


class Failures:
    """A bucket for each address that drips. `now_s` is the clock.

    Who has come in lately is known, so that somebody else's failures behind the same address don't lock it out.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._full_until_s: OrderedDict[str, float] = OrderedDict()  # when the bucket is empty again
        self._welcome: OrderedDict[tuple[str, str], None] = OrderedDict()

    def wait_s(self, client: str, name: str | None) -> float:
        """Seconds until the address may try again, 0 if it may now. `name`: whose key it has sent this time."""
        address = source_of(client)
        if name is not None and (address, name) in self._welcome:
            return 0.0
        left_s = self._full_until_s.get(address, 0.0) - self._now_s()
        return max(left_s - (MOST_FAILURES - 1) * EVERY_S, 0.0)

    def failed(self, client: str) -> None:
        address = source_of(client)
        now_s = self._now_s()
        self._full_until_s[address] = max(self._full_until_s.pop(address, now_s), now_s) + EVERY_S
        while len(self._full_until_s) > MOST_ADDRESSES:
            self._full_until_s.popitem(last=False)

    def succeeded(self, client: str, name: str) -> None:
        pair = (source_of(client), name)
        self._welcome[pair] = None
        self._welcome.move_to_end(pair)
        while len(self._welcome) > MOST_ADDRESSES:
            self._welcome.popitem(last=False)

    def __len__(self) -> int:
        return len(self._full_until_s)


def source_of(client: str) -> str:
    """The address as it counts: of IPv6 the network that one customer has."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
    return client
