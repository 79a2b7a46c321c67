"""推理基准的各家：本项目的引擎、transformers 的 ``generate``、llama.cpp，同一组权重。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimind.export.source import Source, open_source
from minimind.inference.engine import Engine
from minimind.inference.int8 import quantize_int8
from minimind.inference.sampling import GREEDY
from minimind.model import MiniMindForCausalLM, preset
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.runtime.device import DTYPES
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint


@dataclass
class Peer:
    """一家：``write(提示们, 写几个)`` 给出各条的词元；``parallel`` 真为能一次写几条。"""

    write: Callable[[list[list[int]], int], list[list[int]]]
    parallel: bool = True
    exact: bool = True


def open_weights(weight: str, size: str, folder: Path) -> Source:
    """``weight``，没有给就当场造一份随机的。"""
    if weight:
        return open_source(weight)
    torch.manual_seed(0)
    # 默认的初始化下各词的 logit 几乎相等，两家的舍入就能改写文字；放大之后才分得出高下，速度不受影响
    model = MiniMindForCausalLM(preset(size, initializer_range=0.05))
    path = weights_path(model.config, "random", folder)
    hashed = tokenizer_fingerprint(load_tokenizer())
    save_weights(model, path, {"config": config_dict(model.config), "tokenizer_hash": hashed})
    return open_source(str(path))


def rebuild(source: Source) -> MiniMindForCausalLM:
    model = MiniMindForCausalLM(source.config)
    model.load_state_dict(source.state, strict=False)
    return model.eval()


def our_peer(source: Source, kind: str, device: torch.device, batch: int, longest: int) -> Peer:
    """引擎；结束符不起作用。``longest`` 是提示加回答的上限。"""
    model = rebuild(source)
    if kind == "int8":
        quantize_int8(model)
    else:
        model = model.to(device, DTYPES[kind])
    engines = {rows: Engine(model, eos_ids=(), max_slots=rows, max_length=longest) for rows in (1, batch)}

    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        engine = engines[1 if len(prompts) == 1 else batch]
        numbers = [engine.add_request(prompt, GREEDY, count) for prompt in prompts]
        out: list[list[int]] = [[] for _ in prompts]
        while engine.has_unfinished:
            for sequence in engine.step():
                out[sequence.request_id - numbers[0]] = sequence.ids
        return out

    return Peer(write, exact=kind == "float32")


def hugging_face(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Peer, Any]:
    """transformers 的 ``generate``，连同它的模型。"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)  # 各条一样长，不必填充
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return out[:, ids.shape[1] :].tolist()

    return Peer(write), model


def llama_cpp(path: Path, kind: str, threads: int, context: int) -> Peer:
    """llama-cpp-python 打开的 GGUF；贪心直接取最大的 logit，比它自己的抽样器省。"""
    import numpy as np
    from llama_cpp import Llama

    # fp32 的那份连缓存也用 fp32（类型 0），才与别家算的是同一个函数
    options = {"type_k": 0, "type_v": 0} if kind == "f32" else {}
    llama = Llama(
        str(path), n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, verbose=False,
        **options,
    )  # fmt: skip
    vocab = llama.n_vocab()

    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        llama.reset()
        llama.eval(prompts[0])
        out: list[int] = []
        while True:
            logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(vocab,))
            out.append(int(logits.argmax()))
            if len(out) == count:
                return [out]
            llama.eval(out[-1:])

    return Peer(write, parallel=False, exact=kind == "f32")
