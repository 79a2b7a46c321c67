"""分词器：随包的 6400 词表、对话渲染、训练与压缩率评测。

常用入口::

    tokenizer = load_tokenizer()                     # 随包的；load_tokenizer(文件夹) 打开别的
    encode_plain(tokenizer, "文本")                   # 文本里的控制 token 只是普通字符
    encode_pretrain(tokenizer, "文档")                # [bos] + 文本 + [eos]
    encode_chat(tokenizer, messages).ids / .target   # 对话与目标掩码，掩码来自结构
"""

from minimind.tokenizer.chat import (
    ChatEncoding,
    encode_chat,
    encode_chat_batch,
    encode_plain,
    encode_plain_batch,
    encode_pretrain,
    encode_unfinished,
)
from minimind.tokenizer.loading import load_tokenizer, token_byte_lengths, tokenizer_fingerprint
from minimind.tokenizer.render import Segment, render, render_text

__all__ = [
    "ChatEncoding",
    "Segment",
    "encode_chat",
    "encode_chat_batch",
    "encode_plain",
    "encode_plain_batch",
    "encode_pretrain",
    "encode_unfinished",
    "load_tokenizer",
    "render",
    "render_text",
    "token_byte_lengths",
    "tokenizer_fingerprint",
]
