"""分词器：随包的 6400 词表、对话渲染、训练与压缩率评测。

常用入口::

    tokenizer = load_tokenizer()                     # 随包的；load_tokenizer(文件夹) 打开别的
    encode_plain(tokenizer, "文本")                   # 文本里的控制 token 只是普通字符
    encode_pretrain(tokenizer, "文档")                # [bos] + 文本 + [eos]
    encode_chat(tokenizer, messages).ids / .target   # 对话与目标掩码，掩码来自结构

名字用到时才导入：预训练打开分词器，用不着对话怎么渲染、别人的模板怎么认。
"""

from __future__ import annotations

from minimind import names_on_use

_HOMES = {
    "ChatEncoding": "chat",
    "Segment": "render",
    "document_start": "chat",
    "encode_chat": "chat",
    "encode_chat_batch": "chat",
    "encode_plain": "chat",
    "encode_plain_batch": "chat",
    "encode_pretrain": "chat",
    "encode_unfinished": "chat",
    "load_tokenizer": "loading",
    "render_text": "render",
    "token_byte_lengths": "loading",
    "tokenizer_fingerprint": "loading",
}
__all__ = list(_HOMES)
__getattr__ = names_on_use(__name__, _HOMES)
