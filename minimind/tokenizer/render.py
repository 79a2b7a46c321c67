"""把一段对话渲染成片段：哪些是控制 token、哪些是文本、哪些要学。

``chat_template.jinja`` 渲染出同样的文本，或同样拒绝；那份给别的工具用，训练与推理都走这里，因为只有结构知道
“这个 ``<|im_end|>`` 是回合结束”和“这个是用户打的字”的区别。本项目的布局（``{}`` 处为内容；
别的布局与它的差别在 :mod:`minimind.tokenizer.layouts`）::

    <|im_start|>system⏎{系统提示}⏎⏎{工具说明}<|im_end|>⏎
    <|im_start|>user⏎{提问}<|im_end|>⏎
    <|im_start|>assistant⏎<think>⏎{推理}⏎</think>⏎⏎{回答}⏎<tool_call>⏎{JSON}⏎</tool_call><|im_end|>⏎
    <|im_start|>user⏎<tool_response>⏎{工具结果}⏎</tool_response><|im_end|>⏎

两个约定：

- **推理全部保留**，不删以前回合的：已渲染的前缀永远不变，KV 缓存可以接着用，多轮里每段推理都能学到。
- ``reasoning_content`` 为空串表示“关着思考答的”，渲染成一个不学的空块，与 ``enable_thinking=False``
  的生成提示逐字相同；没有这个字段就没有块。这样数据可以教会模型听开关。
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from minimind.errors import UserError
from minimind.tokenizer.layouts import OURS, Layout
from minimind.tokenizer.special import (
    END_THINK,
    END_TOOL_CALL,
    END_TOOL_RESPONSE,
    IM_END,
    IM_START,
    REPLY_TAGS,
    THINK,
    TOOL_CALL,
    TOOL_RESPONSE,
)

ROLES = ("system", "user", "assistant", "tool")

# 推理的字段名：第一个是标准的，后两个是别家的；都有时取前面的
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")

TOOLS_HEAD, TOOLS_TAIL = OURS.tools_head, OURS.tools_tail

_REPLY_TAG = re.compile("(" + "|".join(map(re.escape, REPLY_TAGS)) + ")")


class Segment(NamedTuple):
    """渲染结果的一段；段与段之间不会合并成一个 token。"""

    text: str
    control: bool  # True：整段是一个控制 token 或标签
    target: bool  # True：助手写的，训练时要学
    fixed: bool = False  # True：布局里固定的短文本，编码结果可以缓存


def dump_json(value: Any) -> str:
    """与模板的 tojson 逐字相同的写法：不转义中文，逗号冒号后有空格。"""
    return json.dumps(value, ensure_ascii=False)


def load_json(text: str) -> Any:
    """``json.loads``；重复的键不合法，免得悄悄只留后一个。

    Raises:
        ValueError: 不是合法的 JSON。
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) != len(pairs):
        raise ValueError("有重复的键")
    return made


def text_of(content: Any) -> str:
    """消息正文：字符串、``None``（只有工具调用时），或 OpenAI 的分段列表（只收文本段）。"""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else p for p in content]
        if all(isinstance(p, str) for p in parts):
            return "".join(parts)
    raise UserError(
        f"消息的 content 读不懂：{dump_json(content)[:80]}",
        expected='字符串，或 [{"type": "text", "text": …}]',
    )


def parse_json_list(value: Any, field: str) -> list[dict]:
    """``tools`` / ``tool_calls``：列表原样，JSON 字符串先解析；空值是空列表。"""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = load_json(value)
        except ValueError as error:
            raise UserError(
                f"{field} 不是合法的 JSON（{error}）", expected="列表，或列表的 JSON 字符串"
            ) from error
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{field} 读不懂：{dump_json(value)[:80]}", expected="由对象组成的列表")
    return value


