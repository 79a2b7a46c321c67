"""文本与对话 → id。控制 token 只由结构产生，文本里写的永远是普通字符。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from minimind.errors import UserError
from minimind.tokenizer.loading import Codec, codec_of
from minimind.tokenizer.render import Segment, render
from minimind.tokenizer.special import IM_END, IM_START
from minimind.tokenizer.templates import Conversation, Template, layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatEncoding(NamedTuple):
    """一段对话的编码；``ids`` 与 ``target`` 等长。"""

    ids: list[int]
    target: list[bool]  # True：助手正文（含推理、工具调用）和它的 <|im_end|>


def encode_plain_batch(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """一批纯文本 → id；多核时由 tokenizers 并行。文本里的控制 token 与标签只是普通字符。

    Raises:
        UserError: 文本含落单的代理字符（不能写成 UTF-8）。
    """
    return _encode_texts(codec_of(tokenizer), texts)


def encode_plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """:func:`encode_plain_batch` 的单条形式。"""
    return _encode_texts(codec_of(tokenizer), [text])[0]


def document_start(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """续写时放在最前面的 token：分词器有 bos 就是它，没有（如 Qwen）就不放。"""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode_pretrain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """预训练文档：``[bos] + 文本 + [eos]``。"""
    codec = codec_of(tokenizer)
    return [codec.bos_id, *_encode_texts(codec, [text])[0], codec.eos_id]


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict],
    tools: Any = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> ChatEncoding:
    """一段对话 → id 与目标掩码；参数见 :func:`minimind.tokenizer.render.render`。

    分词器带着别人的对话模板时照它的渲染，id 与 ``apply_chat_template`` 相同；带生成提示的不算掩码。

    Raises:
        UserError: 消息的形状不对，或别人的模板不接受它。
    """
    return encode_chat_batch(tokenizer, [messages], [tools], add_generation_prompt, enable_thinking)[0]


def encode_unfinished(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict], tools: Any = None
) -> tuple[list[int], int]:
    """最后一条助手消息还没写完的对话 → ``(ids, written)``：去掉了回合的结尾，末尾 ``written`` 个是它已经写下的。"""
    codec, layout = codec_of(tokenizer), layout_of(tokenizer)
    if isinstance(layout, Template):
        talk = Conversation(tokenizer, layout, messages, tools)
        text, head = talk.text(continue_final=True), talk.text(True, count=len(messages) - 1)
        ids = talk.encode(text).ids
        if text.startswith(head):
            return ids, len(ids) - len(talk.encode(head).ids)
        return ids, len(talk.encode(talk.messages[-1]["content"]).ids)
    ids = encode_chat(tokenizer, messages, tools).ids

    def last(control: str) -> int:
        return len(ids) - 1 - ids[::-1].index(codec.controls[control])

    start = last(IM_START) + 1 + len(_layout_ids(codec, Segment("assistant\n", False, False, True)))
    return ids[: last(IM_END)], last(IM_END) - start


def encode_chat_batch(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[list[dict]],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> list[ChatEncoding]:
    """一批对话；结果与逐条 :func:`encode_chat` 相同，只是文本一次送进后端。

    Args:
        conversations: 每项是一段对话的消息列表。
        tools: 与 ``conversations`` 等长的工具列表；``None`` 时各取消息里的 ``tools``。
    """
    each = [None] * len(conversations) if tools is None else tools
    layout = layout_of(tokenizer)
    if isinstance(layout, Template):
        return [
            _encode_template(tokenizer, layout, messages, own, add_generation_prompt, enable_thinking)
            for messages, own in zip(conversations, each, strict=True)
        ]
    rendered = [
        render(messages, own, add_generation_prompt, enable_thinking, layout)
        for messages, own in zip(conversations, each, strict=True)
    ]
    encode = _encode_joined if layout.joined else _encode_segments
    return encode(codec_of(tokenizer), rendered)


def _encode_template(tokenizer, template, messages, tools, prompt, enable_thinking) -> ChatEncoding:
    """用别人的模板；带生成提示的是拿去续写的，不必算掩码。"""
    talk = Conversation(tokenizer, template, messages, tools)
    text = talk.text(prompt, enable_thinking)
    _check_text(text)
    encoding = talk.encode(text)
    if prompt:
        return ChatEncoding(encoding.ids, [False] * len(encoding.ids))
    skip = frozenset(i for i, message in enumerate(messages) if message.get("weight") == 0)
    return ChatEncoding(encoding.ids, talk.targets(text, encoding, skip))


def _encode_texts(codec: Codec, texts: Sequence[str], offsets: bool = False) -> list[Any]:
    """各段文字的 id；``offsets`` 要带位置的 ``Encoding``。"""
    encode = codec.plain.encode_batch if offsets else codec.plain.encode_batch_fast
    try:
        encodings = encode(list(texts), add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        for text in texts:
            _check_text(text)
        raise
    return encodings if offsets else [encoding.ids for encoding in encodings]


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise UserError(f"要分词的不是字符串：{text!r:.60}", expected="str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"文本第 {error.start + 1} 个字符是落单的代理字符 {text[error.start]!r}，不能写成 UTF-8",
            expected="合法的 Unicode 文本",
            fix="清洗数据，去掉 JSON 里单独出现的 \\ud800–\\udfff",
        ) from error


def _encode_segments(codec: Codec, conversations: list[list[Segment]]) -> list[ChatEncoding]:
    """收齐所有文本段，一次编码，再按结构拼回去。"""
    texts = [s.text for segments in conversations for s in segments if not (s.control or s.fixed)]
    pieces = iter(_encode_texts(codec, texts))
    encoded = []
    for segments in conversations:
        ids: list[int] = []
        target: list[bool] = []
        for segment in segments:
            if segment.control or segment.fixed:
                piece = _layout_ids(codec, segment)
            else:
                piece = next(pieces)
            ids += piece
            target += [segment.target] * len(piece)
        encoded.append(ChatEncoding(ids, target))
    return encoded


def _encode_joined(codec: Codec, conversations: list[list[Segment]]) -> list[ChatEncoding]:
    """同 :func:`_encode_segments`，只是控制 token 之间的文字连起来分词；跨在掩码边上的 token 算要学的。"""
    runs: list[list[Segment]] = []  # 各对话里，控制 token 之间的段
    outline: list[list[int | tuple[int, bool]]] = []  # 第几段文字，或（控制 token，要不要学）
    for segments in conversations:
        parts: list[int | tuple[int, bool]] = []
        for segment in segments:
            if segment.control and segment.text in codec.controls:
                parts.append((codec.controls[segment.text], segment.target))
            elif parts and isinstance(parts[-1], int):
                runs[parts[-1]].append(segment)
            else:
                parts.append(len(runs))
                runs.append([segment])
        outline.append(parts)
    pieces = []
    texts = ["".join(segment.text for segment in run) for run in runs]
    for run, encoding in zip(runs, _encode_texts(codec, texts, offsets=True)):
        wanted = [flag for segment in run for flag in [segment.target] * len(segment.text)]
        pieces.append((encoding.ids, [any(wanted[a:b]) for a, b in encoding.offsets]))
    encoded = []
    for parts in outline:
        ids: list[int] = []
        target: list[bool] = []
        for part in parts:
            more = pieces[part] if isinstance(part, int) else ([part[0]], [part[1]])
            ids += more[0]
            target += more[1]
        encoded.append(ChatEncoding(ids, target))
    return encoded


def _layout_ids(codec: Codec, segment: Segment) -> list[int]:
    """控制 token 的 id，或布局里固定文本的缓存；外来的分词器没有的标签按文本编码。"""
    if segment.control and segment.text in codec.controls:
        return [codec.controls[segment.text]]
    if segment.text not in codec.fixed:
        codec.fixed[segment.text] = _encode_texts(codec, [segment.text])[0]
    return codec.fixed[segment.text]
