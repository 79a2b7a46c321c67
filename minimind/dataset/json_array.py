"""整个文件是一个 JSON 数组：边读边切成各项，内存里只有当前的一项。"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator

from minimind.dataset import jsonl
from minimind.dataset.jsonl import DataError

BLOCK = 1 << 20
# 数组的一项没读全时，语法错总在缓冲的末尾；离末尾比这更远的是真的写错了
_TAIL = 64


def array_items(stream: io.BufferedReader) -> Iterator[bytes]:
    """JSON 数组的各项，各成一行；只读到认得出一项的地方，缓冲不随文件变大。"""
    text = _Text(stream)
    text.skip("[")
    if text.char() != "]":
        while True:
            # 字符串里不会有没转义的换行，其余的换行只是排版
            yield text.value().translate(_ONE_LINE).encode("utf-8", "surrogatepass")
            if (found := text.char()) == "]":
                break
            if not found:
                raise _unfinished()
            if found != ",":
                raise DataError(
                    f"数组的这一项之前是 {jsonl.short(found)}", expected="各项用逗号隔开", fix="补上逗号"
                )
            text.skip(",")
            if text.char() == "]":
                raise DataError(
                    "数组的最后一项之后多了一个逗号", expected="各项之间才有逗号", fix="删掉 ] 之前的逗号"
                )
    text.skip("]")
    if rest := text.char():
        raise DataError(
            f"JSON 数组结束之后还有 {jsonl.short(rest)}",
            expected="整个文件是一个数组，或每行一个 JSON 对象",
            fix="每行一个数组的，改成每行一个对象",
        )


def _unfinished() -> DataError:
    return DataError("JSON 数组没有结束", expected="以 ] 结尾", fix="像是被截断了；重新下载或生成")


_ONE_LINE = str.maketrans("\r\n", "  ")


class _Text:
    """边读边解的一段 JSON 文本：看下一个字符，或取走一个值。"""

    def __init__(self, stream: io.BufferedReader):
        self.stream, self.text, self.at, self.ended = stream, "", 0, False
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.scan = json.JSONDecoder().raw_decode

    def read(self, size: int) -> None:
        """再读 ``size`` 字节，丢掉已经取走的。"""
        data = self.stream.read(size)
        self.ended = not data
        try:
            self.text, self.at = self.text[self.at :] + self.decode(data, self.ended), 0
        except UnicodeDecodeError as error:
            raise DataError(
                f"有不是 UTF-8 的字节 0x{error.object[error.start]:02x}",
                expected="UTF-8 编码",
                fix="若文件是 GBK 编码，先转码：iconv -f GBK -t UTF-8 原文件 > 新文件",
            ) from None

    def char(self) -> str:
        """跳过空白，看下一个字符；读完了是空串。"""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read(BLOCK)

    def skip(self, expected: str) -> None:
        if self.char() == expected:
            self.at += 1

    def value(self) -> str:
        """取走一个值，返回它的原文。"""
        if not self.char():
            raise _unfinished()
        size = BLOCK
        while True:
            try:
                _, end = self.scan(self.text, self.at)
                if end < len(self.text) or self.ended:  # 数字的后面也许还有几位没读到
                    found, self.at = self.text[self.at : end], end
                    return found
            except RecursionError:
                raise DataError("JSON 嵌套过深", expected="普通的 JSON 对象", fix="删掉这一项") from None
            except json.JSONDecodeError as error:
                # 字符串没有结束时报的位置是它的开头；也可能只是还没读到
                waiting = error.pos > len(self.text) - _TAIL or error.msg.startswith("Unterminated")
                if self.ended or not waiting:
                    one = self.text[self.at : error.pos + _TAIL]
                    at = json.JSONDecodeError(error.msg, one, error.pos - self.at)
                    raise jsonl.json_error(one, at) from None
            if len(self.text) - self.at > jsonl.MAX_LINE_BYTES:
                raise jsonl.too_long()
            self.read(size)
            size *= 2
