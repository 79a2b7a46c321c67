"""``minimind serve`` 与 ``python scripts/serve_openai_api.py``：启动 OpenAI 兼容的服务。"""

from __future__ import annotations

import gc
import socket
from dataclasses import dataclass
from pathlib import Path

from minimind.arguments import Arguments, arg, override, parse_args
from minimind.console import say
from minimind.distribution import install_command
from minimind.errors import UserError, guard
from minimind.inference.arguments import DraftArguments
from minimind.paths import resolve_path
from minimind.ranges import MANY
from minimind.serve.hosts import parse_hosts

HOST = (r"[0-9A-Za-z._:%-]+", "一个地址或主机名，如 127.0.0.1", "不是主机：")
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass
class EngineArguments(Arguments, group="并发与时限"):
    """同时写多少、存多少、等多久。"""

    max_slots: int = arg(32, "同时写多少个样本", low=1, high=4096)
    max_queue: int = arg(128, "另外最多排多少个样本，再多就答 429", low=0, high=MANY)
    max_length: int = arg(8192, "提示加回答的上限，不超过模型的上下文", low=2, high=MANY)
    prefill_chunk: int = arg(
        0, "一步最多读多少个提示词元，其间别人照写；0 由设备定：CPU 256，显卡 2048", low=0, high=MANY
    )
    prefix_cache_tokens: int = arg(
        16384,
        "前缀库最多存多少个词元的 KV（26M 每个 8 KB），开头相同的提示不重算；0 不用",
        low=0,
        high=MANY,
    )
    cuda_graphs: int = arg(
        1, "CUDA 上把一步解码录成图，省去主机逐个发射；每张先与照常解码核对，不对就不用", (0, 1)
    )
    request_seconds: float = arg(600.0, "一个请求最多多少秒", above=0, high=MANY)
    shutdown_seconds: float = arg(120.0, "停机时最多等在写的多少秒", low=0, high=MANY)


@dataclass
class ServeArguments(EngineArguments, DraftArguments, group="服务"):
    """OpenAI 兼容的服务与网页。"""

    lora_weight: str = override(
        DraftArguments,
        "lora_weight",
        "None",
        help="LoRA 的名字或 .pth，逗号分隔；每一份另成一个模型（底座的权重共用一份），请求时 model 写它的名字；None 表示不用",
    )
    model_name: str | None = arg(None, "底座在 API 里叫什么；不给则 minimind", text="filled")
    host: str = arg("127.0.0.1", "监听的地址；对外开放时请同时设 --api_key", pattern=HOST)
    port: int = arg(8998, "端口；0 由系统挑一个空着的", low=0, high=65535)
    api_key: str | None = arg(None, "要求客户端带的密钥；不给则不要求", text="filled")
    cors: str | None = arg(None, "允许跨源请求的来源，逗号分隔；不给则不放行", text="filled")
    allowed_hosts: str | None = arg(
        None,
        "除了 localhost 与监听的地址，请求的 Host 还认哪些名字，逗号分隔；* 都认（防 DNS 重绑定）",
        text="filled",
    )
    reload_dir: str | None = arg(
        None,
        "强化学习的远程采样用：允许 POST /collective_rpc 让底座重读这个目录的 model.safetensors；对外开放时须有 --api_key",
        text="path",
    )


def adapter_ids(paths: list[Path], base: str) -> list[str]:
    """各份 LoRA 在 API 里叫什么：文件名去掉尺寸，``lora_identity_512.pth`` 就是 ``lora_identity``。

    Raises:
        UserError: 两份同名，或与底座同名：请求里的 ``model`` 分不清是哪一个。
    """
    from minimind.runtime.checkpoint import parse_stem

    taken: dict[str, str] = {base: "底座"}
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} 写了两遍", where="--lora_weight", fix="只写一遍")
        stem = parse_stem(path)
        name = stem[0] if stem else path.stem
        if name in taken:
            raise UserError(
                f"{path} 与{taken[name]}在 API 里都叫 {name}，请求分不清要哪一个",
                where="--lora_weight",
                expected="各份 LoRA 与底座的名字互不相同",
                fix="给文件（连同旁边的 .json）改名，或用 --model_name 给底座换一个名字",
            )
        taken[name] = f" {path} "
    return [name for name in taken if name != base]


