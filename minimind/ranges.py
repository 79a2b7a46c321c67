"""参数的取值范围：数的上下限、文字的种类；每一种不合都说成“看到什么、期望什么、怎么修”。"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# 计数的上限：比它大的多半是多打了几个零，而且有些库只收 32 位的整数
MANY = 10**9
# 说明里写出的范围以它为界：更大的上限只是防手误，写出来反而啰嗦
TELLING = 10**5
# 主流文件系统一段名字的上限，留 55 个字节给 _512_moe_resume.pth 之类的后缀
MAX_NAME_BYTES, MAX_PART_BYTES, MAX_PATH_BYTES = 200, 255, 4000
# 文件名里不能有的：分隔符、Windows 不许的、会被当成通配符的
FORBIDDEN_IN_NAMES = '/\\:*?"<>|[]'

DEVICE = (r"(?i:auto|(cpu|mps|cuda|npu)(:[0-9]{1,4})?)", "auto、cpu、cuda:0、npu:0 或 mps", "不认识的设备 ")
URL = (r"https?://[^\s/]+\S*", "写成 https://主机名 或 http://主机名:端口", "不是网址：")


def shown(value: Any, limit: int = 40) -> str:
    """报错里写看到的值：文字带引号，打印不出来的字符换成转义，太长的中间省略。"""
    text = repr(value) if isinstance(value, str) else str(value)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else f"{text[: limit - 10]}…{text[-9:]}"


def parse_number(text: str, kind: type) -> int | float | None:
    """半角写法的数，``-0.0`` 就是 0；不是数返回 None。"""
    if not text.isascii():
        return None
    try:
        return kind(text) + kind(0)
    except ValueError:  # 不是数，或整数长到 Python 不肯读
        return None


@dataclass(frozen=True)
class Range:
    """数的范围；``low``、``high`` 含端点，``above``、``below`` 不含，``multiple`` 要求是它的整数倍。"""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    multiple: int | None = None

    @property
    def complete(self) -> bool:
        """上下限都说了。"""
        return None not in (
            self.low if self.above is None else self.above,
            self.high if self.below is None else self.below,
        )

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple is None or value % self.multiple == 0)
        )

    def words(self) -> str:
        """``0 到 1（不含）``、``大于 0，至多 100``、``16 到 16384，16 的倍数``。"""
        top = self.high if self.below is None else self.below
        if self.low is not None and top is not None:
            text = f"{self.low} 到 {top}" + ("（不含）" if self.below is not None else "")
        else:
            bottom = f"不小于 {self.low}" if self.low is not None else f"大于 {self.above}"
            parts = [bottom] if (self.low, self.above) != (None, None) else []
            if top is not None:
                parts.append(f"至多 {top}" if self.below is None else f"小于 {top}")
            text = "，".join(parts) or "有限的数"
        return text + (f"，{self.multiple} 的倍数" if self.multiple else "")

    def hint(self) -> str:
        """写进 ``--help`` 的范围；只防手误的上限与人人知道的“不小于 0”不写。"""
        top = self.high if self.below is None else self.below
        if top is not None and top < TELLING:
            return self.words()
        return (
            ""
            if self.low in (0, 1)
            else Range(low=self.low, above=self.above, multiple=self.multiple).words()
        )


def _encodable(text: str) -> str | None:
    if "\0" in text:
        return "里面有 NUL 字符"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "不是合法的 UTF-8"
    return None


def _filled(text: str) -> str | None:
    return _encodable(text) or (None if text.strip() else "是空的")


def _path(text: str) -> str | None:
    if problem := _filled(text):
        return problem
    longest = max(len(part.encode("utf-8")) for part in re.split(r"[/\\]", text))
    too_long = longest > MAX_PART_BYTES or len(text.encode("utf-8")) > MAX_PATH_BYTES
    return "比文件系统允许的长" if too_long else None


def _paths(text: str) -> str | None:
    if problem := _filled(text):
        return problem
    problems = [problem for part in text.split(",") if part.strip() and (problem := _path(part))]
    return problems[0] if problems else None


def _name(text: str) -> str | None:
    if problem := _filled(text):
        return problem
    if bad := [c for c in text if c in FORBIDDEN_IN_NAMES or not c.isprintable()]:
        return f"里面有 {shown(bad[0])}"
    if text in (".", "..") or text != text.strip():
        return "不能当文件名"
    if text.endswith(".pth"):
        return "写的是文件名"
    return "太长" if len(text.encode("utf-8")) > MAX_NAME_BYTES else None


def _weight(text: str) -> str | None:
    return _path(text) if text.endswith(".pth") else _name(text)


def _weights(text: str) -> str | None:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return _filled(text) or next((problem for part in parts if (problem := _weight(part))), None)


# 种类 → (查，期望什么)
TEXTS: dict[str, tuple[Callable[[str], str | None], str]] = {
    "any": (_encodable, "文字"),
    "filled": (_filled, "不空的文字"),
    "path": (_path, "文件或目录的路径"),
    "paths": (_paths, "一个或几个名字或路径，逗号分隔"),
    "weight": (_weight, "权重的名字，或 .pth 文件的路径"),
    "weights": (_weights, "名字或 .pth 文件的路径，逗号分隔几个"),
    "name": (_name, f"一个名字，要用作文件名：不含 {' '.join(FORBIDDEN_IN_NAMES)}，不带 .pth"),
}


def name_fix(text: str, flag: str) -> str | None:
    """写成了 ``out/pretrain_512.pth`` 的，拆成目录与名字。"""
    folder, name = os.path.split(text.replace("\\", "/"))
    match = re.fullmatch(r"(.+?)(_\d+)?(_moe)?(\.pth)?", name)
    if not match or _name(match[1]):
        return None
    return f"写成 --save_dir {folder} {flag} {match[1]}" if folder else f"写成 {flag} {match[1]}"
