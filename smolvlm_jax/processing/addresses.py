"""Which internet addresses are public. The list is our own: what `ipaddress` calls global differs between versions of Python,
and leaves out addresses that clouds give to their machines' own services."""

import ipaddress

__all__ = ["is_public"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_REFUSED_4 = [
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' own; Alibaba's metadata
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's services for its machines
        "169.254.0.0/16",  # link-local; metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocols; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112, like 192.175.48.0/24
        "192.52.193.0/24",  # multicast tunnels
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
# Of IPv6, nothing but global unicast addresses is public, and of these not:
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_6 = [
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocols: Teredo tunnels, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which leads to any IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
]
# Networks whose last 32 bits are an IPv4 address, which is what counts: mapped, and the well-known prefix of NAT64.
_CARRIERS = [ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96")]


def is_public(address: Address) -> bool:
    """Whether an address is a host of the public internet."""
    if address.version == 4:
        return not any(address in network for network in _REFUSED_4)
    if any(address in network for network in _CARRIERS):
        return is_public(ipaddress.IPv4Address(address.packed[-4:]))
    if address.packed[8:12] in (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe"):  # ISATAP: a tunnel to an IPv4 address
        return False
    return address in _GLOBAL_6 and not any(address in network for network in _REFUSED_6)
