"""词元 ↔ 字节：流式解码、logprobs 里每个词元代表的文字与字节，都查这张表。"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

_ATTRIBUTE = "_minimind_vocabulary"


def byte_alphabet() -> dict[str, int]:
    """字节级 BPE 用来写字节的 256 个字符 → 字节。

    可打印的字节（``!``–``~``、``¡``–``¬``、``®``–``ÿ``）就写成自己，其余依次写成 U+0100 起的字符（Radford 2019，GPT-2）。
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


class Vocabulary:
    """一个分词器的词元表；各词元用到才查，查过的留着。用 :func:`vocabulary_of` 取，同一个分词器只有一份。"""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder  # 每次取都要重建，留一份
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def _decoder(self) -> dict[str, Any]:
        return json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"] or {}

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(self._decoder)

    @cached_property
    def plain_bytes(self) -> bool:
        """整段文字的字节就是各词元的字节首尾相连：解码只有 ByteLevel 这一步（随包的、Qwen、Llama 3 都是）。"""
        return self._decoder.get("type") == "ByteLevel"

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return byte_alphabet()

    def special(self, token: int) -> bool:
        """解码时可以略去的控制词元。"""
        return token in self._added and self._added[token].special

    def bytes_of(self, token: int) -> bytes:
        """这个词元代表的字节；控制词元是它的名字。"""
        found = self._bytes.get(token)
        if found is None:
            text = self.tokenizer.convert_ids_to_tokens(token) or ""
            if token in self._added:
                found = text.encode()
            elif self._byte_level:
                found = bytes(self._alphabet[c] for c in text)
            elif text.startswith("<0x") and text.endswith(">"):
                found = bytes([int(text[3:-1], 16)])
            else:
                found = text.replace("▁", " ").encode()
            self._bytes[token] = found
        return found

    def text_of(self, token: int) -> str:
        """可读的写法；不成字的字节写成替换符。"""
        return self.bytes_of(token).decode("utf-8", errors="replace")


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """取得（第一次时建立）分词器的词元表，挂在分词器对象上。"""
    found = tokenizer.__dict__.get(_ATTRIBUTE)
    if found is None:
        found = tokenizer.__dict__[_ATTRIBUTE] = Vocabulary(tokenizer)
    return found