def tools_of(messages: list[dict], tools: Any = None) -> list[dict]:
    """可用的工具：显式给出的优先，否则取消息里第一个 ``tools`` 字段（公共数据放在 system 回合上）。"""
    if tools is None:
        tools = next((m["tools"] for m in messages if m.get("tools")), None)
    return parse_json_list(tools, "tools")


def call_text(call: dict) -> str:
    """一次工具调用的 JSON；接受 ``{"name", "arguments"}`` 与 OpenAI 的 ``{"function": {…}}``。"""
    call = call.get("function") or call
    name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else (None, None)
    if not isinstance(name, str):
        raise UserError(
            f"工具调用缺少 name：{dump_json(call)[:80]}", expected='{"name": …, "arguments": {…}}'
        )
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments) if arguments.strip() else {}  # 无参数的调用常写成空串
        except ValueError:  # 模型写坏的参数也可能出现在历史里，原样保留好过整段对话不能用
            return f'{{"name": {dump_json(name)}, "arguments": {arguments}}}'
    return f'{{"name": {dump_json(name)}, "arguments": {dump_json({} if arguments is None else arguments)}}}'


def literal_call(call: dict) -> str:
    """:func:`call_text` 的照抄写法（:attr:`Layout.literal_calls`）。"""
    call = call.get("function") or call
    name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else (None, None)
    if not isinstance(name, str):
        raise UserError(
            f"工具调用缺少 name：{dump_json(call)[:80]}", expected='{"name": …, "arguments": {…}}'
        )
    arguments = arguments if isinstance(arguments, str) else dump_json(arguments)
    return f'{{"name": "{name}", "arguments": {arguments}}}'


def _tools_text(tools: list[dict], before: str, layout: Layout) -> Iterator[Segment]:
    """系统回合里的工具说明。工具自己的字里不会有标签，布局的结尾里可以有。

    Args:
        before: 系统提示，与说明连成一段。
    """
    listed = "\n".join(map(dump_json, tools))
    head, *rest = _REPLY_TAG.split(layout.tools_tail)
    yield Segment(f"{before}{layout.tools_head}{listed}{head}", False, False)
    for k, piece in enumerate(rest):
        if piece:
            yield Segment(piece, k % 2 == 0, False)


def render(
    messages: list[dict],
    tools: Any = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    layout: Layout = OURS,
) -> list[Segment]:
    """对话 → 片段。

    Args:
        messages: ``{"role", "content", "reasoning_content"?, "tools"?, "tool_calls"?, "weight"?}`` 的列表；
            ``weight`` 为 0 的助手回合文本照旧，只是不学。
        tools: 工具列表或其 JSON 字符串；``None`` 时取消息里的 ``tools``。
        add_generation_prompt: 末尾加上助手回合的开头。
        enable_thinking: 只影响生成提示。``False`` 预填空的思考块；``True`` 预填 ``<think>``，
            一定先推理；``None`` 由模型决定（总有思考块的布局里同 ``False``）。
        layout: 哪一种布局。

    Raises:
        UserError: 角色不认识，或 content / tools / tool_calls 的形状不对。
    """
    return list(_render(messages, tools, add_generation_prompt, enable_thinking, layout))


def _fixed(text: str, target: bool = False) -> Segment:
    return Segment(text, False, target, True)


def _header(role: str) -> Iterator[Segment]:
    yield Segment(IM_START, True, False)
    yield _fixed(f"{role}\n")


def _footer(target: bool = False) -> Iterator[Segment]:
    yield Segment(IM_END, True, target)
    yield _fixed("\n")


