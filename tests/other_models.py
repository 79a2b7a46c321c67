"""别人的模型目录：随机的小权重、自己的分词器与对话模板，样子与真的相同。"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "你好，世界。今天天气怎么样？用计算器算一下 12*34。hello world, how are you today?\n\n",
    '{"name": "f", "arguments": {"city": "北京"}} user assistant system tool response\n',
    "# Tools You may call one or more functions to assist with the user query. signatures within XML tags\n",
]

# Llama 3 的样子：每回合一个名牌，正文掐头去尾，会话以 bos 开头
LLAMA = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
# Mistral 的样子：没有系统回合，必须一问一答，控制 token 与正文之间有空格
MISTRAL = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role not in ['user', 'assistant'] or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
# Qwen3 的样子：默认的系统提示只在有工具时没有；旧回合的推理删掉；可以关思考
QWEN = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages if m.role == 'user' %}{%- set ns.last = messages.index(m) %}{%- endfor %}"
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- '# Tools\\n<tools>' }}{%- for t in tools %}{{- '\\n' + (t | tojson) }}{%- endfor %}"
    '{{- \'\\n</tools>\\nReply with <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n\' }}'
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and m.reasoning_content %}"
    "{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}{{- m.content }}"
    "{%- for c in m.tool_calls or [] %}{%- if not loop.first or m.content %}{{- '\\n' }}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{- (c.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
# 公共 minimind-3 的布局，换一种写法；渲染出的字与它自己的模板相同
MINIMIND3 = (
    "{%- set first = messages[0] %}"
    "{%- if tools %}{{- '<|im_start|>system\\n' ~ (first.content ~ '\\n\\n' if first.role == 'system' else '') }}"
    "{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}"
    "{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>\\n' }}"
    "{%- for tool in tools %}{{- (tool | tojson) ~ '\\n' }}{%- endfor %}"
    "{{- '</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}"
    "{{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\"name\": <function-name>, ' }}"
    "{{- '\"arguments\": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}"
    "{%- elif first.role == 'system' %}{{- '<|im_start|>system\\n' ~ first.content ~ '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- set said = m.content if m.content is string else '' %}"
    "{%- if m.role == 'user' or (m.role == 'system' and loop.index0) %}"
    "{{- '<|im_start|>' ~ m.role ~ '\\n' ~ said ~ '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '' if loop.index0 and loop.previtem.role == 'tool' else '<|im_start|>user' }}"
    "{{- '\\n<tool_response>\\n' ~ said ~ '\\n</tool_response>' }}"
    "{{- '' if not loop.last and loop.nextitem.role == 'tool' else '<|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}{%- set p = namespace(why='', said=said) %}"
    "{%- if m.reasoning_content is string %}{%- set p.why = m.reasoning_content %}"
    "{%- elif '</think>' in said %}"
    "{%- set p.why = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set p.said = said.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' ~ p.why.strip('\\n') ~ '\\n</think>\\n\\n' ~ p.said.lstrip('\\n') }}"
    "{%- for call in m.tool_calls or [] %}{%- set f = call.function or call %}"
    "{{- '\\n' if p.said or not loop.first else '' }}"
    '{{- \'<tool_call>\\n{"name": "\' ~ f.name ~ \'", "arguments": \' }}'
    "{{- f.arguments if f.arguments is string else f.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}"
    "{{- '' if open_thinking is defined and open_thinking is true else '\\n</think>\\n\\n' }}{%- endif %}"
)

TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# 名字 → （结构，模板，控制 token，bos，eos，generation_config 里的结束符）
KINDS = {
    "llama": (
        "llama",
        LLAMA,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|end_of_text|>", "<|eot_id|>"],
    ),
    "mistral": ("llama", MISTRAL, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", ["</s>"]),
    "qwen": ("qwen3", QWEN, CHATML, None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "minimind3": ("qwen3", MINIMIND3, CHATML, "<|im_start|>", "<|im_end|>", ["<|im_end|>"]),
    "无模板": ("llama", None, ["<unk>", "<s>", "</s>"], "<s>", "</s>", ["</s>"]),
    "无模板有ChatML": ("qwen3", None, CHATML, None, "<|im_end|>", ["<|im_end|>"]),
}


@functools.cache
def _backend(kind: str) -> str:
    """训练一个小分词器，返回它的 JSON。Mistral 的是 sentencepiece 的样子，别的是字节级。"""
    specials = KINDS[kind][2]
    if kind == "mistral":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, bytes_ = [], [f"<0x{i:02X}>" for i in range(256)]
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet, bytes_ = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(token, special=True) for token in specials],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 5, trainer)
    if bytes_:
        spec = json.loads(backend.to_str())
        vocab = spec["model"]["vocab"]
        vocab.update({byte: len(vocab) + i for i, byte in enumerate(bytes_)})
        backend = Tokenizer.from_str(json.dumps(spec))
    if specials[:1] == CHATML[:1]:
        backend.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    bos = KINDS[kind][3]
    if kind in ("llama", "mistral"):  # 直接分词时自动加 bos：模板里又写了一个，分两次就成了两个
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend.to_str()


def write_tokenizer(folder: Path, kind: str, template: str | None = "") -> None:
    """``tokenizer.json`` 与 ``tokenizer_config.json``；``template`` 给了就换掉模板。"""
    folder.mkdir(parents=True, exist_ok=True)
    _, own, _, bos, eos, _ = KINDS[kind]
    template = own if template == "" else template
    (folder / "tokenizer.json").write_text(_backend(kind), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    config |= {"clean_up_tokenization_spaces": False, "chat_template": template}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), "utf-8")


def write_model(folder: Path, kind: str, template: str | None = "", **changes):
    """整个目录：分词器、``config.json``、``generation_config.json``、权重；返回 transformers 的模型。"""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    write_tokenizer(folder, kind, template)
    backend = Tokenizer.from_str(_backend(kind))
    structure, _, _, bos, eos, ends = KINDS[kind]
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "intermediate_size": 96, "vocab_size": backend.get_vocab_size() + 4}
    sizes |= {"max_position_embeddings": 1024, "rope_theta": 1e6, "tie_word_embeddings": True}
    config = AutoConfig.for_model(
        structure,
        **{**sizes, **changes},
        initializer_range=0.3,
        bos_token_id=bos and backend.token_to_id(bos),
        eos_token_id=backend.token_to_id(eos),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=[backend.token_to_id(end) for end in ends])
    model.save_pretrained(folder)
    return model
