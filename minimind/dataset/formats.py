"""别家的整条记录 → 这里的字段：Alpaca、ShareGPT，与它们的偏好写法。

=======================================================  ==========================================
一行                                                      当作
=======================================================  ==========================================
``{"instruction", "input"?, "output", "history"?}``      ``conversations``：提问（与 input 隔一个换行）、回答
``conversations`` 里的 ``{"from", "value"}``              ``{"role", "content"}``；``function_call`` 是工具调用
``chosen``、``rejected`` 是字符串或一个回合               各自的回答；提问取 ``instruction``、``prompt`` 或 ``conversations``
=======================================================  ==========================================

OpenAI 的 ``messages`` 与 ``system``、``tools`` 等顶层字段由 :mod:`minimind.dataset.normalize` 接着处理。
报错里的字段是使用者文件里的名字（``output``、``conversations[1].value``），不是改写之后的。
"""

from __future__ import annotations

import re
from typing import Any

from minimind.dataset.jsonl import DataError, short
from minimind.dataset.turns import Note, conflict, filled, parsed

ALPACA = "Alpaca 的 instruction / input / output 当作对话"
SHAREGPT_FIELD = re.compile(r"(\w+)\[(\d+)\]\.(role|content)")
SHAREGPT = "ShareGPT 的 from / value 当作 role / content"
PREFERENCE = "只写回答的 chosen / rejected 补上提问"

# ShareGPT 与它的各种变体里的说话人
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    "system": "system",
}


