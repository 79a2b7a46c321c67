"""下载公共数据文件：断点续传、核对哈希、写完才改名。

用标准库而不用 huggingface_hub / modelscope 的下载函数：两者的断点、缓存目录、进度与报错各不相同；前者
不核对内容的 sha256，并且 1.x 到 2.x 之间换了两次 HTTP 库；后者的地址只能用环境变量整体改，测试指不到
本机的服务器。这里需要的只是“列清单、带 Range 的 GET、算哈希”，两个站一套代码，也不多一个依赖。
"""

from __future__ import annotations

import difflib
import errno
import http.client
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from minimind.arguments import Arguments, arg, parse_args
from minimind.console import progress, say
from minimind.dataset.hub import SOURCES, RemoteFile
from minimind.dataset.published import PUBLISHED, catalogue, recommended
from minimind.errors import UserError
from minimind.paths import resolve_path
from minimind.ranges import URL
from minimind.runtime.files import file_lock

REPO = (r"[^/\s]+/[^/\s]+", "所有者/名字", "不是仓库的写法：")
TIMEOUT_SECONDS = 30
# 连续失败这么多次才放弃；每次有进展就从头数
RETRIES = 5
RETRY_WAIT_SECONDS = 1.0
BLOCK_BYTES = 1 << 20

_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    TimeoutError,
    ConnectionError,
)


def _open(url: str, offset: int = 0) -> http.client.HTTPResponse:
    headers = {"User-Agent": "minimind", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=_tls_context(url))


def _tls_context(url: str) -> ssl.SSLContext | None:
    """macOS 官网版的 Python 没有系统证书；装了 certifi 就用它的。"""
    if not url.startswith("https"):
        return None
    paths = ssl.get_default_verify_paths()
    if paths.cafile or paths.capath:
        return ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        return ssl.create_default_context()
    return ssl.create_default_context(cafile=certifi.where())


def get_json(url: str) -> Any:
    """GET 一个 JSON；暂时的网络错误会重试。"""
    failures = 0
    while True:
        try:
            with _open(url) as response:
                answer = response.read()
            break
        except _NETWORK_ERRORS as error:
            failures += 1
            _wait_or_give_up(url, error, failures)
        except ValueError as error:  # 不是 http(s)://…
            raise UserError(f"地址 {url} 不合法（{error}）", fix="--endpoint 写成 https://主机名") from error
    try:
        return json.loads(answer)
    except ValueError as error:
        raise UserError(f"{url} 的回答不是 JSON（{error}）", fix="检查 --endpoint") from error


def _wait_or_give_up(url: str, error: Exception, failures: int) -> None:
    """该重试就等一会儿再返回，否则变成一句话的错误。"""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if error.code == 404:
            raise UserError(
                f"远端没有 {url}（404）", fix="用 --list 看有哪些文件，或检查 --endpoint 与 --repo"
            ) from error
        if error.code in (401, 403):
            raise UserError(
                f"没有权限读 {url}（{error.code}）", fix="换一个 --source，或检查 --repo"
            ) from error
        if error.code < 500 and error.code not in (408, 429):
            raise UserError(
                f"{url} 回答 {error.code} {error.reason}", fix="检查 --endpoint 与 --repo"
            ) from error
    if failures > RETRIES:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"网络连续失败 {failures} 次：{url}（{reason}）",
            fix="检查网络或代理（https_proxy），或换 --source / --endpoint；再运行同一条命令会从断点继续",
        ) from error
    time.sleep(min(RETRY_WAIT_SECONDS * 2 ** (failures - 1), 30))


def fetch(remote: RemoteFile, target: Path, force: bool = False) -> bool:
    """下载一个文件到 ``target``；已有同样内容时不下载。

    下载中的内容在同目录的 ``.文件名.哈希.part`` 里，断了再来时接着写；核对无误才改名到位。

    Returns:
        是否真的下载了。

    Raises:
        UserError: 目标已存在而内容不同（除非 ``force``）、哈希不符、磁盘不足、404、网络不通。
    """
    if target.exists() and not force:
        if target.stat().st_size == remote.size and remote.matches(_digest_of(target, remote)):
            say(f"{target.name} 已在 {target.parent}，校验一致，不用下载")
            return False
        raise UserError(
            f"{target} 已存在，但与远端的内容不同（本地 {target.stat().st_size:,} 字节，远端 {remote.size:,}）",
            fix="改用 --dir 换一个目录，或加 --force 覆盖它",
        )
    part = target.with_name(f".{target.name}.{remote.tag}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(part.with_suffix(".lock"), lambda: say(f"另一个进程正在下载 {target.name}，等它完成")):
            if not force and target.exists():
                return False
            _check_space(target, remote.size - (part.stat().st_size if part.exists() else 0))
            _download(remote, part)
            os.replace(part, target)
    except OSError as error:
        reason = "磁盘满了" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
        raise UserError(
            f"写不了 {target}：{reason}", fix="腾出空间或用 --dir 换一个目录；再运行会从断点继续"
        ) from error
    return True


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            f"磁盘空间不足：{target.name} 还需 {needed / 1e9:.2f} GB，{target.parent} 只剩 {free / 1e9:.2f} GB",
            fix="腾出空间，或用 --dir 换一个目录",
        )


def _digest_of(path: Path, remote: RemoteFile):
    digest = remote.new_digest()
    if digest is not None:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest


