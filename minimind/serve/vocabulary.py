"""词元 ↔ 字节：logprobs 里要报每个词元代表的文字与字节。"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any


def byte_alphabet() -> dict[str, int]:
    """字节级 BPE 用来写字节的 256 个字符 → 字节。

    可打印的字节（``!``–``~``、``¡``–``¬``、``®``–``ÿ``）就写成自己，其余依次写成 U+0100 起的字符（Radford 2019，GPT-2）。
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


class Vocabulary:
    """一个分词器的词元表。"""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"])

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return byte_alphabet()

    def bytes_of(self, token: int) -> bytes:
        """这个词元代表的字节；控制词元是它的名字。"""
        if token not in self._bytes:
            text = self.tokenizer.convert_ids_to_tokens(token) or ""
            if token in self.tokenizer.added_tokens_decoder:
                value = text.encode()
            elif self._byte_level:
                value = bytes(self._alphabet[c] for c in text)
            elif text.startswith("<0x") and text.endswith(">"):
                value = bytes([int(text[3:-1], 16)])
            else:
                value = text.replace("▁", " ").encode()
            self._bytes[token] = value
        return self._bytes[token]

    def text_of(self, token: int) -> str:
        """可读的写法；不成字的字节写成替换符。"""
        return self.bytes_of(token).decode("utf-8", errors="replace")
