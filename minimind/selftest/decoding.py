"""解码：引擎写出的每个词元与整段前向比；卡上录成图的解码与照常的比。"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from minimind.inference.engine import Engine, Sequence
from minimind.inference.sampling import GREEDY
from minimind.selftest.numerics import PRECISIONS, require_precision
from minimind.selftest.rows import Check, Measure, NotApplicable, Outcome
from minimind.selftest.toys import KINDS, VOCAB, matmul_precision, on_device, toy_model

# 长短不齐，比槽位多两个：排队、补位、拆开读提示都走到
PROMPT_LENGTHS, NEW_TOKENS = (40, 3, 26, 60, 9, 17), 16
OPTIONS: dict[str, Any] = {"eos_ids": (), "max_slots": 4, "prefill_chunk": 16}
# 对数概率至多差多少：半精度一步的舍入约 1 %，乘上 logits 的大小（这里约 5）
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def write(engine: Engine) -> list[Sequence]:
    """贪心地写完全部提示，按先后排好。"""
    for prompt in prompts():
        engine.add_request(prompt, GREEDY, NEW_TOKENS)
    done = []
    while engine.has_unfinished:
        done += engine.step()
    return sorted(done, key=lambda sequence: sequence.request_id)


@functools.cache
def judge(kind: str) -> nn.Module:
    """判卷的模型：CPU、fp32、写明白的注意力。"""
    return toy_model(kind, flash_attn=False).eval()


@torch.no_grad()
def against_forward(kind: str, sequences: list[Sequence], limit: float) -> list[Measure]:
    """每个词元的对数概率与整段前向的差；贪心选的词元比最大的差多少（应当就是最大的）。"""
    differences, gaps = [], []
    for sequence in sequences:
        ids = torch.tensor([sequence.prompt_ids + sequence.ids])
        logits = judge(kind)(ids, logits_to_keep=len(sequence.ids) + 1).logits[0, :-1]
        logp: Tensor = logits.float().log_softmax(-1)
        chosen = logp.gather(1, torch.tensor(sequence.ids)[:, None])[:, 0]
        differences.append((torch.tensor(sequence.logprobs) - chosen).abs().max())
        gaps.append((logp.max(-1).values - chosen).max())
    return [
        Measure("对数概率差", float(torch.stack(differences).max()), high=limit),
        Measure("比最大的低", float(torch.stack(gaps).max()), high=limit),
    ]


def engine_check(kind: str, name: str, device: torch.device) -> Outcome:
    """引擎（连续批处理、KV 缓存、合并的矩阵乘）与整段前向。"""
    require_precision(name, device)
    dtype = PRECISIONS[name].dtype
    with matmul_precision("highest"):
        sequences = write(plain_engine(on_device(toy_model(kind).eval(), device), dtype=dtype))
    return Outcome([*against_forward(kind, sequences, LIMITS[dtype]), _written(sequences)])


def _written(sequences: list[Sequence]) -> Measure:
    total = sum(len(sequence.ids) for sequence in sequences)
    return Measure("词元", total, low=len(PROMPT_LENGTHS) * NEW_TOKENS)


def plain_engine(model: nn.Module, **options: Any) -> Engine:
    """照常解码的引擎，不录。"""
    return Engine(model, cuda_graphs=False, **OPTIONS, **options)


def recorded_engine(model: nn.Module) -> Engine:
    """把一步解码录成图的引擎。

    Raises:
        NotApplicable: 不是 CUDA。
    """
    if next(model.parameters()).device.type != "cuda":
        raise NotApplicable("不适用：只有 CUDA 上才录制")
    return Engine(model, cuda_graphs=True, **OPTIONS)


def recorded_check(kind: str, device: torch.device) -> Outcome:
    """录制的解码：文字要与照常解码逐个相同，也要与整段前向对得上。"""
    model = on_device(toy_model(kind).eval(), device)
    with matmul_precision("highest"):
        engine = recorded_engine(model)
        sequences, plain = write(engine), write(plain_engine(model))
    different = sum(a != b for x, y in zip(sequences, plain) for a, b in zip(x.ids, y.ids))
    graphs = len(engine._graphs.graphs) if engine._graphs else 0
    measures = [
        Measure("与照常解码不同的词元", different, high=0),
        *against_forward(kind, sequences, LIMITS[torch.float32]),
        _written(sequences),
        Measure("录了几张图", graphs, low=1),
    ]
    return Outcome(measures)


def decoding_checks(device: torch.device, default: str) -> list[Check]:
    """引擎各行（fp32 与这种设备默认的半精度）与录制各行。"""
    names = ["fp32", default if default != "fp32" else "bf16"]
    checks = [
        Check("解码", f"引擎 {kind} {name}", functools.partial(engine_check, kind, name, device))
        for name in names
        for kind in KINDS
    ]
    return checks + [
        Check("解码", f"录制 {kind} fp32", functools.partial(recorded_check, kind, device)) for kind in KINDS
    ]
