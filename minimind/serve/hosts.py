"""防 DNS 重绑定：别处的网页把自己的域名指到本机，浏览器就当是同源，但 ``Host`` 还是它的域名。

聊天的服务与看训练的页面共用；不用别的库。
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

from minimind.errors import UserError

# 监听这些地址就是监听全部
EVERYWHERE = ("0.0.0.0", "::", "")


def host_name(value: str) -> str:
    """``Host`` 头 → 主机名：去掉端口、方括号与末尾的点，小写。"""
    value = value.strip().lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0].rstrip(".") if value.count(":") < 2 else value


def parse_hosts(text: str | None) -> tuple[str, ...]:
    """``--allowed_hosts`` → 各个名字；不给是空的。

    Raises:
        UserError: 一个名字也没有，或有一个不是主机名（网址、带 * 的一部分）：照收就谁也不认。
    """
    if text is None:
        return ()
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name != "*" and not re.fullmatch(r"[\w.:\[\]%-]+", name, re.ASCII)]
    if wrong or not names:
        raise UserError(
            f"{wrong[0]!r} 不是主机名" if wrong else f"值是 {text!r}，一个名字也没有",
            where="--allowed_hosts",
            expected="主机名，几个用逗号分隔，如 lab.example.com；* 都认",
            fix="只写主机名，不写 http:// 与路径；要认一整个域就逐个写出",
        )
    return tuple(names)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def unknown_host(header: str | None, host: str, allowed: Iterable[str]) -> str | None:
    """请求的 ``Host`` 不该认的话，返回它的名字；该认（或没有这个头）返回 None。

    监听全部地址时，直接写 IP 的不会是重绑定，放行。

    Args:
        header: 请求的 ``Host`` 头。
        host: 监听的地址。
        allowed: 除了本机的名字与 ``host`` 之外还认哪些；有 ``*`` 就都认。
    """
    allowed, bound = tuple(allowed), host_name(host)
    if header is None or "*" in allowed:
        return None
    name = host_name(header)
    address = _address(name)
    known = {"localhost", bound, *map(host_name, allowed)}
    if bound in EVERYWHERE:
        known.add(socket.gethostname().lower())
    if name in known or (address and (address.is_loopback or bound in EVERYWHERE)):
        return None
    return name


def refusal(name: str) -> str:
    """不认这个 ``Host`` 时答复的话。"""
    return (
        f"不认识的 Host {name[:80]!r}：这台服务器只认 localhost 与监听的地址；确实要用这个名字，"
        f"启动时加 --allowed_hosts {name[:80]}"
    )
