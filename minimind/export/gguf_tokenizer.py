"""分词器写进 GGUF：词表、类型、合并、预切分的名字、对话模板。"""

from __future__ import annotations

import json
from typing import Any

from minimind.console import say
from minimind.errors import UserError
from minimind.export.hf import chat_template_of
from minimind.export.source import Source

# llama.cpp 不存正则，只认名字；这里是正则逐字相同的那些
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE_TOKENIZERS = {_QWEN2: "qwen2", _LLAMA3: "llama-bpe"}


def normalizers(spec: dict[str, Any]) -> list[str]:
    """``tokenizer.json`` 里依次做的正规化；Qwen 的是 ``["NFC"]``，我们的没有。"""
    normalizer = spec.get("normalizer") or {}
    return [step["type"] for step in normalizer.get("normalizers", [normalizer]) if step]


def pre_tokenizer_name(spec: dict[str, Any], where: str) -> str:
    """``tokenizer.json`` 的内容 → ``tokenizer.ggml.pre``。

    llama.cpp 对字节级 BPE 不做正规化。NFC 可以放过：已经是 NFC 的文字（键盘、网页里的几乎都是）经它不变，编码逐个相同；
    别的正规化（NFKC、去重音、小写）连普通的文字也改，不能放过。

    Raises:
        UserError: 不是字节级 BPE，或 llama.cpp 没有一样的预切分。
    """
    pre, model = spec.get("pre_tokenizer") or {}, spec["model"]
    steps = pre.get("pretokenizers", [pre])
    byte_level = steps[-1] if steps and steps[-1].get("type") == "ByteLevel" else None
    problem = None
    if model["type"] != "BPE" or byte_level is None:
        problem = f"不是字节级 BPE（{model['type']}）"
    elif byte_level.get("add_prefix_space") or model.get("byte_fallback"):
        problem = "有前缀空格或字节回退"
    elif any(step != "NFC" for step in normalizers(spec)):
        problem = f"有正规化（{'、'.join(normalizers(spec))}）"
    elif len(steps) == 1 and byte_level.get("use_regex", True):
        return "gpt-2"
    elif len(steps) == 2 and steps[0].get("type") == "Split" and not byte_level.get("use_regex", True):
        split = steps[0]
        name = PRE_TOKENIZERS.get(split["pattern"].get("Regex", ""))
        if name and split["behavior"] == "Isolated" and not split["invert"]:
            return name
        problem = f"预切分的正则是 {split['pattern']}"
    else:
        problem = f"预切分有 {len(steps)} 步"
    raise UserError(
        f"分词器{problem}，llama.cpp 没有一样的",
        where=where,
        expected="字节级 BPE，正规化至多是 NFC，预切分与 qwen2、llama-bpe 或 gpt-2 相同",
        fix="用 minimind export hf 导出，或换用随包的分词器训练",
    )


def write_tokenizer(writer: Any, gguf: Any, source: Source) -> None:
    """把分词器的全部内容写进 ``writer``。

    控制 token 记为 CONTROL，思考与工具的标签记为 USER_DEFINED（解码时保留，供对话程序解析）；
    词表比分词器大的部分用占位补齐，记为 UNUSED。
    """
    tokenizer, config = source.tokenizer, source.config
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(spec, tokenizer.name_or_path))
    if normalizers(spec):
        say(
            "留意：这个分词器先把文字正规化成 NFC，llama.cpp 不做这一步。已经是 NFC 的文字（通常都是）编码相同；"
            "拆开写的重音（如 e 加 U+0301）会编成别的词元，请先转成 NFC。"
        )
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for token_id in range(config.vocab_size):
        if token_id not in by_id:
            tokens.append(f"[PAD{token_id}]")
            types.append(gguf.TokenType.UNUSED)
            continue
        tokens.append(by_id[token_id])
        if token_id in added:
            control = added[token_id].special
            types.append(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = spec["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    ends = config.eos_token_id  # 有几个的，别的由 llama.cpp 从词的写法认
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat_template_of(tokenizer))
