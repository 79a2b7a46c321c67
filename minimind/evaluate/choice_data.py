"""读选择题：认得 C-Eval、CMMLU、AGIEval 的公开布局与本项目的 jsonl，一个文件或整个文件夹。

=============  =========================================================================
布局            一道题
=============  =========================================================================
本项目 jsonl    ``{"subject", "question", "choices": [...], "answer": 下标}``
C-Eval csv      表头 ``id,question,A,B,C,D,answer[,explanation]``，学科是文件名去掉 ``_val``
CMMLU csv       表头 ``,Question,A,B,C,D,Answer``，学科是文件名
AGIEval jsonl   ``{"passage", "question", "options": ["(A)…", …], "label": "A"}``，学科是文件名
=============  =========================================================================

没有答案的（C-Eval 的 test）、答案不止一个的（AGIEval 的多选题）不考，数目会报告。
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.dataset.jsonl import DataError, line_ranges, parse_line, read_lines
from minimind.errors import UserError

LETTERS = "ABCDEFGHIJ"
_OPTION_LABEL = re.compile(r"^\s*[(（]?([A-J])[)）.．、:：]\s*")
_SPLIT_SUFFIX = re.compile(r"[_-](dev|val|valid|test|train)$")


@dataclass(frozen=True)
class Question:
    """一道选择题；``answer`` 是正确选项的下标。"""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


class Skip(Exception):
    """这道题不考；消息说明为什么。"""


def read_questions(path: Path) -> tuple[list[Question], dict[str, int]]:
    """读一个文件或文件夹里的全部 csv 与 jsonl。

    Returns:
        题目，以及不考的题各有多少 ``{原因: 题数}``。

    Raises:
        UserError: 读不懂，附文件与行号；或一道题也没有。
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".csv", ".jsonl"))
    questions: list[Question] = []
    skipped: dict[str, int] = {}
    for file in files:
        subject = _SPLIT_SUFFIX.sub("", file.stem)
        records = _csv_records(file) if file.suffix.lower() == ".csv" else _jsonl_records(file)
        for line, record in records:
            try:
                questions.append(to_question(record, subject))
            except Skip as reason:
                skipped[str(reason)] = skipped.get(str(reason), 0) + 1
            except DataError as error:
                raise error.at(file, line) from None
    if not questions:
        raise UserError(
            "没有能考的题" + (f"（{skipped}）" if skipped else ""),
            where=str(path),
            expected="带答案的单选题，csv 或 jsonl",
            fix="换有答案的划分，例如 C-Eval 的 val",
        )
    return questions, skipped


def _csv_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            for record in reader:
                yield reader.line_num, {(key or "").strip().lower(): value for key, value in record.items()}
    except UnicodeDecodeError:
        raise UserError(
            "不是 UTF-8 编码", where=str(file), expected="UTF-8", fix="iconv -f GBK -t UTF-8 原文件 > 新文件"
        ) from None


def _jsonl_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    line = 0
    for start, end in line_ranges(file, 4 << 20):
        for raw in read_lines(file, start, end):
            line += 1
            try:
                record = parse_line(raw)
            except DataError as error:
                raise error.at(file, line) from None
            if record is not None:
                yield line, record


def to_question(record: dict[str, Any], subject: str) -> Question:
    """一条记录 → 一道题。

    Raises:
        Skip: 没有答案，或不止一个。
        DataError: 看不出是哪种布局，或选项、答案读不懂。
    """
    low = {key.lower(): value for key, value in record.items()}
    text = low.get("question")
    if not isinstance(text, str) or not text.strip():
        raise DataError("没有题目", field="question", expected="非空字符串", fix="补上或删掉这一行")
    choices = _choices(low)
    answer = low.get("label") if "options" in low else low.get("answer")
    passage = low.get("passage")
    if isinstance(passage, str) and passage.strip():
        text = f"{passage.strip()}\n{text.strip()}"
    return Question(low.get("subject") or subject, text.strip(), choices, _answer_index(answer, len(choices)))


def _choices(record: dict[str, Any]) -> tuple[str, ...]:
    listed = record.get("choices", record.get("options"))
    if isinstance(listed, list) and len(listed) > 1 and all(isinstance(item, str) for item in listed):
        if "options" in record and all(_OPTION_LABEL.match(item) for item in listed):
            listed = [_OPTION_LABEL.sub("", item, count=1) for item in listed]
        return tuple(item.strip() for item in listed)
    columns = [
        str(record[letter.lower()]).strip() for letter in LETTERS if record.get(letter.lower()) is not None
    ]
    if len(columns) > 1:
        return tuple(columns)
    raise DataError(
        "没有选项",
        field="choices",
        expected="choices（或 options）列表，或 A、B、C、D 各一列",
        fix="对照 minimind eval choice 的文档改字段名",
    )


def _answer_index(answer: Any, count: int) -> int:
    if isinstance(answer, list):
        if len(answer) != 1:
            raise Skip("多选题" if answer else "没有答案")
        answer = answer[0]
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise Skip("没有答案")
    index = answer if type(answer) is int else LETTERS.find(str(answer).strip().upper())
    if isinstance(answer, str) and len(answer.strip()) > 1 and set(answer.strip().upper()) <= set(LETTERS):
        raise Skip("多选题")
    if not 0 <= index < count or (isinstance(answer, str) and len(answer.strip()) != 1):
        raise DataError(
            f"答案 {answer!r} 不是选项之一",
            field="answer",
            expected=f"0 到 {count - 1} 的下标，或 A 到 {LETTERS[count - 1]}",
            fix="改正答案，或删掉这一行",
        )
    return index
