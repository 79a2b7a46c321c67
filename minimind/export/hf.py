"""导出成 Hugging Face 目录：``AutoModelForCausalLM``、vLLM 等直接能读。"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minimind.export.files import whole_folder
from minimind.export.layouts import NATIVE, hf_config, layout_of
from minimind.export.shared_experts import to_qwen2_moe
from minimind.export.source import Source, cast
from minimind.model import model_minimind
from minimind.tokenizer.loading import SHIPPED_DIR

MODEL_FOLDER = Path(model_minimind.__file__).parent


def code_files() -> tuple[str, ...]:
    """模型文件与它相对引用的全部文件：随目录走，没装本项目的机器才读得开。"""
    found = [Path(model_minimind.__file__).name]
    for name in found:  # 边走边加
        text = (MODEL_FOLDER / name).read_text(encoding="utf-8")
        found += [
            f"{m}.py" for m in re.findall(r"^\s*from \.(\w+) import", text, re.M) if f"{m}.py" not in found
        ]
    return tuple(found)


CODE_FILES = code_files()
SIDECAR = "minimind.json"  # 训练时的旁注，原样带着：步数、指标，导回来时还在
OWN_FILES = frozenset(
    (
        *("config.json", "generation_config.json", "model.safetensors", *CODE_FILES),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
        *(SIDECAR, "README.md"),
    )
)


def export_hf(
    source: Source, folder: Path, dtype: torch.dtype, force: bool = False, layout: str | None = None
) -> str:
    """写出一个目录，返回它的结构名（``llama``、``qwen3``、``qwen3_moe``、``qwen2_moe`` 或 ``minimind``）。

    Args:
        layout: ``minimind`` 是带模型文件的目录；默认用同构的公开结构，没有才带模型文件。

    Raises:
        UserError: 目录不能写，或权重转不成 ``dtype``。
    """
    layout = layout or layout_of(source.config)
    config = hf_config(source.config, dtype, layout)
    state = to_qwen2_moe(source.state, source.config) if layout == "qwen2_moe" else source.state
    state = cast(state, dtype, str(source.path))
    with whole_folder(folder, force, OWN_FILES) as target:
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        (target / "model.safetensors").chmod(0o644)  # safetensors 写成只有自己可读，服务用户就打不开
        write_json(target / "config.json", config)
        write_json(target / "generation_config.json", generation_config(source))
        write_tokenizer(source.tokenizer, target)
        if layout == NATIVE:
            for name in CODE_FILES:
                shutil.copyfile(MODEL_FOLDER / name, target / name)
        if source.sidecar:
            write_json(target / SIDECAR, source.sidecar)
        (target / "README.md").write_text(model_card(source, layout, folder.name), encoding="utf-8")
    return layout


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def generation_config(source: Source) -> dict[str, Any]:
    """只写停在哪里；采样参数留给使用者，免得 vLLM 之类悄悄拿它当默认。"""
    config = source.config
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": source.stop_ids,
        "pad_token_id": config.pad_token_id,
    }


def chat_template_of(tokenizer: Any) -> str:
    """分词器自己的对话模板；外来的分词器没有时用本项目的。"""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return own or (SHIPPED_DIR / "chat_template.jinja").read_text(encoding="utf-8")


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json、tokenizer_config.json（含模板）、special_tokens_map.json；模板只有一份的，另写 chat_template.jinja。

    不用 ``save_pretrained``：transformers 5 写的类名 4.x 不认识，模板也不写进 tokenizer_config.json。
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(truncation=None, padding=None)  # 训练时设过的不该带出去
    write_json(folder / "tokenizer.json", backend)
    own = tokenizer.chat_template
    if isinstance(own, dict):  # 几份有名字的（用不用工具各一份），都带上
        template = [{"name": name, "template": text} for name, text in own.items()]
    else:
        template = chat_template_of(tokenizer)
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    special = {name: token for name, token in special.items() if token is not None}
    flags = {"special", "lstrip", "rstrip", "normalized", "single_word"}
    added = {
        str(token_id): {"content": token.content, **{flag: getattr(token, flag) for flag in sorted(flags)}}
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": min(int(tokenizer.model_max_length), 10**9),
            "added_tokens_decoder": added,
            "chat_template": template,
        },
    )
    write_json(folder / "special_tokens_map.json", special)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def model_card(source: Source, layout: str, name: str) -> str:
    """目录里的 README.md：怎么用，几行就够。"""
    remote = ", trust_remote_code=True" if layout == NATIVE else ""
    count = sum(value.numel() for value in source.state.values())
    ask = (
        'inputs = tokenizer("从前", return_tensors="pt")'
        if source.plain
        else 'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}],\n'
        '    add_generation_prompt=True, return_dict=True, return_tensors="pt")'
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: [zh, en]
---

# {name}

由 MiniMind 训练并导出：{count:,} 个参数，结构与 `{layout}` 相同，{"只会续写" if source.plain else "会对话"}。

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}"{remote})
{ask}
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""
