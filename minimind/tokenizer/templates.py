"""别人的对话模板：认出一个分词器用哪种布局；不是自己会渲染的，就用它自己的 Jinja 模板，id 与 ``apply_chat_template`` 相同。

认布局看行为不看文字：几段样本对话渲染得一字不差，就是那种布局（:data:`minimind.tokenizer.layouts.LAYOUTS`）。
一个字也不渲染用户的话的，不算对话模板。

文字里写着控制 token 的字样怎么办，见 :mod:`minimind.tokenizer.typed_controls`。
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minimind.errors import UserError
from minimind.paths import file_problem, resolve_path
from minimind.tokenizer.layouts import LAYOUTS, OURS, Layout
from minimind.tokenizer.loading import SHIPPED_DIR, codec_of
from minimind.tokenizer.render import (
    REASONING_NAMES,
    ROLES,
    load_json,
    parse_json_list,
    render_text,
    text_of,
    tools_of,
)
from minimind.tokenizer.special import END_THINK, THINK
from minimind.tokenizer.typed_controls import TypedControls, renamed_backend, whole_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SWITCHES = ("enable_thinking", "open_thinking", "thinking")  # 各家给思考开关起的名字
FIX = "照这个模板的要求改消息，或用 --tokenizer_path 换一个模板不同的分词器"
CALL = re.compile(r"<tool_call>\s*(\{.*\})\s*</tool_call>", re.S)

_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_ASK = {"role": "user", "content": "问q"}
_CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": "一"}}}]
_TALK = [
    {"role": "system", "content": "规矩s"},
    _ASK,
    {"role": "assistant", "content": "答a", "reasoning_content": "想r", "tool_calls": _CALLS},
    {"role": "tool", "content": "果1"},
    {"role": "tool", "content": "果2"},
    {"role": "assistant", "content": "答b", "reasoning_content": ""},
    _ASK,
]
# (消息, 工具, 生成提示, 思考)：各布局在这些对话上写法都不同
PROBES = (
    ([_ASK], None, True, None),
    ([_ASK], None, True, True),
    ([_ASK], None, True, False),
    ([_ASK], [_TOOL], False, None),
    (_TALK, [_TOOL], True, None),
    (_TALK[1:], None, False, None),
)


@dataclass
class Template:
    """一个分词器自己的 Jinja 模板。

    Args:
        source: 模板的文字（有几份的，是 ``{名字: 文字}``）。
        switches: 模板认得的思考开关。
    """

    source: str | dict[str, str]
    switches: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def layout_of(tokenizer: PreTrainedTokenizerFast) -> Layout | Template:
    """分词器用哪种布局；没有对话模板的用本项目的。认一次就记住，模板换了重新认。"""
    codec, source = codec_of(tokenizer), tokenizer.chat_template
    key = json.dumps(source, sort_keys=True)
    if key not in codec.layouts:
        codec.layouts[key] = _recognise(tokenizer, source)
    return codec.layouts[key]


def use_template(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """换一份对话模板：``minimind`` 是本项目的，别的是 ``.jinja`` 文件。

    Raises:
        UserError: 没有这个文件，或渲染不出用户的话。
    """
    if name == OURS.name:
        tokenizer.chat_template = _shipped()
        return
    path = resolve_path(name)
    if problem := file_problem(path, ".jinja"):
        raise UserError(
            f"模板{problem}", where=f"--chat_template {path}", expected=f"一个 .jinja 文件，或 {OURS.name}"
        )
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"不是 UTF-8（{error.reason}）", where=f"--chat_template {path}") from error
    template = Template(tokenizer.chat_template, _switches(tokenizer.chat_template))
    try:
        shown = _ASK["content"] in _apply(tokenizer, template, [_ASK], None, True, None)
    except UserError as error:
        raise UserError(error.what, where=f"--chat_template {path}", fix="改好模板") from error
    if not shown:
        raise UserError("模板里没有用户的话", where=f"--chat_template {path}", fix="换一个对话模板")


def describe_layout(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """不是本项目布局的，一句话说用的是什么；是就返回 ``None``。"""
    layout = layout_of(tokenizer)
    if isinstance(layout, Template):
        return "用分词器自己的对话模板"
    if layout != OURS:
        return f"用 {layout.name} 的对话布局"
    if not tokenizer.chat_template:
        return "分词器没有对话模板，用本项目的"
    own = Template(tokenizer.chat_template, _switches(tokenizer.chat_template))
    return None if _renders_user(tokenizer, own) else "分词器的对话模板写不出用户的话，用本项目的"


def _recognise(tokenizer, source) -> Layout | Template:
    if not source or source == _shipped():
        return OURS
    template = Template(source, _switches(source))
    for layout in LAYOUTS:
        if all(_same(tokenizer, template, layout, probe) for probe in PROBES):
            return layout
    return template if _renders_user(tokenizer, template) else OURS


@functools.cache
def _shipped() -> str:
    return (SHIPPED_DIR / "chat_template.jinja").read_text(encoding="utf-8")


def _switches(source: str | dict[str, str]) -> tuple[str, ...]:
    text = source if isinstance(source, str) else "\n".join(source.values())
    return tuple(name for name in SWITCHES if re.search(rf"\b{name}\b", text))


def _same(tokenizer, template, layout, probe) -> bool:
    try:
        return _apply(tokenizer, template, *probe) == render_text(*probe, layout=layout)
    except UserError:
        return False


def _renders_user(tokenizer, template) -> bool:
    """模板会不会把用户的话写出来；拒绝这段对话的（例如要求别的字段）也算会。"""
    try:
        return _ASK["content"] in _apply(tokenizer, template, [_ASK], None, True, None)
    except UserError:
        return True


# ---------------------------------------------------------------- 渲染


def _apply(tokenizer, template, messages, tools, add_generation_prompt, enable_thinking, **extra) -> str:
    """模板渲染出的文本。

    Raises:
        UserError: 模板不接受这段对话，附它自己的话。
    """
    switch = {} if enable_thinking is None else dict.fromkeys(template.switches, enable_thinking)
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **switch,
            **extra,
        )
    except Exception as error:  # 模板是别人的程序，什么错都可能抛
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"模型自己的对话模板不接受这段对话（{reason}）", where="对话模板", fix=FIX) from error


def _clean(messages: list[dict]) -> list[dict]:
    """各种写法 → 模板都认的一种：正文是字符串，调用是 OpenAI 的形状、参数是对象。"""
    cleaned = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"不认识的角色 {role!r}", where=f"第 {i + 1} 条消息", expected=" | ".join(ROLES))
        made = {"role": role, "content": text_of(message.get("content"))}
        made |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key) is not None}
        named = (message.get(name) for name in REASONING_NAMES)
        reasoning = next((value for value in named if value is not None), None)
        if reasoning is not None and role == "assistant":
            made["reasoning_content"] = text_of(reasoning)
        calls = parse_json_list(message.get("tool_calls"), "tool_calls") if role == "assistant" else []
        if calls:
            made["tool_calls"] = [_openai(call) for call in calls]
        cleaned.append(made)
    return cleaned


def _openai(call: dict) -> dict:
    inner = call.get("function") or call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise UserError("工具调用缺少 name", expected='{"name": …, "arguments": {…}}')
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # 模型写坏的参数原样留着
            arguments = load_json(arguments) if arguments.strip() else {}
    function = {"name": inner["name"], "arguments": {} if arguments is None else arguments}
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": function}


def _check_tools(tokenizer, template: Template) -> None:
    """模板放得下工具，调用又是这里读得回来的写法。

    Raises:
        UserError: 不是。
    """
    if "tools" not in template.facts:
        template.facts["tools"] = _tools_problem(tokenizer, template)
    if template.facts["tools"]:
        raise UserError(template.facts["tools"], where="对话模板", fix="去掉 tools，或换一个会用工具的模型")


def _tools_problem(tokenizer, template: Template) -> str | None:
    try:
        with_tools, without = (
            _apply(tokenizer, template, [_ASK], tools, True, None) for tools in ([_TOOL], None)
        )
        talk = _apply(tokenizer, template, _TALK[1:3], [_TOOL], False, None)
    except UserError as error:
        return f"模型自己的对话模板不支持工具：{error.what}"
    if with_tools == without:
        return "模型自己的对话模板里没有放工具的地方"
    found = CALL.search(talk.split(_ASK["content"])[-1])
    try:
        call = load_json(found[1]) if found else None
    except ValueError:
        call = None
    if not isinstance(call, dict) or {"name", "arguments"} - set(call):
        return "模型自己的对话模板不用 <tool_call>{JSON}</tool_call> 写调用，读不回来"
    return None


def _check_thinking(tokenizer, template: Template, wanted: bool) -> None:
    """给了思考开关而模板没有：它本来就是那样的才行。

    Raises:
        UserError: 开关不起作用。
    """
    if template.switches:
        return
    if "thinks" not in template.facts:
        template.facts["thinks"] = (
            _apply(tokenizer, template, [_ASK], None, True, None).rstrip().endswith(THINK)
        )
    if template.facts["thinks"] != wanted:
        raise UserError(
            "模型自己的对话模板没有思考开关",
            where=f"enable_thinking={wanted}",
            fix="不给这个参数，由模型决定",
        )


class Conversation:
    """一段对话，用别人的模板渲染；消息、工具在这里核对一次。

    Raises:
        UserError: 消息的形状不对，或给了模板不支持的工具。
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: Template, messages: list[dict], tools: Any
    ):
        self.tokenizer, self.template = tokenizer, template
        self.tools = tools_of(messages, tools)
        self.messages = _clean(messages)
        if self.tools:
            _check_tools(tokenizer, template)
        names = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self.guard = TypedControls.needed(self.messages, self.tools, names)
        if self.guard:
            self.messages, self.tools = self.guard.messages(self.messages), self.guard.mark(self.tools)
            self.backend, self.names = renamed_backend(tokenizer, self.guard)
        else:
            self.backend = whole_backend(tokenizer)

    def text(
        self,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
        count: int | None = None,
        continue_final: bool = False,
    ) -> str:
        """前 ``count`` 条消息（``None`` 全部）渲染成的文本，可以交给 :meth:`encode`。

        Args:
            continue_final: 最后一条助手消息没写完，去掉它的结尾。

        Raises:
            UserError: 模板不接受，或没有要的思考开关。
        """
        if enable_thinking is not None and add_generation_prompt:
            _check_thinking(self.tokenizer, self.template, enable_thinking)
        extra = {"continue_final_message": True} if continue_final else {}
        messages = self.messages[:count]
        text = _apply(
            self.tokenizer,
            self.template,
            messages,
            self.tools,
            add_generation_prompt,
            enable_thinking,
            **extra,
        )
        return self.guard.finish(text, self.names) if self.guard else text

    def encode(self, text: str) -> Any:
        """:meth:`text` 的全部或一段 → tokenizers 的 ``Encoding``；不另加首尾。"""
        return self.backend.encode(text, add_special_tokens=False)

    def targets(self, text: str, encoding: Any, skip: frozenset[int] = frozenset()) -> list[bool]:
        """各 token 要不要学：每个助手回合从生成提示之后，到它最后一个控制 token 为止。

        Args:
            text, encoding: 全部消息不带生成提示的渲染与编码。
            skip: 不学的消息的序号。

        Raises:
            UserError: 历史的写法与生成提示对不上，认不出助手写了什么。
        """
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        target = [False] * len(encoding.ids)
        for i, message in enumerate(self.messages):
            if message["role"] != "assistant" or i in skip:
                continue
            head, whole = self.text(True, count=i), self.text(count=i + 1)
            if not text.startswith(head):
                raise UserError(
                    "模型自己的对话模板渲染历史时，助手回合的开头与生成提示不同，认不出哪些是助手写的",
                    where=f"第 {i + 1} 条消息",
                    expected="历史里的回合以生成提示开头",
                    fix="用 --tokenizer_path 换一个模板不同的分词器再训练",
                )
            inside = [k for k, (start, _) in enumerate(encoding.offsets) if start >= len(head)]
            if text.startswith(whole):
                inside = [k for k in inside if encoding.offsets[k][1] <= len(whole)]
                ends = [k for k in inside if encoding.ids[k] in special][-1:]
            else:  # 后面的回合改了这一回合的写法（删掉旧的推理），到第一个控制 token 为止
                ends = [k for k in inside if encoding.ids[k] in special][:1]
            for k in inside:
                target[k] = not ends or k <= ends[0]
        return target


def opens_thinking(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bool:
    """提示是不是停在刚开始的思考里：最后的字是 ``<think>``（与换行）。"""
    controls = codec_of(tokenizer).controls
    tail = ids[-16:]
    if THINK in controls:
        last = max((i for i, token in enumerate(tail) if token == controls[THINK]), default=None)
        return last is not None and not tokenizer.decode(tail[last + 1 :]).strip()
    text = tokenizer.decode(tail).rstrip()
    return text.endswith(THINK) and not text.endswith(END_THINK)