def recognise(record: dict[str, Any], kind: str, note: Note) -> dict[str, Any]:
    """认出别家的整条记录并改写；不是的原样返回。

    Args:
        kind: 数据种类，预训练之外的。
        note: 每认出一种，用一句固定的话调用一次。

    Raises:
        DataError: 认出来了，而字段不合那种写法（无文件与行号）。
    """
    for name in ("conversations", "messages", "chosen", "rejected"):
        turns = record.get(name)
        if type(turns) is list and any(type(t) is dict and ("from" in t or "value" in t) for t in turns):
            turns = [_turn(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]
            record = {**record, name: turns}
            note(SHAREGPT)
    if kind == "dpo":
        return _preference(record, note)
    if "instruction" in record and "conversations" not in record and "messages" not in record:
        return _alpaca(record, kind, note)
    return record


def is_alpaca(record: dict[str, Any]) -> bool:
    """像 Alpaca 的一条：猜数据种类时用。"""
    return "instruction" in record and ("output" in record or "input" in record)


def speaker(turn: dict[str, Any]) -> str | None:
    """一个回合是谁说的，两种写法都认；认不出返回 None。"""
    role = _role(turn.get("role", turn.get("from")))
    return "assistant" if role == "call" else role


def _role(name: Any) -> str | None:
    """说话人的叫法 → 角色；认不出返回 None。"""
    return SPEAKERS.get(name.lower()) if type(name) is str else None


def in_their_words(error: DataError, record: dict[str, Any]) -> DataError:
    """校验改写之后的记录得到的错误，字段换回 ``record``（改写之前的）里的名字。"""
    if not (error.field and SHAREGPT_FIELD.fullmatch(error.field)):
        return error
    name, index, field = SHAREGPT_FIELD.fullmatch(error.field).groups()
    turns = record.get(name, record.get("messages"))
    if type(turns) is not list or int(index) >= len(turns):
        return error
    theirs = {"role": "from", "content": "value"}[field]
    turn = turns[int(index)]
    if type(turn) is not dict or theirs not in turn:
        return error
    return DataError.from_dict({**error.to_dict(), "field": f"{name}[{index}].{theirs}"})


# ---- ShareGPT ----


def _turn(turn: Any, path: str) -> Any:
    """``{"from", "value"}`` → ``{"role", "content"}``；别的字段照留。"""
    if type(turn) is not dict or not ("from" in turn or "value" in turn):
        return turn
    turn = dict(turn)
    for theirs, ours in (("from", "role"), ("value", "content")):
        same = theirs == "from" and _role(turn.get(theirs)) == _role(turn.get(ours)) is not None
        if theirs in turn and ours in turn and not same:
            conflict(f"{path}.{theirs}", ours, turn[theirs], turn[ours])
        if theirs in turn:
            turn[ours] = turn.pop(theirs)
        elif ours not in turn:
            raise DataError(
                f"缺少字段，只有 {short(list(turn))}",
                field=f"{path}.{theirs}",
                expected='{"from": …, "value": …}',
                fix=f"补上 {theirs}",
            )
    who, said = turn["role"], turn["content"]
    role = _role(who)
    if role is None:
        raise DataError(
            f"不认识的说话人 {short(who)}",
            field=f"{path}.from",
            expected=" | ".join(SPEAKERS),
            fix="改成其中之一",
        )
    if role == "call":
        calls = parsed(said, f"{path}.value")
        return {**turn, "role": "assistant", "content": "", "tool_calls": _calls(calls, f"{path}.value")}
    if type(said) is not str:
        raise DataError(f"是 {short(said)}", field=f"{path}.value", expected="字符串", fix="改成字符串")
    return {**turn, "role": role}


def _calls(calls: Any, path: str) -> list[Any]:
    calls = calls if type(calls) is list else [calls]
    if not calls or not all(type(call) is dict for call in calls):
        raise DataError(
            f"是 {short(calls)}",
            field=path,
            expected='{"name": …, "arguments": …} 或它们的列表',
            fix="补上工具名，或改成普通的回答",
        )
    return calls


# ---- Alpaca ----


def _text(record: dict[str, Any], name: str, needed: bool) -> str:
    """取出一段文字；没有而必需时报错。"""
    value = record.get(name)
    if value is None and not (needed and name not in record):
        value = ""
    if type(value) is str and (not needed or value.strip()):
        return value
    if name not in record:
        found = f"缺少字段，只有 {short(list(record))}"
    else:
        found = f"是空的 {short(value)}" if type(value) is str else f"是 {short(value)}"
    raise DataError(
        found, field=name, expected="非空字符串" if needed else "字符串", fix="补上内容，或删掉这一行"
    )


def _question(record: dict[str, Any]) -> list[dict[str, Any]]:
    """``history`` 里以前的问答，与这一次的提问。"""
    turns: list[dict[str, Any]] = []
    history = record.get("history")
    if filled(history):
        pairs = history if type(history) is list else [history]
        for i, pair in enumerate(pairs):
            if type(pair) is not list or len(pair) != 2 or not all(type(text) is str for text in pair):
                raise DataError(
                    f"是 {short(pair)}",
                    field=f"history[{i}]",
                    expected="[提问, 回答]",
                    fix="改成两个字符串的列表",
                )
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    extra = _text(record, "input", needed=False)
    asked = _text(record, "instruction", needed=not extra.strip())
    asked = "\n".join(part for part in (asked, extra) if part.strip())
    return [*turns, {"role": "user", "content": asked}]


def _alpaca(record: dict[str, Any], kind: str, note: Note) -> dict[str, Any]:
    turns = _question(record)
    answer = _text(record, "output", needed=kind == "sft")
    turns.append({"role": "assistant", "content": answer})
    note(ALPACA)
    used = ("instruction", "input", "output", "history")
    return {**{k: v for k, v in record.items() if k not in used}, "conversations": turns}


# ---- 偏好 ----


def _preference(record: dict[str, Any], note: Note) -> dict[str, Any]:
    """两边只写了回答（一段文字或一个回合）时，把提问补到两边的开头。"""
    sides = [record.get(name) for name in ("chosen", "rejected")]
    asked = [name for name in ("instruction", "prompt", "conversations") if filled(record.get(name))]
    if not asked or not all(type(side) in (str, dict) for side in sides):
        return record
    used = {"chosen", "rejected", "instruction", "input", "history", "prompt", "conversations"}
    if asked[0] == "instruction":
        turns = _question(record)
    else:
        turns = record[asked[0]]
        if type(turns) is str:
            turns = [{"role": "user", "content": turns}]
        used -= {"instruction", "input", "history"}
    if type(turns) is not list:
        raise DataError(
            f"是 {short(turns)}", field=asked[0], expected="字符串或消息列表", fix="改成提问的文字"
        )
    if len(asked) > 1:
        raise DataError(
            f"与 {asked[0]} 都像是提问，分不清用哪个",
            field=asked[1],
            expected="提问只写一处",
            fix=f"去掉 {asked[0]} 与 {asked[1]} 之一",
        )
    fixed = {name: [*turns, _answer(side, name)] for name, side in zip(("chosen", "rejected"), sides)}
    note(PREFERENCE)
    return {**{k: v for k, v in record.items() if k not in used}, **fixed}


def _answer(side: Any, name: str) -> Any:
    return {"role": "assistant", "content": side} if type(side) is str else _turn(side, name)
