"""一个回合里别家的写法 → 这里的写法，以及哪些字段没有用上；整条记录的见 :mod:`minimind.dataset.normalize`。"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

from minimind.dataset.jsonl import DataError, short
from minimind.tokenizer.render import REASONING_NAMES, load_json
from minimind.tokenizer.special import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL

Note = Callable[[str], None]

ROLE_NAMES = {"function": "tool", "developer": "system"}
TRAIN_NAMES = ("weight", "loss", "train")

# 有内容却不影响意思的字段：编号、出处、统计、打分。别的字段会被说出来
HARMLESS = frozenset(
    (
        *("id", "_id", "uid", "uuid", "guid", "index", "idx", "name", "url", "link", "path", "file"),
        *("source", "src", "origin", "dataset", "subset", "split", "category", "categories", "type", "kind"),
        *(
            "lang",
            "language",
            "tag",
            "tags",
            "label",
            "labels",
            "topic",
            "domain",
            "subject",
            "task",
            "level",
        ),
        *("difficulty", "quality", "license", "author", "model", "generator", "meta", "metadata", "info"),
        *("score", "scores", "score_chosen", "score_rejected", "chosen_score", "rejected_score", "rating"),
        *("chosen_model", "rejected_model", "margin", "length", "tokens", "num_tokens", "token_count"),
        *(
            "timestamp",
            "time",
            "date",
            "created",
            "created_at",
            "updated_at",
            "create_time",
            "version",
            "hash",
        ),
        *("tool_call_id", "call_id", "finish_reason", "stop_reason", "usage", "num_turns"),
    )
)
# 改变意思、而这里不支持的字段：悄悄不用会学错，所以报错
UNSUPPORTED = {
    **dict.fromkeys(
        ("image", "images", "image_url", "audio", "audios", "video", "videos", "files", "attachments"),
        "图像、声音与附件不支持；去掉这一行，或先把它们写成文字",
    ),
    "refusal": "把拒答的话写进 content",
    "mask": "只学哪些回合用 weight: 0 写在回合上",
    "loss_mask": "只学哪些回合用 weight: 0 写在回合上",
    "history": "把以前的问答写成 conversations 里前面的回合",
}

_INDEX = re.compile(r"\[\d+\]")
_INLINE_CALL = re.compile(re.escape(TOOL_CALL) + r"(.*?)" + re.escape(END_TOOL_CALL), re.DOTALL)


def filled(value: Any) -> bool:
    """字段里有没有东西；null、空串、空列表说的都是“没有”。"""
    return value is not None and value != "" and value != [] and value != {}


def leftovers(fields: dict[str, Any], known: set[str], path: str, note: Note, strict: bool = True) -> None:
    """没有用到的字段：改变意思的报错（``strict`` 为假时也只记名），不认识的记名，编号出处之类放过。"""
    for name, value in fields.items():
        if name in known or name in HARMLESS or not filled(value):
            continue
        if strict and name in UNSUPPORTED:
            raise DataError(
                f"有内容 {short(value)}，而这个字段不支持",
                field=f"{path}{name}",
                expected="不靠这个字段也完整的文字对话",
                fix=UNSUPPORTED[name],
            )
        place = _INDEX.sub("[]", path)
        note(f"不认识的字段 {place}{name} 没有用上")


def rewrite_turn(turn: Any, path: str, note: Note) -> Any:
    if type(turn) is not dict:
        return turn
    role = turn.get("role")
    content = turn.get("content")
    if len(turn) == 2 and type(content) is str and role not in ROLE_NAMES and THINK not in content:
        return turn
    turn = dict(turn)
    if role in ROLE_NAMES:
        role = turn["role"] = ROLE_NAMES[role]
        note(f"角色 {next(k for k, v in ROLE_NAMES.items() if v == role)} 当作 {role}")
    _join_parts(turn, note)
    move_tools(turn, f"{path}.", note)
    _move_reasoning(turn, path, note)
    if role == "assistant" and turn.get("reasoning_content") is None:
        _move_empty_think(turn, note)
    if (call := turn.pop("function_call", None)) not in (None, "", {}, "null"):
        _move_function_call(turn, call, path, note)
    _move_weight(turn, role, path, note)
    if filled(turn.get("tool_calls")):
        if turn.get("content") is None:
            turn["content"] = ""
        if TOOL_CALL in turn["content"]:
            _drop_inline_calls(turn, path, note)
    known = {"role", "content", "reasoning_content", "tools", "tool_calls", "weight"}
    leftovers(turn, known, f"{path}.", note)
    return turn


def _join_parts(turn: dict[str, Any], note: Note) -> None:
    """OpenAI 的分段内容：全是文本就接起来；别的段留给校验报错。"""
    parts = turn.get("content")
    if type(parts) is not list or not parts:
        return
    if all(type(p) is dict and p.get("type") == "text" and type(p.get("text")) is str for p in parts):
        turn["content"] = "".join(p["text"] for p in parts)
        note("content 的文本段接成一段")


def move_tools(fields: dict[str, Any], path: str, note: Note) -> None:
    """``functions``（OpenAI 早先的名字，每项少一层外壳）改写成 ``tools``。"""
    functions = fields.pop("functions", None)
    if not filled(functions):
        return
    tools = parsed(functions, f"{path}functions")
    tools = [
        {"type": "function", "function": t} if type(t) is dict and "name" in t and "function" not in t else t
        for t in (tools if type(tools) is list else [tools])
    ]
    if filled(fields.get("tools")):
        conflict(f"{path}functions", f"{path}tools", tools, fields["tools"])
        return
    fields["tools"] = tools
    note("functions 当作 tools")


def _move_reasoning(turn: dict[str, Any], path: str, note: Note) -> None:
    for name in REASONING_NAMES[1:]:
        value = turn.pop(name, None)
        if value is None:
            continue
        own = turn.get("reasoning_content")
        if own is None:
            turn["reasoning_content"] = value
            note(f"{name} 当作 reasoning_content")
        else:
            conflict(f"{path}.{name}", "reasoning_content", value, own)


def _move_empty_think(turn: dict[str, Any], note: Note) -> None:
    """公共数据里“关着思考答的”有两种写法，意思相同：``reasoning_content`` 为空串，或正文以空的思考块开头。"""
    content = turn.get("content")
    head, found, rest = content.partition(END_THINK) if type(content) is str else ("", "", "")
    if found and head.strip() == THINK:
        turn["reasoning_content"], turn["content"] = "", rest.lstrip("\n")
        note(f"正文开头空的 {THINK}{END_THINK} 当作 reasoning_content 为空")


def _move_function_call(turn: dict[str, Any], call: Any, path: str, note: Note) -> None:
    call = parsed(call, f"{path}.function_call")
    if type(call) is not dict or type(call.get("name")) is not str:
        raise DataError(
            f"是 {short(call)}",
            field=f"{path}.function_call",
            expected='{"name": …, "arguments": …}',
            fix="补上工具名，或去掉这个字段",
        )
    own = turn.get("tool_calls")
    if filled(own):
        if [_meaning(c) for c in _listed(parsed(own, f"{path}.tool_calls"))] != [_meaning(call)]:
            raise _different(f"{path}.function_call", "tool_calls", call, own)
        return
    turn["tool_calls"] = [call]
    note("function_call 当作 tool_calls")


def _move_weight(turn: dict[str, Any], role: Any, path: str, note: Note) -> None:
    """``weight``、``loss``、``train``：助手回合的 0 与假改写成 ``weight: 0``，1 与真是平常的样子。"""
    stated = {name: turn.pop(name) for name in TRAIN_NAMES if name in turn}
    stated = {name: value for name, value in stated.items() if value is not None}
    for name, value in stated.items():
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise DataError(
                f"是 {short(value)}",
                field=f"{path}.{name}",
                expected="0 / false（只当上文）或 1 / true（要学）",
                fix="改成 0 或 1；按比例加权的回合不支持",
            )
        if value and role in ("system", "user", "tool"):
            raise DataError(
                f"{role} 回合写着要学",
                field=f"{path}.{name}",
                expected="只学助手的回合",
                fix="去掉这个字段",
            )
    if len({bool(value) for value in stated.values()}) > 1:
        raise DataError(
            f"说的不是一回事：{short(stated)}",
            field=f"{path}.{next(iter(stated))}",
            expected="学或不学只说一次",
            fix="只留 weight",
        )
    if stated and role == "assistant" and not next(iter(stated.values())):
        turn["weight"] = 0
        note("weight / loss / train 为 0 的回合只当上文")


def _drop_inline_calls(turn: dict[str, Any], path: str, note: Note) -> None:
    """正文里的调用在 ``tool_calls`` 里都有：同一件事写了两遍，只留 ``tool_calls``。"""
    content, listed = turn["content"], _listed(parsed(turn["tool_calls"], f"{path}.tool_calls"))
    remaining = [_meaning(call) for call in listed]
    for text in _INLINE_CALL.findall(content):
        try:
            call = _meaning(load_json(text))
        except ValueError:
            call = None
        if call is None or call not in remaining:
            raise _different(f"{path}.tool_calls", "content 里的 <tool_call>", listed, text.strip())
        remaining.remove(call)
    rest = _INLINE_CALL.sub("", content)
    if TOOL_CALL in rest or END_TOOL_CALL in rest:
        raise _different(f"{path}.tool_calls", "content 里没有收尾的 <tool_call>", listed, content)
    turn["content"] = rest.rstrip("\n") if rest.strip() else ""
    note("正文与 tool_calls 里相同的调用只留一份")


def parsed(value: Any, field: str) -> Any:
    if type(value) is not str:
        return value
    try:
        return load_json(value)
    except ValueError as error:
        raise DataError(
            f"字符串 {short(value)} 不是合法的 JSON（{error}）",
            field=field,
            expected="对象或列表，或它们的 JSON 字符串",
            fix="用 json.dumps 写出这个字段",
        ) from None


def _listed(value: Any) -> list[Any]:
    return value if type(value) is list else [value]


def _meaning(call: Any) -> Any:
    """一次调用的 ``(名字, 参数)``，用来比较；外壳、编号与参数的写法不算。"""
    if type(call) is not dict:
        return call
    inner = call.get("function")
    inner = inner if type(inner) is dict else call
    arguments = inner.get("arguments")
    if type(arguments) is str:
        with contextlib.suppress(ValueError):  # 写坏的参数按原文比
            arguments = load_json(arguments)
    return [inner.get("name"), {} if arguments in (None, "") else arguments]


def conflict(field: str, other: str, value: Any, own: Any) -> None:
    """两处说同一件事：相同就放过，不同就报错。"""
    same = value == own
    if not same and str in (type(value), type(own)):
        try:
            a, b = (load_json(v) if type(v) is str else v for v in (value, own))
            same = a == b
        except ValueError:
            same = False
    if not same:
        raise _different(field, other, value, own)


def _different(field: str, other: str, value: Any, own: Any) -> DataError:
    return DataError(
        f"{short(value)} 与 {other} 的 {short(own)} 不同",
        field=field,
        expected="同一件事只写一处，或两处相同",
        fix="去掉其中一处",
    )
