"""打开分词器：随包的一份，或任何带 tokenizer.json 的文件夹（包括公共 MiniMind 的）。"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from minimind.errors import UserError
from minimind.paths import folder_problem, resolve_path
from minimind.tokenizer.special import IM_END, IM_START, PAD, TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHIPPED_DIR = Path(__file__).resolve().parent

# 渲染规则变了就加一，旧的分词缓存随之作废
LAYOUT_VERSION = 1

# 随包的模板换了写法（也读 JSON 字符串、形状不对就拒绝），合规对话渲染出的文本一字未变：身份沿用第一版的，
# 以前训练的权重、导出的目录才照样认得。改模板时这里一起改，tests 核对
SAME_IDENTITY = {
    "f493738911523dc90bc454bb7eb5a26b7c674688204532b69a5418ae438492b0": (
        "16baf947263ebc9b801c69942ba30890908247ed76360ff4d8b2d1ed4947e848"
    ),
}

_CODEC_ATTRIBUTE = "_minimind_codec"


@dataclass
class Codec:
    """一个分词器的两面：把文本当纯文本编码的后端，和控制 token 的 id。

    Attributes:
        plain: 去掉全部附加 token 的后端；文本里写的 ``<|im_end|>`` 在这里只是普通字符。
        controls: 控制 token 与标签 → id；分词器没有的标签不在里面。
        bos_id, eos_id: 预训练文档的首尾。
        layouts: 模板 → 用哪种布局；whole、renamed 是给别人的模板用的后端，见 :mod:`minimind.tokenizer.templates`。
    """

    plain: Tokenizer
    controls: dict[str, int]
    bos_id: int
    eos_id: int
    fixed: dict[str, list[int]] = field(default_factory=dict)
    layouts: dict[str, Any] = field(default_factory=dict)
    whole: Tokenizer | None = None
    renamed: tuple[Tokenizer, dict[str, str]] | None = None


def load_tokenizer(path: str | Path | None = None) -> PreTrainedTokenizerFast:
    """打开分词器。

    Args:
        path: 含 ``tokenizer.json`` 的文件夹；``None`` 用随包的 6400 词表。

    Raises:
        UserError: 文件夹不存在、缺文件、JSON 损坏，或分词器没有对话用的控制 token。
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = SHIPPED_DIR if path is None else resolve_path(path)
    _check_folder(folder)
    try:
        if path is None or not (folder / "tokenizer_config.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **_spelled(folder))
    except Exception as error:  # tokenizers 以裸 Exception 报格式错误
        raise UserError(
            f"分词器打不开（{type(error).__name__}：{str(error).splitlines()[0][:200]}）",
            where=str(folder),
            expected="Hugging Face 快速分词器的 tokenizer.json 与 tokenizer_config.json",
            fix="重新下载这个文件夹，或去掉 --tokenizer_path 用随包的分词器",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "这个分词器没有快速后端",
            where=str(folder),
            expected="tokenizer.json",
            fix="换一个带 tokenizer.json 的文件夹",
        )
    codec = codec_of(tokenizer, where=str(folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = PAD if PAD in codec.controls else tokenizer.eos_token
    return tokenizer


def _check_folder(folder: Path) -> None:
    fix = "检查 --tokenizer_path，或去掉它用随包的分词器"
    if problem := folder_problem(folder):
        raise UserError(
            f"分词器文件夹{problem}", where=str(folder), expected="一个含 tokenizer.json 的文件夹", fix=fix
        )
    if not (folder / "tokenizer.json").is_file():
        raise UserError("文件夹里没有 tokenizer.json", where=str(folder), fix=fix)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise UserError(
                f"不是合法的 JSON（{error}）", where=str(file), fix="重新下载或恢复这个文件"
            ) from error


def _spelled(folder: Path) -> dict[str, Any]:
    """写成字典而没有 ``__type`` 的特殊 token（transformers 4 以前存的），只取文字：transformers 5 读不了这样的。"""
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    sources, legacy = [config], folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and legacy.is_file():  # 有它的，那一份 transformers 不看
        sources.append(json.loads(legacy.read_text("utf-8")))

    def text(value: Any) -> Any:
        plain = isinstance(value, dict) and "content" in value and "__type" not in value
        return value["content"] if plain else value

    found = {}
    for source in sources:
        for key, value in source.items():
            made = [text(item) for item in value] if isinstance(value, list) else text(value)
            if key.endswith(("_token", "_special_tokens")) and made != value:
                found.setdefault(key, made)
    return found


def codec_of(tokenizer: PreTrainedTokenizerFast, where: str | None = None) -> Codec:
    """取得（第一次时建立）分词器的 :class:`Codec`，挂在分词器对象上。"""
    codec = tokenizer.__dict__.get(_CODEC_ATTRIBUTE)
    if codec is None:
        codec = _build_codec(tokenizer, where)
        tokenizer.__dict__[_CODEC_ATTRIBUTE] = codec
    return codec


def _build_codec(tokenizer: PreTrainedTokenizerFast, where: str | None) -> Codec:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    added = tokenizer.get_added_vocab()
    controls = {token: added[token] for token in (PAD, *TAGS) if token in added}
    # 早期的公共分词器没有 <|im_start|>，对话用 <s> </s> 分隔：取它声明的 bos / eos
    for token, fallback_id in ((IM_START, tokenizer.bos_token_id), (IM_END, tokenizer.eos_token_id)):
        token_id = added.get(token, fallback_id)
        if token_id is None:
            if token == IM_START and tokenizer.chat_template:
                continue  # 回合怎么开头由它自己的模板管
            raise UserError(
                f"分词器没有 {token}，也没有声明可以代替它的 bos / eos",
                where=where,
                expected="ChatML 的 <|im_start|> 与 <|im_end|>",
                fix="去掉 --tokenizer_path 用随包的分词器",
            )
        controls[token] = token_id
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Codec(
        plain=Tokenizer.from_str(json.dumps(spec, ensure_ascii=False)),
        controls=controls,
        bos_id=controls.get(IM_START, eos_id) if bos_id is None else bos_id,
        eos_id=controls[IM_END] if eos_id is None else eos_id,
    )


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """每个 token 代表多少个 UTF-8 字节，算每字节比特数时用。

    Returns:
        ``int64 [V]``，``V = len(tokenizer)``；控制 token 与标签记 0（文本里没有它们的字节）。
    """
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    added = tokenizer.added_tokens_decoder
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in added:
            is_text = not added[token_id].special and token not in TAGS
            lengths[token_id] = len(token.encode("utf-8")) if is_text else 0
        elif byte_level:  # 字节级词表里一个字符就是一个字节
            lengths[token_id] = len(token)
        elif token.startswith("<0x") and token.endswith(">"):
            lengths[token_id] = 1
        else:
            lengths[token_id] = len(token.replace("▁", " ").encode("utf-8"))
    return lengths


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """分词结果的身份：词表、合并、预切分、模板和渲染版本的 sha256。

    不含填充与截断设置：那些由调用改来改去，不影响分词。
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec.update(truncation=None, padding=None)
    # tokenizers 各版本写 merges 的方式不同（"a b" 或 ["a", "b"]），统一后再算
    merges = spec["model"].get("merges") or []
    spec["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    identity = [spec, tokenizer.chat_template, LAYOUT_VERSION]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return SAME_IDENTITY.get(digest, digest)
