"""别人的对话模板：认出一个分词器用哪种布局；不是自己会渲染的，就用它自己的 Jinja 模板，id 与 ``apply_chat_template`` 相同。

认布局看行为不看文字：几段样本对话渲染得一字不差，就是那种布局（:data:`minimind.tokenizer.layouts.LAYOUTS`）。
一个字也不渲染用户的话的，不算对话模板。

文字里写着控制 token 的（用户打了 ``<|im_end|>``）：模板只认文字，分不清哪个是结构。所以渲染前给这些字做上记号，渲染后
把结构里的换成谁也猜不到的名字，拿掉记号，再用同一个分词器、改了名的控制 token 分词：用户写的那些就只是普通字符。
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

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
from minimind.tokenizer.special import END_THINK, REPLY_TAGS, THINK

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
    return None if tokenizer.chat_template else "分词器没有对话模板，用本项目的"


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
        self.guard = _Guard.needed(self.messages, self.tools, names)
        if self.guard:
            self.messages, self.tools = self.guard.messages(self.messages), self.guard.mark(self.tools)
            self.backend, self.names = _renamed(tokenizer, self.guard)
        else:
            self.backend = _whole(tokenizer)

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


# ---------------------------------------------------------------- 文本 → id


def _spec(tokenizer) -> dict[str, Any]:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec.update(post_processor=None, truncation=None, padding=None)
    return spec


def _whole(tokenizer) -> Tokenizer:
    """整段分词，控制 token 照认；与 ``tokenizer(text, add_special_tokens=False)`` 相同，不受别处设的补齐影响。"""
    codec = codec_of(tokenizer)
    if codec.whole is None:
        codec.whole = Tokenizer.from_str(json.dumps(_spec(tokenizer), ensure_ascii=False))
    return codec.whole


def _renamed(tokenizer, guard: _Guard) -> tuple[Tokenizer, dict[str, str]]:
    """:func:`_build_renamed`，做好一次就记住。

    Raises:
        UserError: 这种分词器改不了名。
    """
    codec = codec_of(tokenizer)
    if codec.renamed is None:
        try:
            codec.renamed = _build_renamed(_spec(tokenizer))
        except Exception as error:  # tokenizers 以裸 Exception 报格式错误
            raise UserError(
                f"文字里有控制 token 的字样 {guard.example}，这个分词器没法把它当普通文字",
                where="消息",
                fix="去掉这样的字样",
            ) from error
    return codec.renamed


def _build_renamed(spec: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """同一个分词器，控制 token 改了名；名字里有随机数，正文里不会有。

    Returns:
        ``(tokenizer, names)``，``names`` 是原名 → 新名。

    Raises:
        ValueError: 有 token 的 id 变了。
    """
    added, model = spec["added_tokens"], spec["model"]
    secret = secrets.token_hex(8)
    names = {token["content"]: f"\U000f0000{secret}.{token['id']}\U000f0001" for token in added}
    if isinstance(model["vocab"], dict):
        vocab = {names.get(word, word): i for word, i in model["vocab"].items()}
        model["vocab"] = vocab | {names[token["content"]]: token["id"] for token in added}
    else:  # Unigram：[词, 分数] 的列表，id 是次序
        vocab = [[names.get(word, word), score] for word, score in model["vocab"]]
        later = sorted((token["id"], token["content"]) for token in added if token["id"] >= len(vocab))
        model["vocab"] = vocab + [[names[content], -1e9] for _, content in later]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in added:
        token["content"] = names[token["content"]]
    made = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    for token in added:
        if made.token_to_id(token["content"]) != token["id"]:
            raise ValueError(f"id {token['id']} 变了")
    return made, names


@dataclass
class _Guard:
    """这一段对话里有控制 token 的字样。

    Args:
        breaker: 做记号的字，正文里没有。
        controls: 认控制 token 的正则。
        example: 正文里的一个字样，报错用。
    """

    breaker: str
    controls: re.Pattern
    example: str

    @classmethod
    def needed(cls, messages: list[dict], tools: list[dict], names: list[str]) -> _Guard | None:
        controls = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        texts = list(_strings([messages, tools]))
        found = [m[0] for s in texts if (m := controls.search(s))]
        if not found:
            return None
        used = set().union(*texts)
        breaker = next(chr(c) for c in range(0xF0002, 0xFFFFE) if chr(c) not in used)
        return cls(breaker, controls, found[0])

    def messages(self, messages: list[dict]) -> list[dict]:
        """做记号；助手正文里的 ``<think>`` 之类是可信的，不做。"""
        return [
            {
                key: value
                if key == "role"
                else self.mark(value, key == "content" and m["role"] == "assistant")
                for key, value in m.items()
            }
            for m in messages
        ]

    def mark(self, value: Any, trusted: bool = False) -> Any:
        """字样的第一个字之后插一个记号，与控制 token 就对不上了。"""
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {self.mark(key): self.mark(inner) for key, inner in value.items()}
        if not isinstance(value, str):
            return value

        def broken(match: re.Match) -> str:
            return (
                match[0] if trusted and match[0] in REPLY_TAGS else match[0][0] + self.breaker + match[0][1:]
            )

        return self.controls.sub(broken, value)

    def finish(self, text: str, names: dict[str, str]) -> str:
        """渲染好的全文：结构里的控制 token 改名，记号拿掉。"""
        text = self.controls.sub(lambda match: names[match[0]], text)
        return text.replace(self.breaker, "")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def opens_thinking(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bool:
    """提示是不是停在刚开始的思考里：最后的字是 ``<think>``（与换行）。"""
    controls = codec_of(tokenizer).controls
    tail = ids[-16:]
    if THINK in controls:
        last = max((i for i, token in enumerate(tail) if token == controls[THINK]), default=None)
        return last is not None and not tokenizer.decode(tail[last + 1 :]).strip()
    text = tokenizer.decode(tail).rstrip()
    return text.endswith(THINK) and not text.endswith(END_THINK)
