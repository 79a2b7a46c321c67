"""两个数据集托管站的文件清单：名字、大小、校验值、下载地址。"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from minimind.errors import UserError

PAGE_SIZE = 200


@dataclass(frozen=True)
class RemoteFile:
    """远端的一个文件。

    Attributes:
        name: 仓库里的路径。
        size: 字节数。
        url: 下载地址。
        sha256: 内容的 sha256；小文件在 Hugging Face 上没有，见 ``git_sha1``。
        git_sha1: git 的 blob 哈希。
    """

    name: str
    size: int
    url: str
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def tag(self) -> str:
        """认出“同一份内容”的短串；远端换了内容，旧的半截文件就不会接着用。"""
        return (self.sha256 or self.git_sha1 or f"size{self.size}")[:12]

    def new_digest(self) -> hashlib._Hash | None:
        """校验这个文件用的哈希对象；没有校验值时为 None。"""
        if self.sha256:
            return hashlib.sha256()
        if self.git_sha1:
            return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return None

    def matches(self, digest: hashlib._Hash | None) -> bool:
        return digest is None or digest.hexdigest() == (self.sha256 or self.git_sha1)


class ModelScope:
    """魔搭社区。"""

    name, endpoint, repo = "modelscope", "https://www.modelscope.cn", "gongjy/minimind_dataset"

    def __init__(self, get_json, endpoint: str | None = None, repo: str | None = None):
        self.get_json = get_json
        self.base = (
            f"{(endpoint or self.endpoint).rstrip('/')}/api/v1/datasets/{quote(repo or self.repo)}/repo"
        )

    def list_files(self) -> list[RemoteFile]:
        """数据集里的全部文件。"""
        files: list[RemoteFile] = []
        page = 1
        while True:
            query = {"Revision": "master", "Recursive": "True", "PageNumber": page, "PageSize": PAGE_SIZE}
            url = f"{self.base}/tree?{urlencode(query)}"
            entries = _entries(self.get_json(url), url, "Data", "Files")
            for entry in entries:
                if entry.get("Type") == "tree":
                    continue
                name = entry["Path"]
                query = urlencode({"Revision": "master", "FilePath": name})
                sha256 = entry.get("Sha256") or None
                files.append(RemoteFile(name, int(entry["Size"]), f"{self.base}?{query}", sha256))
            if len(entries) < PAGE_SIZE:
                return files
            page += 1


class HuggingFace:
    """Hugging Face 及其镜像。"""

    name, endpoint, repo = "huggingface", "https://huggingface.co", "jingyaogong/minimind_dataset"

    def __init__(self, get_json, endpoint: str | None = None, repo: str | None = None):
        self.get_json = get_json
        self.root, self.id = (endpoint or self.endpoint).rstrip("/"), quote(repo or self.repo)

    def list_files(self) -> list[RemoteFile]:
        """数据集里的全部文件；一页一千个，这个数据集只有几十个。"""
        url = f"{self.root}/api/datasets/{self.id}/tree/main?recursive=true"
        files = []
        for entry in _entries(self.get_json(url), url):
            if entry.get("type") != "file":
                continue
            name, lfs = entry["path"], entry.get("lfs") or {}
            link = f"{self.root}/datasets/{self.id}/resolve/main/{quote(name)}"
            files.append(
                RemoteFile(
                    name,
                    int(entry["size"]),
                    link,
                    sha256=lfs.get("oid"),
                    git_sha1=None if lfs else entry.get("oid"),
                )
            )
        return files


def _entries(answer: Any, url: str, *path: str) -> list[dict[str, Any]]:
    """从回答里取出文件列表；形状不对时说清是谁答了什么。"""
    value = answer
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list):
        text = json.dumps(answer, ensure_ascii=False)[:120]
        raise UserError(f"{url} 的回答不是文件清单：{text}", fix="检查 --endpoint 与 --repo")
    return value


SOURCES = {hub.name: hub for hub in (ModelScope, HuggingFace)}
