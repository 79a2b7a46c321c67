"""别家的写法 → 这里的写法：意思清楚的改写并计数，不清楚的报错，从不悄悄丢掉内容。

========================================  =====================================================
写法                                       当作
========================================  =====================================================
Alpaca、ShareGPT 的整条记录                见 :mod:`minimind.dataset.formats`
顶层 ``messages``                          ``conversations``
顶层 ``system``、``tools``、``functions``  system 回合的内容与 ``tools``
角色 ``function``、``developer``           ``tool``、``system``
``function_call``                          只有一项的 ``tool_calls``
``reasoning``、``thinking``                ``reasoning_content``
``weight``、``loss``、``train`` 为 0 / 假  ``weight: 0``：这个助手回合只当上文，不学
正文以空的 ``<think></think>`` 开头        ``reasoning_content`` 为空串（关着思考答的，空块不学）
正文里与 ``tool_calls`` 相同的调用         一次调用
``content`` 是文本段的列表                 接起来的字符串
顶层 ``prompt``（偏好，两边只有回答）      两边共同的提问
``prompt`` 与 ``completion``（kto）        ``conversations``；``label`` 的 0 与 1 当作假与真
========================================  =====================================================

两种写法同时出现而说的不是一回事时，报错并指出字段。不认识的字段记下名字，由 ``data check`` 与训练开头的一行说出来。
一个回合里的改写在 :mod:`minimind.dataset.turns`；平常的回合（只有 role 与 content）只花一次长度比较。
"""

from __future__ import annotations

from typing import Any

from minimind.dataset.formats import recognise
from minimind.dataset.jsonl import DataError, short
from minimind.dataset.turns import (
    ROLE_NAMES,
    TRAIN_NAMES,
    Note,
    conflict,
    filled,
    leftovers,
    move_tools,
    parsed,
    rewrite_turn,
)
from minimind.tokenizer.render import REASONING_NAMES

# 每种数据读的顶层字段
FIELDS = {
    "pretrain": ("text",),
    "sft": ("conversations",),
    "dpo": ("chosen", "rejected"),
    "kto": ("conversations", "label"),
    "rl": ("conversations",),
}


def normalize(record: dict[str, Any], kind: str, note: Note = lambda sentence: None) -> dict[str, Any]:
    """把一条记录改写成校验规则认得的样子；没有要改的就原样返回。

    形状不对的地方（不是列表、不是对象……）不碰，留给 :mod:`minimind.dataset.schema` 报错。

    Args:
        record: 一行 JSON。
        kind: 数据种类。
        note: 每改写一处、每见到一个没用上的字段，就用一句固定的话调用一次；同一条记录里可能重复。

    Raises:
        DataError: 两种写法互相矛盾，或有改变意思而不支持的字段（无文件与行号）。
    """
    names = FIELDS[kind]
    if kind != "pretrain":
        if kind == "kto":
            record = _unpaired(record, note)
        record = recognise(record, kind, note)
        if len(record) > len(names) or names[0] not in record:
            record = _whole_record(record, kind, note)
        for name in names:
            turns = record.get(name)
            if type(turns) is list:
                fixed = [rewrite_turn(turn, f"{name}[{i}]", note) for i, turn in enumerate(turns)]
                if any(a is not b for a, b in zip(fixed, turns, strict=True)):
                    record = {**record, name: fixed}
        if kind == "kto":
            record = _answer_only(record)
    # 强化学习的记录整条交给奖励函数，它的字段由奖励函数取用
    if len(record) > len(names) and kind != "rl":
        leftovers(record, set(names), "", note, strict=kind != "pretrain")
    return record


def _whole_record(record: dict[str, Any], kind: str, note: Note) -> dict[str, Any]:
    """顶层的别名、工具、系统提示与推理，归到各自的回合上。"""
    record = dict(record)
    if kind == "dpo":
        _shared_prompt(record, note)
    elif "messages" in record and "conversations" not in record:
        record["conversations"] = record.pop("messages")
        note("顶层 messages 当作 conversations")
    elif filled(record.get("messages")):
        conflict("messages", "conversations", record["messages"], record["conversations"])
        del record["messages"]
    lists = {n: list(record[n]) for n in FIELDS[kind] if type(record.get(n)) is list}
    if not lists or not all(type(turn) is dict for turns in lists.values() for turn in turns):
        return record  # 形状不对，由校验去说
    move_tools(record, "", note)
    for field in ("system", "tools"):
        value = record.pop(field, None)
        if not filled(value) or (field == "tools" and not filled(parsed(value, field))):  # "[]" 也是没有
            continue
        if field == "system" and type(value) is not str:
            raise DataError(
                f"是 {short(value)}", field="system", expected="字符串", fix="写成 system 回合的 content"
            )
        note(f"顶层 {field} 归到 system 回合")
        for name, turns in lists.items():
            _give_system(turns, "content" if field == "system" else "tools", value, name)
    for name in REASONING_NAMES:
        if filled(value := record.pop(name, None)):
            _give_reasoning(lists, name, value, note)
    for name in TRAIN_NAMES:
        value = record.pop(name, None)
        if value is not None and value not in (1, True):
            raise DataError(
                f"是 {short(value)}",
                field=name,
                expected="写在回合上（weight: 0 的助手回合只当上文）",
                fix="整条都不学就删掉这一行",
            )
    record.update(lists)
    return record


