"""数据测试共用：独立的缓存目录、随包的分词器、写 jsonl 的小工具。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minimind.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """每个测试用自己的缓存目录，互不影响，也不碰仓库里的。"""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINIMIND_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path):
    """``write_jsonl(记录列表, 名字)`` → 路径；bytes 与 str 的元素原样作为一行。"""

    def write(records, name="data.jsonl") -> Path:
        path = tmp_path / name
        lines = []
        for record in records:
            if isinstance(record, bytes):
                lines.append(record)
            elif isinstance(record, str):
                lines.append(record.encode())
            else:
                lines.append(json.dumps(record, ensure_ascii=False).encode())
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write
