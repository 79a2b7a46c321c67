"""压缩率对照表：每个文件、每个分词器的字节/token、字符/token 与速度。

``minimind tokenizer eval 文件…  [--tokenizer 文件夹 …]``
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from minimind.arguments import Arguments, arg, parse_args
from minimind.errors import UserError, guard
from minimind.paths import file_problem, resolve_path
from minimind.tokenizer.chat import encode_plain_batch
from minimind.tokenizer.corpus import read_texts
from minimind.tokenizer.loading import load_tokenizer

SHIPPED_NAME = "随包"


@dataclass
class Compression:
    """一个分词器在一个文件上的结果。"""

    tokenizer: str
    file: str
    bytes_per_token: float
    chars_per_token: float
    tokens_per_s: float


def measure(tokenizer, texts: list[str], batch: int = 1000) -> tuple[float, float, float]:
    """``(字节/token, 字符/token, token/秒)``；各文本分别编码，不加首尾 token。"""
    tokens, start = 0, time.perf_counter()
    for at in range(0, len(texts), batch):
        tokens += sum(map(len, encode_plain_batch(tokenizer, texts[at : at + batch])))
    seconds = time.perf_counter() - start
    size = sum(len(text.encode("utf-8")) for text in texts)
    return size / tokens, sum(map(len, texts)) / tokens, tokens / seconds


def compare(files: list[Path], folders: list[str]) -> list[Compression]:
    """每个文件 × 每个分词器量一遍；``folders`` 里的 ``随包`` 指自带的分词器。

    Raises:
        UserError: 文件不存在、没有文本，或分词器打不开。
    """
    tokenizers = {name: load_tokenizer(None if name == SHIPPED_NAME else name) for name in folders}
    rows = []
    for file in files:
        if problem := file_problem(file):
            raise UserError(f"文件{problem}", where=str(file), expected="jsonl 文件", fix="检查路径")
        texts = list(read_texts(file))
        if not texts:
            raise UserError("没有可以量的文本", where=str(file), expected="每行一个含文本字段的 JSON 对象")
        name = file.name.removesuffix(".jsonl").removesuffix(".heldout")
        rows += [Compression(key, name, *measure(tokenizer, texts)) for key, tokenizer in tokenizers.items()]
    return rows


def table(rows: list[Compression]) -> str:
    """Markdown 表格。"""
    lines = ["| 文件 | 分词器 | 字节/token | 字符/token | 万 token/秒 |", "|---|---|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row.file} | {row.tokenizer} | {row.bytes_per_token:.3f} | {row.chars_per_token:.3f}"
            f" | {row.tokens_per_s / 1e4:.1f} |"
        )
    return "\n".join(lines)


@dataclass
class CompressionArguments(Arguments):
    """量分词器在各个 jsonl 文件上的压缩率与速度。"""

    files: tuple[str, ...] = arg((), "jsonl 文件，所有文本字段用换行连接后分词", metavar="文件", text="path")
    tokenizer: tuple[str, ...] = arg((SHIPPED_NAME,), "一个或多个分词器文件夹；“随包”指自带的", text="path")
    json: str | None = arg(None, "把结果另存为 JSON 文件", text="path")


@guard
def main_eval(argv: list[str] | None = None) -> None:
    """``minimind tokenizer eval`` 的入口。"""
    args = parse_args(CompressionArguments, argv, prog="minimind tokenizer eval")
    rows = compare([resolve_path(file) for file in args.files], list(args.tokenizer))
    print(table(rows))
    if args.json:
        text = json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1)
        resolve_path(args.json).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    raise SystemExit(main_eval())
