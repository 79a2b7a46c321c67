"""``minimind watch``：在浏览器里看训练，正在跑的与跑完的。"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from minimind.arguments import Arguments, arg, parse_args
from minimind.console import say
from minimind.distribution import install_command
from minimind.errors import UserError, guard
from minimind.paths import resolve_path
from minimind.serve.cli import HOST, LOCAL, check_address
from minimind.serve.hosts import parse_hosts

PORT = 8999


@dataclass
class WatchArguments(Arguments):
    """看训练的网页：曲线、速度、还要多久、样例；只读日志文件。"""

    save_dir: str = arg("out", "看哪个目录：它与它下面两层里的 logs/*.jsonl", text="path")
    host: str = arg("127.0.0.1", "监听的地址；页面不要密钥，对外开放时谁都能看", pattern=HOST)
    port: int = arg(PORT, "端口；0 由系统挑一个空着的", low=0, high=65535)
    allowed_hosts: str | None = arg(
        None, "除了 localhost 与监听的地址，请求的 Host 还认哪些名字，逗号分隔；* 都认", text="filled"
    )


def make_server(folder: Path, host: str, port: int, allowed_hosts: tuple[str, ...] = ()):
    """建好还没启动的服务器；开始听了就报地址。

    Raises:
        UserError: 没有装服务要用的库。
    """
    try:
        import uvicorn

        from minimind.watch.app import create_app
    except ImportError as error:
        raise UserError(f"没有装服务要用的库（{error.name}）", fix=install_command("serve")) from error
    from minimind.watch.runs import Runs

    class WatchServer(uvicorn.Server):
        """开始听了才报地址。"""

        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                at = self.servers[0].sockets[0].getsockname()[1] if self.servers[0].sockets else port
                shown = f"[{host}]" if ":" in host else host
                say(f"训练的页面在 http://{shown}:{at} ，看 {folder} 里的日志。")

    app = create_app(Runs(folder), host, allowed_hosts)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1)
    return WatchServer(config)


def check_folder(folder: Path) -> None:
    """
    Raises:
        UserError: 是文件。还不存在的可以：先开页面后训练。
    """
    if folder.exists() and not folder.is_dir():
        raise UserError("是文件，不是目录", where=f"--save_dir {folder}", fix="写训练时的 --save_dir")


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    args = parse_args(WatchArguments, argv)
    folder = resolve_path(args.save_dir)
    check_folder(folder)
    if folder.name == "logs" and any(folder.glob("*.jsonl")):
        folder = folder.parent
        say(f"{args.save_dir} 是放日志的目录，看它的上一级 {folder}。")
    check_address(args.host, args.port)
    hosts = parse_hosts(args.allowed_hosts)
    server = make_server(folder, args.host, args.port, hosts)
    if args.host not in LOCAL:
        say(f"留意：监听 {args.host}，能连到这台机器的人都看得到训练的日志。")
    if not folder.is_dir():
        say(f"留意：{folder} 还不存在；训练开始之后页面上就有了。")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    server.run()
