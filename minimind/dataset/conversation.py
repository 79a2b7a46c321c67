"""一段对话的规则：角色、次序、每个字段的类型，各自说清该怎么修。"""

from __future__ import annotations

import difflib
from typing import Any

from minimind.dataset.jsonl import DataError, short
from minimind.tokenizer.render import load_json
from minimind.tokenizer.special import END_THINK, THINK

ROLES = ("system", "user", "assistant", "tool")

# 公开的强化学习文件用这些词占住空的参考答案（rlaif-mini 的各版用过“空”与“无”）；当成答案会教模型只说这一个词
EMPTY_ANSWERS = frozenset(
    ("", "空", "无", "无答案", "暂无", "暂无答案", "none", "null", "n/a", "-", "--", "—")
)

# 别家格式的角色名 → 这里的写法，只用来给出修法
_ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


def is_empty_answer(text: str | None) -> bool:
    """参考答案是空的，或只是占位的词（:data:`EMPTY_ANSWERS`；大小写、首尾空白与句号不论）。"""
    return text is None or text.strip().rstrip("。.").lower() in EMPTY_ANSWERS


def split_prompt(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """强化学习的对话 → (提示消息, 参考答案)；末尾的助手回合是参考答案，没有或只是占位的词时为空串。"""
    if turns[-1]["role"] != "assistant":
        return turns, ""
    answer = turns[-1].get("content") or ""
    return turns[:-1], "" if is_empty_answer(answer) else answer


def check_turns(turns: Any, name: str, open_end: bool = False, learnt: bool = False) -> int:
    """检查一段对话的每个回合与角色次序，返回有内容的助手回合数。

    Args:
        turns: 字段的值。
        name: 字段名，报错用。
        open_end: 末尾的助手回合可以为空（强化学习的参考答案）。
        learnt: 助手回合是照着学的范本，工具调用的参数要是合法的；偏好里差的那个可以写坏。
    """
    if type(turns) is not list or not turns:
        found = "是空的" if turns == [] else f"是 {type_name(turns)} {short(turns)}"
        raise DataError(
            found, field=name, expected="非空的消息列表", fix='改成 [{"role": …, "content": …}, …]'
        )
    answers, last = 0, len(turns) - 1
    before, called = "", False  # 上一回合的角色；它有没有调用工具
    tools = None
    for i, turn in enumerate(turns):
        if type(turn) is not dict:
            raise DataError(
                f"是 {type_name(turn)} {short(turn)}",
                field=f"{name}[{i}]",
                expected='{"role": …, "content": …}',
                fix="改成对象",
            )
        role = turn.get("role")
        if role not in ROLES:
            raise _bad_role(turn, role, f"{name}[{i}].role")
        content = turn.get("content")
        if type(content) is not str and not (content is None and turn.get("tool_calls")):
            raise DataError(
                f"是 {type_name(content)} {short(content)}" if "content" in turn else "缺少字段",
                field=f"{name}[{i}].content",
                expected="字符串",
                fix="补上或改成字符串；图像等非文本内容不支持",
            )
        if role == "user":
            allowed = before in ("", "system", "assistant")
        elif role == "assistant":
            allowed = before in ("user", "tool")
        elif role == "system":
            allowed = i == 0
        else:
            allowed = before == "tool" or (before == "assistant" and called)
        if not allowed:
            raise _bad_order(role, before, i, name)
        if len(turn) > 2:  # 除 role、content 外还有字段的回合才需要看
            _check_extras(turn, f"{name}[{i}]", learnt and turn.get("weight") != 0)
            if turn.get("tools"):
                if tools is not None and turn["tools"] != tools:
                    raise DataError(
                        f"{short(turn['tools'])} 与前面回合的 tools 不同，一段对话只有一份工具说明",
                        field=f"{name}[{i}].tools",
                        expected="只写在 system 回合上",
                        fix="合成一份放在 system 回合，或拆成两段对话",
                    )
                tools = turn["tools"]
        if role == "assistant":
            calls = turn.get("tool_calls") not in (None, "", "[]", [])
            called = calls or "<tool_call>" in content
            if calls or (content and not content.isspace()):
                answers += 1
            elif not (open_end and i == last):
                raise _empty(f"{name}[{i}].content", content, "回答")
        elif role == "user":
            if not content or content.isspace():
                raise _empty(f"{name}[{i}].content", content, "提问")
        elif role == "system" and not turn.get("tools") and (not content or content.isspace()):
            raise _empty(f"{name}[{i}].content", content, "系统提示")
        before = role
    return answers


def _check_extras(turn: dict[str, Any], path: str, learnt: bool) -> None:
    """reasoning_content、tools、tool_calls：可以没有，有就要读得懂，也不能与正文说两遍。"""
    reasoning = turn.get("reasoning_content")
    if turn["role"] != "assistant":
        for name in ("reasoning_content", "tool_calls"):
            if turn.get(name):
                raise DataError(
                    f"{turn['role']} 回合有 {short(turn[name])}",
                    field=f"{path}.{name}",
                    expected="只写在 assistant 回合上",
                    fix="挪到它所属的 assistant 回合，或去掉",
                )
    elif reasoning is not None and any(tag in (turn.get("content") or "") for tag in (THINK, END_THINK)):
        raise DataError(
            f"{short(reasoning)} 与 content 里的 {THINK} 同时出现，推理有两份",
            field=f"{path}.reasoning_content",
            expected="推理只写一处",
            fix="去掉 reasoning_content，或把 content 里的思考块删掉",
        )
    if reasoning is not None and type(reasoning) is not str:
        raise DataError(
            f"是 {type_name(reasoning)} {short(reasoning)}",
            field=f"{path}.reasoning_content",
            expected="字符串",
            fix="改成字符串，或去掉这个字段",
        )
    for name in ("tools", "tool_calls"):
        value = turn.get(name)
        if value is None or value == "":
            continue
        field = f"{path}.{name}"
        if type(value) is str:
            try:
                value = load_json(value)
            except ValueError as error:
                raise DataError(
                    f"字符串 {short(value)} 不是合法的 JSON（{error}）",
                    field=field,
                    expected="列表，或列表的 JSON 字符串",
                    fix="用 json.dumps 写出这个字段",
                ) from None
        items = [value] if type(value) is dict else value
        if type(items) is not list or not all(type(item) is dict for item in items):
            raise DataError(
                f"是 {type_name(value)} {short(value)}",
                field=field,
                expected="对象的列表",
                fix="改成 [{…}, …]",
            )
        if name == "tool_calls":
            for k, call in enumerate(items):
                inner = call.get("function") or call
                if type(inner) is not dict or type(inner.get("name")) is not str:
                    raise DataError(
                        f"工具调用没有 name：{short(call)}",
                        field=f"{field}[{k}]",
                        expected='{"name": …, "arguments": {…}}',
                        fix="补上工具名",
                    )
                if learnt:
                    _check_call_arguments(inner.get("arguments"), f"{field}[{k}].arguments")


def _check_call_arguments(value: Any, field: str) -> None:
    """调用的参数是对象，或它的 JSON 字符串；没有参数可以不写、写 null 或空串。照着写坏的学，模型就写坏的。"""
    found, read = f"是 {type_name(value)} {short(value)}", value
    if type(value) is str:
        try:
            read = load_json(value) if value.strip() else None
        except ValueError as error:
            found = f"字符串 {short(value)} 不是合法的 JSON（{error}）"
    if read is not None and type(read) is not dict:
        raise DataError(
            found,
            field=field,
            expected='{"参数名": 值}，或它的 JSON 字符串',
            fix="用 json.dumps 写出参数；要留着当上文就写 weight: 0",
        )


def _bad_role(turn: dict[str, Any], role: Any, field: str) -> DataError:
    if "role" not in turn:
        fix = "补上 role"
        if "from" in turn:
            fix = "这是 ShareGPT 的格式：from 改名为 role（human→user，gpt→assistant），value 改名为 content"
        return DataError(f"缺少字段，只有 {short(list(turn))}", field=field, expected="字段 role", fix=fix)
    fix = "改成四种角色之一"
    if isinstance(role, str):
        near = _ROLE_ALIASES.get(role.lower()) or next(
            iter(difflib.get_close_matches(role.lower(), ROLES, 1)), None
        )
        fix = f"改成 {near}" if near else fix
    return DataError(f"不认识的角色 {short(role)}", field=field, expected=" | ".join(ROLES), fix=fix)


def _bad_order(role: str, before: str, i: int, name: str) -> DataError:
    after = {
        "": "system 或 user",
        "system": "user",
        "user": "assistant",
        "assistant": "user（调用了工具时也可以是 tool）",
        "tool": "assistant 或 tool",
    }[before]
    fix = "调整次序，或合并相邻的同角色回合"
    if role == "tool":
        fix = "tool 只能跟在带 tool_calls 的 assistant 之后；补上调用，或删掉这个回合"
    elif role == "system":
        fix = "system 只能是第一个回合；把它挪到开头"
    elif role == before:
        fix = f"把相邻的两个 {role} 回合合并成一个"
    elif role == "assistant":
        fix = "在它前面补上 user 的提问"
    previous = f"{name}[{i - 1}] 是 {before}" if before else "这是第一个回合"
    return DataError(
        f"角色次序不对：{previous}，这里是 {role}", field=f"{name}[{i}].role", expected=after, fix=fix
    )


def _empty(field: str, content: str | None, what: str) -> DataError:
    return DataError(
        f"{what}是空的 {short(content)}",
        field=field,
        expected="非空字符串",
        fix="补上内容，或删掉这一行（--on_bad_line skip 会跳过它）",
    )


def type_name(value: Any) -> str:
    names = {str: "字符串", bool: "布尔值", int: "数字", float: "数字", list: "列表", dict: "对象"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
