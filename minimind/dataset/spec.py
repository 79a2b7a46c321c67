"""``--data_path`` 的写法 → 哪些文件、各占多少。

::

    a.jsonl                          一个文件（压缩的、列式的也行，见 sources.py）
    a.jsonl,b.parquet                几个文件首尾相接
    a.jsonl:0.7,b.jsonl.gz:0.3       按权重配：一轮里各占七成、三成（见 mixture.py）
    文件夹、data/*.jsonl:0.5          文件夹里的数据文件、通配符；权重归这一组

真有这个名字的文件或文件夹，就当作它，哪怕名字里有冒号、逗号、星号；``C:\\a.jsonl`` 里的冒号不是权重。
"""

from __future__ import annotations

import glob
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from minimind.console import say
from minimind.errors import UserError
from minimind.paths import LISTED, file_problem, resolve_path

# 权重之和与 1 差不到这么多的当作 1：0.333,0.333,0.333
SUM_TOLERANCE = Fraction(1, 500)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)
_MAGIC = re.compile(r"[*?\[]")
# 中文输入法里顺手打出的，与误当分隔的分号
_FULL_WIDTH = re.compile("[，：、；;]")
_HALF_WIDTH = str.maketrans({"，": ",", "：": ":", "、": ",", "；": ",", ";": ","})


_told: set[Path] = set()  # 本进程里已经说过用了哪些文件的文件夹


@dataclass(frozen=True)
class Part:
    """一组文件与它在一轮里占的份额；``weight`` 为 None 表示没有写权重，各组首尾相接。"""

    name: str
    files: tuple[Path, ...]
    weight: Fraction | None = None


def parse_spec(spec: str | Path, flag: str = "--data_path") -> list[Part]:
    """按写法列出各组文件，核对它们存在、权重合理。

    Args:
        spec: 使用者写的；``Path`` 当作一个文件。
        flag: 报错里的参数名。

    Raises:
        UserError: 文件不存在、文件夹里没有数据、同一个文件出现两次；权重不是正数、只写了一部分、加起来不是 1。
    """
    items = (
        [(str(spec), None)] if isinstance(spec, Path) else [_weighted(t, flag) for t in _split(spec, flag)]
    )
    parts = [Part(name, _files(name, flag), weight) for name, weight in items]
    _check_repeats(parts, flag)
    return _check_weights(parts, flag)


def _exists(text: str) -> bool:
    try:
        return bool(text) and resolve_path(text).exists()
    except (OSError, ValueError):  # 太长，或有不能用在名字里的字符
        return False


def _split(spec: str, flag: str) -> list[str]:
    """在逗号处切开；合起来是一个真有的名字（或它带着权重）的不切。"""
    pieces = spec.split(",")
    items, at = [], 0
    while at < len(pieces):
        end = at + 1
        for longer in range(len(pieces), at + 1, -1):
            text = ",".join(pieces[at:longer]).strip()
            if _exists(text) or _exists(_cut_weight(text)[0]):
                end = longer
                break
        text = ",".join(pieces[at:end]).strip()
        if not text:
            raise UserError(
                f"第 {len(items) + 1} 项是空的",
                where=f"{flag} {spec}",
                expected="文件:权重,文件:权重",
                fix="去掉多余的逗号",
            )
        items.append(text)
        at = end
    return items


def _cut_weight(text: str) -> tuple[str, str | None]:
    """``路径:数`` → (路径, 数)；冒号后面不是数的原样返回。"""
    head, colon, tail = text.rpartition(":")
    return (head, tail.strip()) if colon and head and _NUMBER.fullmatch(tail.strip()) else (text, None)


def _weighted(text: str, flag: str) -> tuple[str, Fraction | None]:
    """一项 → (路径, 权重)。"""
    if _exists(text):
        return text, None
    name, number = _cut_weight(text)
    if number is None:
        head, colon, tail = text.rpartition(":")
        # 冒号后面像路径的（C:\a.jsonl）整个当路径；前面真有这个文件的，后面想写的是权重
        if colon and head and not re.search(r"[/\\]", tail) and (_exists(head) or _matches(head)):
            raise UserError(
                f"权重 {tail!r} 不是数" if tail.strip() else "冒号后面没有权重",
                where=f"{flag} {text}",
                expected="文件:权重，例如 a.jsonl:0.7",
                fix="写出权重，或去掉冒号",
            )
        return text, None
    value = float(number)
    if not math.isfinite(value) or value <= 0:
        raise UserError(
            f"权重是 {number}",
            where=f"{flag} {text}",
            expected="大于 0 的数，各组之和是 1",
            fix="不用这个文件就去掉这一项",
        )
    return name, Fraction(number)


def _matches(pattern: str) -> list[Path]:
    """通配符匹配到的文件，按名字排好；``**`` 走进子文件夹。"""
    if not _MAGIC.search(pattern):
        return []
    found = map(Path, glob.glob(str(resolve_path(pattern)), recursive=True))
    return sorted(path for path in found if path.is_file())