def _shared_prompt(record: dict[str, Any], note: Note) -> None:
    """偏好数据的顶层 ``prompt``：两边只有回答时是共同的提问，两边已经带着提问时只是重复。"""
    prompt, sides = record.get("prompt"), [record.get(name) for name in ("chosen", "rejected")]
    if not filled(prompt) or not all(type(s) is list and s and type(s[0]) is dict for s in sides):
        return
    turns = [{"role": "user", "content": prompt}] if type(prompt) is str else prompt
    if type(turns) is not list:
        raise DataError(
            f"是 {short(prompt)}", field="prompt", expected="字符串或消息列表", fix="去掉这个字段"
        )
    if all(side[0].get("role") == "assistant" for side in sides):
        record.update(chosen=turns + sides[0], rejected=turns + sides[1])
        note("顶层 prompt 当作两边共同的提问")
    else:
        said = [turn.get("content") for turn in sides[0] if type(turn) is dict]
        if (type(prompt) is str and prompt not in said) or (
            type(prompt) is list and sides[0][: len(turns)] != turns
        ):
            raise DataError(
                f"{short(prompt)} 与 chosen 里的提问不同",
                field="prompt",
                expected="与 chosen、rejected 开头相同的提问",
                fix="去掉 prompt，或把它写进两边的开头",
            )
    del record["prompt"]


def _unpaired(record: dict[str, Any], note: Note) -> dict[str, Any]:
    """不成对的偏好：``prompt`` 与 ``completion``（各是字符串或消息列表）接成一段对话，``label`` 写成真假。"""
    record = dict(record)
    if type(record.get("label")) is int and record["label"] in (0, 1):
        record["label"] = bool(record["label"])
        note("label 的 0 与 1 当作 false 与 true")
    if "prompt" not in record or "completion" not in record:
        return record
    turns: list[Any] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.pop(name)
        if type(value) not in (str, list) or not value:
            raise DataError(
                f"是 {short(value)}",
                field=name,
                expected="非空的字符串或消息列表",
                fix="补上它，或删掉这一行",
            )
        turns += [{"role": role, "content": value}] if type(value) is str else value
    if "conversations" in record:
        conflict("prompt 与 completion", "conversations", turns, record["conversations"])
    record["conversations"] = turns
    note("prompt 与 completion 接成一段对话")
    return record


def _answer_only(record: dict[str, Any]) -> dict[str, Any]:
    """标的是最后的回答：最后一次提问之前的助手回合只当上文。"""
    turns = record.get("conversations")
    if type(turns) is not list or not all(type(turn) is dict for turn in turns):
        return record  # 形状不对，由校验去说
    asked = max((i for i, turn in enumerate(turns) if turn.get("role") == "user"), default=0)
    history = [{**t, "weight": 0} if t.get("role") == "assistant" else t for t in turns[:asked]]
    return {**record, "conversations": history + turns[asked:]}


def _give_system(turns: list[dict], field: str, value: Any, name: str) -> None:
    """把 ``content`` 或 ``tools`` 交给 system 回合；没有就补一个。"""
    if turns and ROLE_NAMES.get(turns[0].get("role"), turns[0].get("role")) == "system":
        own = turns[0].get(field)
        if not filled(own):
            turns[0] = {**turns[0], field: value}
            return
        conflict("system" if field == "content" else "tools", f"{name}[0].{field}", value, own)
        return
    turns.insert(0, {"role": "system", "content": "", field: value})


def _give_reasoning(lists: dict[str, list[dict]], name: str, value: Any, note: Note) -> None:
    """顶层的推理归到助手回合；只有一个助手回合时才知道是谁的。"""
    turns = lists.get("conversations", [])
    owners = [i for i, turn in enumerate(turns) if turn.get("role") == "assistant"]
    if len(owners) != 1:
        raise DataError(
            f"有 {len(owners)} 个助手回合，分不清这段推理 {short(value)} 是谁的",
            field=name,
            expected="写在助手回合上的 reasoning_content",
            fix=f"把顶层的 {name} 挪到它所属的助手回合里",
        )
    turns[owners[0]] = {**turns[owners[0]], name: value}
    note(f"顶层 {name} 归到助手回合")
