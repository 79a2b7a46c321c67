"""训练与评测分词器用的文本：从 jsonl 里取出所有文本字段，按来源许可取舍，按权重配比。"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from minimind.dataset.jsonl import DataError, short
from minimind.dataset.sources import read_records
from minimind.errors import UserError
from minimind.paths import file_problem
from minimind.tokenizer.render import text_of

# 禁止商用或只许研究用的来源：分词器要随代码以 Apache-2.0 发布，不拿它们训练
EXCLUDED_TAGS = (
    "hikariming_alpaca_zh",
    "llamafactory_alpaca_zh",
    "llamafactory_alpaca_en",
    "moss_sample",
    "medicalgpt_sharegpt_zh",
)


@dataclass(frozen=True)
class CorpusFile:
    """一个语料文件和它的权重；权重 1.4 指全部一遍，再均匀抽四成。"""

    path: Path
    weight: float = 1.0


def parse_mix(mix: str, folder: Path) -> list[CorpusFile]:
    """``"pretrain_zh=1,pretrain_en=1.4"`` → 来源列表；名字是 ``folder`` 下的 ``{名字}.jsonl``，也可写路径。

    Raises:
        UserError: 权重不是正数，或文件不存在。
    """
    sources = []
    for item in filter(None, (part.strip() for part in mix.split(","))):
        name, _, number = item.partition("=")
        try:
            weight = float(number or 1)
        except ValueError:
            weight = -1.0
        if not 0 < weight <= 100:
            raise UserError(f"权重读不懂：{item}", where="--mix", expected="名字=正数，例如 pretrain_en=1.4")
        path = Path(name).expanduser()
        if path.suffix != ".jsonl":
            path = folder / f"{name}.jsonl"
        if problem := file_problem(path):
            raise UserError(
                f"语料文件{problem}",
                where=str(path),
                fix="用 --data_dir 指出语料所在文件夹，或用 --mix 列出自己的文件",
            )
        sources.append(CorpusFile(path, weight))
    if not sources:
        raise UserError("没有任何语料", where="--mix", expected="至少一个 名字=权重")
    return sources


def record_text(record: dict) -> str:
    """一条记录的全部文本字段，用换行连接；认得预训练、对话、偏好、问答与选择题的格式。"""
    return "\n".join(filter(None, _fields(record)))


def _fields(record: dict) -> Iterator[str]:
    for key in ("text", "question", "prompt", "response"):
        if isinstance(record.get(key), str):
            yield record[key]
    for value in (record.get("choices"), record.get("answer")):
        values = value if isinstance(value, list) else [value]
        yield from (v for v in values if isinstance(v, str))
    for key in ("conversations", "messages", "chosen", "rejected"):
        messages = record.get(key)
        for message in messages if isinstance(messages, list) else ():
            if not isinstance(message, dict):
                raise UserError(f"{key} 里的一条消息是 {short(message)}", expected="JSON 对象 {…}")
            yield text_of(message.get("reasoning_content"))
            yield text_of(message.get("content"))


def read_texts(
    path: Path, exclude: tuple[str, ...] = (), bad: list[DataError] | None = None
) -> Iterator[str]:
    """逐行读出文本；``meta/{文件名}.src.txt`` 存在时，跳过标签在 ``exclude`` 里的行。

    行的读法与训练数据相同（:mod:`minimind.dataset.jsonl`）：容忍 BOM 与空行，孤立的代理符是坏行。

    Args:
        bad: 给了就跳过坏行，错误追加到这里；不给则抛出。

    Raises:
        DataError: 坏行（含文件、行号、字段）。
        UserError: 文件读不了，或标签文件与语料行数不同。
    """
    tags = _source_tags(path) if exclude else None
    count = 0
    for count, record in read_records(path, bad):
        if record is None or (tags is not None and count <= len(tags) and tags[count - 1] in exclude):
            continue
        try:
            text = record_text(record)
        except UserError as error:
            found = DataError(error.what, expected=error.expected, fix="改正或删掉这一行").at(path, count)
            if bad is None:
                raise found from None
            bad.append(found)
            continue
        if text:
            yield text
    if tags is not None and count != len(tags):
        raise UserError(
            f"来源标签有 {len(tags)} 行，语料有 {count} 行，按标签取舍会错位",
            where=str(path),
            fix="换上与语料同一版本的 meta 文件",
        )


def _source_tags(path: Path) -> list[str] | None:
    file = path.parent / "meta" / f"{path.name}.src.txt"
    return file.read_text("utf-8").splitlines() if file.is_file() else None


def weighted(texts: Iterator[str], weight: float) -> Iterator[str]:
    """每条重复 ``weight`` 次；小数部分均匀地抽（每隔几条多一次），没有随机数，两次运行相同。"""
    owed = 0.0
    for text in texts:
        owed += weight
        while owed >= 1:
            yield text
            owed -= 1


def mixed_texts(
    sources: list[CorpusFile], exclude: tuple[str, ...] = EXCLUDED_TAGS, bad: list[DataError] | None = None
) -> Iterator[str]:
    """所有来源按权重展开后的文本；``bad`` 见 :func:`read_texts`。"""
    return chain.from_iterable(weighted(read_texts(s.path, exclude, bad), s.weight) for s in sources)