def _files(name: str, flag: str) -> tuple[Path, ...]:
    """一项里的文件：一个文件、文件夹里的数据文件，或通配符匹配到的。"""
    path = resolve_path(name)
    if path.is_dir():
        return _in_folder(path, flag)
    if not _exists(name) and _MAGIC.search(name):
        if found := _matches(name):
            return tuple(found)
        raise UserError(
            "通配符没有匹配到文件",
            where=f"{flag} {path}",
            expected="至少一个数据文件",
            fix="检查路径；子文件夹里的用 **，例如 data/**/*.jsonl",
        )
    wrong = None if _exists(name) else _FULL_WIDTH.search(name)
    if wrong and any(_exists(piece.strip()) for piece in re.split(f"{_FULL_WIDTH.pattern}|[,:]", name)):
        raise UserError(
            f"没有叫这个名字的文件，里面有 {wrong[0]!r}",
            where=f"{flag} {name}",
            expected="文件:权重,文件:权重，逗号与冒号用半角",
            fix=f"写成 {name.translate(_HALF_WIDTH)}",
        )
    if not _exists(name) and (share := re.fullmatch(r"(.+):(\d+)/(\d+)", name)) and _exists(share[1]):
        raise UserError(
            f"权重写成了分数 {share[2]}/{share[3]}",
            where=f"{flag} {name}",
            expected="小数",
            fix=f"写成 {share[1]}:{int(share[2]) / (int(share[3]) or 1):.4g}",
        )
    if not flag.startswith("--"):
        from minimind.dataset.jsonl import check_exists

        check_exists(path)
    if problem := file_problem(path):
        raise UserError(
            f"数据文件{problem}",
            where=f"{flag} {path}",
            expected="数据文件、文件夹或通配符，几个用逗号隔开",
            fix=_fix(flag),
        )
    return (path,)


def _fix(flag: str) -> str:
    """训练命令可以不给数据，别的命令不行。"""
    return "写出一个文件的路径" + ("，或去掉这个参数用内置的微世界语料" if flag.startswith("--") else "")


def _in_folder(folder: Path, flag: str) -> tuple[Path, ...]:
    """文件夹这一层的数据文件；不是数据的说出来，免得以为都用上了。"""
    from minimind.dataset.sources import is_data_file  # 只写了一个文件的不必认外壳

    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"打不开文件夹（{error.strerror}）", where=f"{flag} {folder}", fix="检查权限"
        ) from error
    files = [entry for entry in entries if is_data_file(entry)]
    if not files:
        deeper = min((p for p in folder.rglob("*") if is_data_file(p)), default=None)
        raise UserError(
            f"数据文件{file_problem(folder)}",
            where=f"{flag} {folder}",
            expected="这一层有 .jsonl、.json（可再压缩成 .gz、.zst）、.parquet 或 .arrow 文件",
            fix=f"子文件夹里有 {deeper.relative_to(folder)}：写出那个文件夹，或用通配符 {folder}/**/*{deeper.suffix}"
            if deeper
            else _fix(flag),
        )
    if folder in _told:
        return tuple(files)
    _told.add(folder)
    others = [entry.name for entry in entries if entry not in files]
    unused = (
        f"；没有用的：{'、'.join(others[:LISTED])}{' 等' if len(others) > LISTED else ''}" if others else ""
    )
    names = "、".join(file.name for file in files[:LISTED])
    say(
        f"文件夹 {folder}：用其中的 {len(files)} 个文件 {names}{' 等' if len(files) > LISTED else ''}{unused}。"
    )
    return tuple(files)


def _check_repeats(parts: list[Part], flag: str) -> None:
    seen: dict[Path, str] = {}
    for part in parts:
        for file in part.files:
            real = file.resolve()
            if real in seen:
                raise UserError(
                    f"{file} 出现了两次（{seen[real]} 与 {part.name}）",
                    where=flag,
                    expected="每个文件只出现一次",
                    fix="去掉一处；要多学几遍就用权重",
                )
            seen[real] = part.name


def _check_weights(parts: list[Part], flag: str) -> list[Part]:
    weights = [part.weight for part in parts]
    if not any(weights):
        return parts
    if missing := [part.name for part in parts if part.weight is None]:
        raise UserError(
            f"{missing[0]} 没有写权重，别的写了",
            where=flag,
            expected="要么都写权重，要么都不写（都不写就是首尾相接）",
            fix=f"写成 {missing[0]}:权重",
        )
    total = sum(weights)
    if abs(total - 1) > SUM_TOLERANCE:
        scaled = ",".join(f"{part.name}:{float(part.weight / total):.4g}" for part in parts)
        raise UserError(
            f"权重加起来是 {float(total):g}", where=flag, expected="加起来是 1", fix=f"按比例是 {scaled}"
        )
    return [Part(part.name, part.files, part.weight / total) for part in parts]
