"""五种数据的格式规则：手写的检查，每条规则一句话说清该怎么修。

=========  ===================================================================
种类        每行
=========  ===================================================================
pretrain   ``{"text": …}``
sft        ``{"conversations": [{"role", "content", …}, …]}``；lora、reason、蒸馏同此
dpo        ``{"chosen": [...], "rejected": [...]}``，到分歧处为止完全相同
kto        ``{"conversations": [...], "label": true | false}``，最后的回答好不好；或 ``{"prompt", "completion", "label"}``
rl         ``{"conversations": [...]}``，末尾的助手回合是参考答案，可以为空或没有
=========  ===================================================================

不用 pydantic：在 sft 对话上实测，只查类型与角色它每核约 50 MB/s，手写的全部规则约 700 MB/s（都不含读
JSON）；几 GB 的文件差出几分钟，而且它的报错说不出“怎么修”。
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind.dataset.conversation import check_turns, is_empty_answer, type_name
from minimind.dataset.formats import in_their_words, is_alpaca, speaker
from minimind.dataset.jsonl import DataError, parse_line, short
from minimind.dataset.normalize import normalize
from minimind.dataset.sources import raw_lines
from minimind.dataset.turns import Note
from minimind.errors import UserError
from minimind.paths import resolve_path

KINDS = ("pretrain", "sft", "dpo", "kto", "rl")
# 猜种类时至多看开头这么多字节
GUESS_BYTES = 1 << 20

_EXAMPLES = {
    "pretrain": '{"text": "一段文字"}',
    "sft": '{"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}',
    "dpo": '{"chosen": [提问, 好的回答], "rejected": [提问, 差的回答]}',
    "kto": '{"prompt": "问", "completion": "答", "label": true}',
    "rl": '{"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": ""}]}',
}


def validate_pretrain(record: dict[str, Any]) -> None:
    """检查一条预训练文本；不合要求时抛 :class:`DataError`（无文件与行号）。"""
    text = _field(record, "text", "pretrain")
    if type(text) is not str:
        raise DataError(
            f"是 {type_name(text)} {short(text)}", field="text", expected="字符串", fix="改成字符串"
        )
    if not text or text.isspace():
        raise DataError(
            f"文本是空的 {short(text)}",
            field="text",
            expected="非空字符串",
            fix="删掉这一行，或用 --on_bad_line skip 跳过",
        )


def validate_sft(record: dict[str, Any]) -> None:
    """检查一段监督微调对话：至少一个有内容的助手回合。"""
    turns = _field(record, "conversations", "sft")
    if not check_turns(turns, "conversations", learnt=True):
        raise DataError(
            "没有助手回合，这条数据没有可学的内容",
            field="conversations",
            expected="至少一个 assistant 回合",
            fix="补上回答，或删掉这一行",
        )


def validate_dpo(record: dict[str, Any]) -> None:
    """检查一对偏好：两边各自合法、以助手回合结尾、提问相同、回答不同。"""
    chosen, rejected = _field(record, "chosen", "dpo"), _field(record, "rejected", "dpo")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        check_turns(turns, name)
        if turns[-1]["role"] != "assistant":
            raise DataError(
                f"最后一个角色是 {turns[-1]['role']}",
                field=f"{name}[{len(turns) - 1}].role",
                expected="以 assistant 的回答结尾",
                fix="补上回答，或删掉多余的回合",
            )
    if chosen == rejected:
        raise DataError(
            "chosen 与 rejected 完全相同",
            field="rejected",
            expected="两个不同的回答",
            fix="删掉这一行，它没有偏好可学",
        )
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a == b:
            continue
        for name, turn in (("chosen", a), ("rejected", b)):
            if turn.get("weight") == 0:
                raise DataError(
                    "要比的回答写着不学",
                    field=f"{name}[{i}].weight",
                    expected="从第一个不同的回合起都要学",
                    fix="去掉 weight / loss / train，或删掉这一行",
                )
        if a["role"] != "assistant" or b["role"] != "assistant":
            raise DataError(
                f"与 chosen[{i}] 不同：{short(b['content'], 24)} / {short(a['content'], 24)}",
                field=f"rejected[{i}]",
                expected="两边的提问相同，只有助手的回答不同",
                fix="让两边用同一份提问，否则学到的是提问的差别",
            )
        break
    else:
        longer, shorter = ("chosen", "rejected") if len(chosen) > len(rejected) else ("rejected", "chosen")
        raise DataError(
            f"{shorter} 就是 {longer} 的开头，没有自己的回答",
            field=f"{shorter}[{min(len(chosen), len(rejected)) - 1}]",
            expected="两边从同一个回合起给出不同的回答",
            fix="补上那个回合的另一个回答，或删掉这一行",
        )


def validate_kto(record: dict[str, Any]) -> None:
    """检查一条不成对的偏好：对话以助手的回答结尾，``label`` 说它好不好。"""
    turns, label = _field(record, "conversations", "kto"), _field(record, "label", "kto")
    check_turns(turns, "conversations")
    if turns[-1]["role"] != "assistant":
        raise DataError(
            f"最后一个角色是 {turns[-1]['role']}",
            field=f"conversations[{len(turns) - 1}].role",
            expected="以 assistant 的回答结尾",
            fix="补上回答，或删掉多余的回合",
        )
    if turns[-1].get("weight") == 0:
        raise DataError(
            "标了好坏的回答写着不学",
            field=f"conversations[{len(turns) - 1}].weight",
            expected="最后的回答要学",
            fix="去掉 weight / loss / train，或删掉这一行",
        )
    if type(label) is not bool:
        raise DataError(
            f"是 {type_name(label)} {short(label)}",
            field="label",
            expected="true 或 false",
            fix="好的写 true",
        )


def validate_rl(record: dict[str, Any]) -> None:
    """检查一条强化学习提示：去掉末尾的助手回合后，以 user 或 tool 结尾。"""
    turns = _field(record, "conversations", "rl")
    check_turns(turns, "conversations", open_end=True)
    if turns[-1]["role"] == "system" or (len(turns) == 1 and turns[0]["role"] != "user"):
        raise DataError(
            "没有提问",
            field="conversations",
            expected="至少一个 user 回合",
            fix="补上提问，或删掉这一行",
        )


VALIDATORS: dict[str, Callable[[dict[str, Any]], None]] = {
    "pretrain": validate_pretrain,
    "sft": validate_sft,
    "dpo": validate_dpo,
    "kto": validate_kto,
    "rl": validate_rl,
}


def read_record(raw: bytes, kind: str, note: Note = lambda sentence: None) -> dict[str, Any] | None:
    """一行 → 改写、校验过的记录；空行返回 None。读数据的每一处都走这里。

    Args:
        note: 见 :func:`minimind.dataset.normalize.normalize`。

    Raises:
        DataError: 坏行（无文件与行号）。
    """
    record = parse_line(raw)
    if record is None:
        return None
    fixed = normalize(record, kind, note)
    try:
        VALIDATORS[kind](fixed)
    except DataError as error:
        raise in_their_words(error, record) from None
    return fixed


def _field(record: dict[str, Any], name: str, kind: str) -> Any:
    """取出必需的顶层字段；缺少时看看这是不是别种数据。"""
    if name in record:
        return record[name]
    keys = list(record)
    fix = f"改成 {_EXAMPLES[kind]}"
    other = _guess_kind(record)
    if "messages" in record and kind in ("sft", "rl"):
        fix = "这是 OpenAI 的格式：把 messages 改名为 conversations"
    elif other and other != kind and {other, kind} != {"sft", "rl"}:
        command = "用 minimind dpo --loss_type kto" if other == "kto" else "换用对应的训练命令"
        fix = f"这像是 {other} 数据，{command}；{kind} 数据每行形如 {_EXAMPLES[kind]}"
    elif near := difflib.get_close_matches(name, keys, 1, 0.6):
        fix = f"把 {near[0]} 改名为 {name}"
    raise DataError(f"缺少字段，只有 {short(keys)}", field=name, expected=f"字段 {name}", fix=fix)


def _guess_kind(record: dict[str, Any]) -> str | None:
    """由字段猜种类；猜不出返回 None。"""
    if "chosen" in record or "rejected" in record:
        return "dpo"
    talk = "conversations" in record or "messages" in record or is_alpaca(record)
    if (type(record.get("label")) is bool and talk) or ("prompt" in record and "completion" in record):
        return "kto"
    if is_alpaca(record):
        answer = record.get("output")
        return "rl" if type(answer) is str and is_empty_answer(answer) else "sft"
    turns = record.get("conversations", record.get("messages"))
    if isinstance(turns, list):
        tail = turns[-1] if turns and isinstance(turns[-1], dict) else {}
        # 公共数据的强化学习提示以空回答或占位的词结尾
        content = tail.get("content", tail.get("value"))
        empty = type(content) is str and is_empty_answer(content)
        no_answer = speaker(tail) != "assistant" or (
            empty and not tail.get("tool_calls") and not tail.get("function_call")
        )
        return "rl" if no_answer else "sft"
    return "pretrain" if "text" in record else None


def guess_kind(path: str | Path) -> str | None:
    """看文件（任一种外壳）开头的记录猜种类；猜不出返回 None。"""
    size = 0
    for raw in raw_lines(resolve_path(path)):
        try:
            record = parse_line(raw)
        except DataError:
            record = None
        if record and (kind := _guess_kind(record)):
            return kind
        if (size := size + len(raw)) > GUESS_BYTES:
            break
    return None


def _raise_if_all_broken(path: Path) -> None:
    """开头的行没有一行是合法的记录：说第一行坏在哪里，比“看不出种类”有用。

    Raises:
        DataError: 第一行的毛病。
    """
    first = None
    for line, raw in enumerate(itertools.islice(raw_lines(path), 1000), 1):
        try:
            if parse_line(raw) is not None:
                return
        except DataError as error:
            first = first or error.at(path, line)
    if first is not None:
        raise first


def detect_kind(path: str | Path) -> str:
    """:func:`guess_kind`；有参考答案的强化学习数据与 sft 分不清，算作 sft。

    Raises:
        UserError: 一条记录也没有，或开头的都猜不出。
    """
    if kind := guess_kind(path):
        return kind
    path = resolve_path(path)
    _raise_if_all_broken(path)
    if all(not raw.strip() for raw in itertools.islice(raw_lines(path), 1000)):
        raise UserError(f"{path} 里没有一条记录", expected="每行一个 JSON 对象", fix="换一个文件")
    raise UserError(
        "看不出是哪种数据",
        where=str(path),
        expected="、".join(f"{kind} {example}" for kind, example in _EXAMPLES.items()),
        fix="用 --kind 指明种类",
    )