def model_table(args: ServeArguments):
    """载入底座，权重只有一份；每份 LoRA 一个引擎，叠在它上面。"""
    import torch

    from minimind.inference.loading import stop_ids
    from minimind.inference.shared import SharedModel
    from minimind.serve.models import ModelTable, ServedModel
    from minimind.serve.runner import EngineRunner

    base = args.model_name or "minimind"
    loaded = args.load(lora_weight="None", beside=args.lora_weight)
    ids = adapter_ids([path for path, _ in loaded.beside], base)
    draft = args.drafter(loaded)
    # 载入的几个库有二十多万个对象，一次完整的垃圾回收 0.1 到 0.4 秒，其间谁的字都停着；它们不会再变，不必每次看。
    # 引擎在这之后建：换掉的引擎有环，要回收得了
    gc.collect()
    gc.freeze()

    def served(name: str, model, parent: str | None) -> ServedModel:
        runner = EngineRunner(
            model,
            stop_ids(loaded.model, loaded.tokenizer),
            max_slots=args.max_slots,
            max_queue=args.max_queue,
            max_length=args.max_length,
            prefill_chunk=args.prefill_chunk,
            prefix_cache_tokens=args.prefix_cache_tokens,
            cuda_graphs=bool(args.cuda_graphs),
            draft=draft,
        )
        return ServedModel(name, loaded, runner, parent)

    shared = SharedModel(loaded.model) if ids else loaded.model
    table = ModelTable(
        [
            served(base, shared, None),
            *(served(name, shared.adapted(adapter), base) for name, (_, adapter) in zip(ids, loaded.beside)),
        ]
    )
    dtype = next(table.default.loaded.model.parameters()).dtype
    if args.quantize != "none" or dtype != torch.float32:
        kind = args.quantize if args.quantize != "none" else str(dtype).removeprefix("torch.")
        say(
            f"留意：{kind} 的舍入随同时有几个人在写而变，同一种子未必是同一答案；要逐字相同用 --dtype float32。"
        )
    return table


def check_address(host: str, port: int) -> None:
    """载入模型之前先看一眼这个地址能不能听。

    Raises:
        UserError: 不是本机的地址，或端口被占着。
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # 同 uvicorn：刚关掉的不算占着
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:  # 后者：名字里有一段长过 63 个字符
        raise UserError(
            f"不能在 {host[:80]}:{port} 上监听（{getattr(error, 'strerror', None) or error}）",
            where="--host 与 --port",
            fix="地址用 127.0.0.1 或本机的；端口换一个，或用 --port 0 由系统挑",
        ) from error


def run(args: ServeArguments) -> None:
    """启动，直到收到 SIGTERM 或 Ctrl-C：在写的写完才退出，退出码 0；等不及就退出的是 1。"""
    try:
        import uvicorn

        from minimind.serve.app import create_app
        from minimind.serve.generation import Settings
        from minimind.serve.lifecycle import GracefulServer
    except ImportError as error:
        raise UserError(f"没有装服务要用的库（{error.name}）", fix=install_command("serve")) from error

    if args.host not in LOCAL and not args.api_key:
        say(f"留意：监听 {args.host} 而没有 --api_key，能连到这台机器的人都可以用。")
    if args.reload_dir and args.host not in LOCAL and not args.api_key:
        raise UserError(
            "开着重读权重的接口，又对外开放而没有密钥，谁都能换模型",
            where=f"--host {args.host} --reload_dir {args.reload_dir}",
            fix="加上 --api_key，或只听 127.0.0.1",
        )
    if args.reload_dir and args.quantize != "none":
        raise UserError(
            "int8 的权重不能在运行中换", where="--reload_dir 与 --quantize int8", fix="去掉其中一个"
        )
    reload_dir = resolve_path(args.reload_dir) if args.reload_dir else None
    check_address(args.host, args.port)
    hosts = parse_hosts(args.allowed_hosts)
    settings = Settings(
        args.api_key, args.request_seconds, reload_dir=reload_dir, host=args.host, allowed_hosts=hosts
    )
    cors = [origin.strip() for origin in args.cors.split(",")] if args.cors else None
    app = create_app(lambda: model_table(args), settings, cors)
    config = uvicorn.Config(app, host=args.host, port=args.port, log_level="warning")
    server = GracefulServer(config, app, args.shutdown_seconds)
    server.run()
    if server.forced:
        raise SystemExit(1)
    if failure := getattr(app.state, "failure", None):
        raise failure if isinstance(failure, UserError) else SystemExit(1)  # 别的已经写进日志


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    run(parse_args(ServeArguments, argv))