def _download(remote: RemoteFile, part: Path) -> None:
    """把 ``part`` 补全到 ``remote.size`` 字节并核对哈希；网络断开时从断点重试。"""
    have = part.stat().st_size if part.exists() else 0
    if have > remote.size:
        part.unlink()
        have = 0
    digest = _digest_of(part, remote) if have else remote.new_digest()
    if have:
        say(f"接着上次的 {have / 1e6:.1f} MB 继续下载 {remote.name}")
    failures = 0
    with part.open("ab") as file, progress(f"下载 {remote.name}", remote.size / 1e6, "MB") as bar:
        bar.advance(have / 1e6)
        while have < remote.size:
            before = have
            try:
                with _open(remote.url, have) as response:
                    if have and not _continues_at(response, have):
                        # 服务器不认 Range：从头来，已有的作废
                        bar.advance(-have / 1e6)
                        file.truncate(0)
                        have, digest = 0, remote.new_digest()
                    while have < remote.size and (block := response.read(BLOCK_BYTES)):
                        file.write(block)
                        if digest is not None:
                            digest.update(block)
                        have += len(block)
                        bar.advance(len(block) / 1e6)
                if have < remote.size:
                    raise ConnectionError("连接在传完之前断开")
            except _NETWORK_ERRORS as error:
                file.flush()
                failures = 1 if have > before else failures + 1
                _wait_or_give_up(remote.url, error, failures)
        file.flush()
        os.fsync(file.fileno())
    if have != remote.size or not remote.matches(digest):
        part.unlink()
        raise UserError(
            f"{remote.name} 下载完了，但内容与远端公布的哈希不符，已删除",
            expected=remote.sha256 or remote.git_sha1 or f"{remote.size} 字节",
            fix="再运行一次；若仍不符，换一个 --source",
        )


def _continues_at(response: http.client.HTTPResponse, offset: int) -> bool:
    """服务器是否真的从 ``offset`` 接着传。"""
    content_range = response.headers.get("Content-Range", "")
    return response.status == 206 and content_range.startswith(f"bytes {offset}-")


def choose_files(files: Sequence[RemoteFile], names: Sequence[str]) -> list[RemoteFile]:
    """按使用者写的名字（可省 ``.jsonl``）选文件；``all`` 是全部 jsonl，不写取推荐的一套。

    Raises:
        UserError: 清单里没有这个名字。
    """
    # 清单来自网络：只认仓库根目录下的普通文件名，写不到别的目录去
    known = {f.name: f for f in files if PurePosixPath(f.name).name == f.name and not f.name.startswith(".")}
    data = sorted(name for name in known if name.endswith(".jsonl"))
    if list(names) == ["all"]:
        return [known[name] for name in data]
    if not names:
        names = next((group for group in recommended() if all(name in known for name in group)), ())
        if not names:
            raise UserError(
                "清单里没有推荐的文件", expected=f"{'、'.join(data)} 之一", fix="写明要下载的文件名"
            )
    chosen = []
    for name in names:
        match = name if name in known else f"{name}.jsonl"
        if match not in known:
            near = difflib.get_close_matches(match, data, 1, 0.5)
            raise UserError(
                f"远端没有 {name}",
                expected=f"{'、'.join(data)} 之一",
                fix=f"是不是 {near[0]}？" if near else "用 --list 看有哪些文件",
            )
        chosen.append(known[match])
    return chosen


@dataclass
class DownloadArguments(Arguments):
    """下载公共 MiniMind 的数据文件，断点续传，核对哈希"""

    names: tuple[str, ...] = arg(
        (),
        "文件名，可省 .jsonl；all 是全部；不写则下载预训练与微调的最小一套",
        metavar="文件名",
        optional=True,
        text="filled",
    )
    source: str = arg("modelscope", "从哪个站下载", tuple(SOURCES))
    endpoint: str | None = arg(None, "站点地址，例如镜像；不给则是该站的官方地址", pattern=URL)
    repo: str | None = arg(None, "数据集仓库；不给则是公共 MiniMind 的数据集", pattern=REPO)
    dir: str = arg("dataset", "放在哪个目录", text="path")
    list: bool = arg(False, "只列出远端的文件")
    force: bool = arg(False, "覆盖内容不同的同名文件")


def main_download(argv: list[str] | None = None) -> int:
    """``minimind data download [文件名…]``：下载公共数据文件。"""
    description = f"{DownloadArguments.__doc__}\n\n{catalogue()}"
    args = parse_args(DownloadArguments, argv, "minimind data download", description)
    hub = SOURCES[args.source](get_json, args.endpoint, args.repo)
    files = hub.list_files()
    if args.list:
        purposes = {one.file: one.purpose for one in PUBLISHED}
        for file in sorted(files, key=lambda file: file.name):
            purpose = purposes.get(file.name, "")
            print(f"{file.size / 1e6:>10,.1f} MB  {file.name:<24}  {purpose}".rstrip())
        return 0
    chosen = choose_files(files, args.names)
    folder = resolve_path(args.dir)
    total = sum(file.size for file in chosen)
    say(f"下载 {'、'.join(file.name for file in chosen)}，共 {total / 1e6:,.1f} MB，放进 {folder}。")
    for file in chosen:
        if fetch(file, folder / file.name, args.force):
            checked = "哈希一致" if file.sha256 or file.git_sha1 else "远端没有公布哈希，只核对了大小"
            say(f"{folder / file.name}：{file.size / 1e6:,.1f} MB，{checked}")
    return 0