def _render(messages, tools, add_generation_prompt, enable_thinking, layout) -> Iterator[Segment]:
    tool_list = tools_of(messages, tools)
    if tool_list and not (messages and messages[0].get("role") == "system"):
        yield from _header("system")
        yield from _tools_text(tool_list, "", layout)
        yield from _footer()
    for i, message in enumerate(messages):
        role = message.get("role")
        if role == "assistant":
            segments = _render_assistant(message, layout)
            if message.get("weight") == 0:  # 数据里标着不学的回合：只当上文，结束符也不学
                segments = (segment._replace(target=False) for segment in segments)
            yield from segments
            continue
        if role not in ROLES:
            raise UserError(f"不认识的角色 {role!r}", where=f"第 {i + 1} 条消息", expected=" | ".join(ROLES))
        content = text_of(message.get("content"))
        if role == "tool":
            # 连续的工具结果并进同一个 user 回合，与公共权重学过的布局一致
            follows = i > 0 and messages[i - 1].get("role") == "tool"
            if follows:
                yield _fixed("\n")
            else:
                yield from _header("user")
            yield Segment(TOOL_RESPONSE, True, False)
            yield _fixed("\n")
            yield Segment(f"{content}\n", False, False)
            yield Segment(END_TOOL_RESPONSE, True, False)
            if i + 1 == len(messages) or messages[i + 1].get("role") != "tool":
                yield from _footer()
            continue
        yield from _header(role)
        if role == "system" and i == 0 and tool_list:
            before = f"{content}\n\n" if content or layout.always_think else ""
            yield from _tools_text(tool_list, before, layout)
        else:
            yield Segment(content, False, False)
        yield from _footer()
    if add_generation_prompt:
        yield from _header("assistant")
        if enable_thinking is False or (layout.always_think and not enable_thinking):
            yield from _empty_think()
        elif enable_thinking:
            yield Segment(THINK, True, False)
            yield _fixed("\n")


def _empty_think() -> Iterator[Segment]:
    yield Segment(THINK, True, False)
    yield _fixed("\n\n")
    yield Segment(END_THINK, True, False)
    yield _fixed("\n\n")


def split_thinking(content: str) -> tuple[str, str]:
    """正文里写着的思考块 → ``(推理, 正文)``；没有收尾标签就没有推理。"""
    if END_THINK not in content:
        return "", content
    reasoning = content.split(END_THINK)[0].rstrip("\n").split(THINK)[-1].lstrip("\n")
    return reasoning, content.split(END_THINK)[-1].lstrip("\n")


def _render_assistant(message: dict, layout: Layout) -> Iterator[Segment]:
    yield from _header("assistant")
    named = (message.get(name) for name in REASONING_NAMES)
    reasoning = next((value for value in named if value is not None), None)
    content = text_of(message.get("content"))
    if layout.always_think and reasoning is None:
        reasoning, content = split_thinking(content)
    if reasoning is not None:
        reasoning = text_of(reasoning).strip("\n")
        if reasoning:
            yield Segment(THINK, True, True)
            yield _fixed("\n", target=True)
            yield Segment(f"{reasoning}\n", False, True)
            yield Segment(END_THINK, True, True)
            yield _fixed("\n\n", target=True)
        else:
            yield from _empty_think()
    calls = parse_json_list(message.get("tool_calls"), "tool_calls")
    gap = "\n" if content and calls else ""
    content = (content.lstrip("\n") if layout.always_think else content) + gap
    # re.split 带捕获组：奇数位是标签，偶数位是其间的文本
    for k, piece in enumerate(_REPLY_TAG.split(content)):
        if piece:
            yield Segment(piece, k % 2 == 1, True)
    for k, call in enumerate(calls):
        if k:
            yield _fixed("\n", target=True)
        yield Segment(TOOL_CALL, True, True)
        written = literal_call(call) if layout.literal_calls else call_text(call)
        yield Segment(f"\n{written}\n", False, True)
        yield Segment(END_TOOL_CALL, True, True)
    yield from _footer(target=True)


def render_text(
    messages: list[dict],
    tools: Any = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    layout: Layout = OURS,
) -> str:
    """渲染后的全文，与 ``chat_template.jinja`` 的输出相同。给人看或给测试用，不要拿去分词。"""
    return "".join(s.text for s in render(messages, tools, add_generation_prompt, enable_thinking, layout))
