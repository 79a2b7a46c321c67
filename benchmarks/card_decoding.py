"""卡上的解码：逐词元写、读提示、强化学习的采样。"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from card_parts import Card, LeftOut
from torch import Tensor
from train_peers import build_ours

from minimind.inference.cuda_graph import GraphedDecode
from minimind.inference.engine import Engine
from minimind.inference.sampling import GREEDY, SamplingParams
from minimind.runtime.device import synchronize

STRIDE, PROMPT = 8, 32
ROWS = ((1, 256), (256, 128), (32, 256), (64, 256))  # （几条，各写多少）；两个有目标的在前


def half_model(card: Card, size: str) -> Any:
    """随机权重，bf16（CPU 上 fp32）。"""
    dtype = torch.float32 if card.device.type == "cpu" else card.half
    return build_ours(card.size(size), card.device).to(dtype).eval()


def write(card: Card, engine: Engine, rows: int, count: int, greedy: bool) -> float:
    """``rows`` 条各写 ``count`` 个，词元/秒，连读提示在内。"""
    generator = torch.Generator().manual_seed(1)
    for number in range(rows):
        prompt = torch.randint(3, engine.vocab_size, (PROMPT,), generator=generator).tolist()
        params = GREEDY if greedy else SamplingParams(temperature=1.0, seed=number)
        engine.add_request(prompt, params, count)
    synchronize(card.device)
    start, total = time.perf_counter(), 0
    while engine.has_unfinished:
        total += sum(len(sequence.ids) for sequence in engine.step())
    synchronize(card.device)
    return total / (time.perf_counter() - start)


def rerun(work: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """录制的替身：不录、照常跑。没有卡时只为把录制的路走通。"""
    out = work()
    return (lambda: out.copy_(work())), out


def decode(card: Card, size: str) -> None:
    """录制（抽样在内）与不录制，贪心与按温度 1 抽；预热一遍，录制的取两遍里快的。"""
    model, found = half_model(card, size), {"recorded": {}, "plain": {}, "recorded_sampled": {}}
    modes = ("recorded", "plain") if card.on_cuda or card.quick else ("plain",)
    for rows, count in card.pick(ROWS, ((1, 4), (3, 4))):
        for mode in modes:
            engine = Engine(
                model,
                eos_ids=(),
                max_slots=rows,
                max_length=1024,
                stride=STRIDE,
                cuda_graphs=mode == "recorded",
            )
            if mode == "recorded" and not card.on_cuda:
                engine._graphs = GraphedDecode(engine.decoder, rows, rerun)
            if mode == "recorded" and engine._graphs is None:
                raise RuntimeError("这个模型录不了")
            write(card, engine, rows, count, True)
            repeats = card.pick(2 if mode == "recorded" else 1, 1)
            found[mode][str(rows)] = max(write(card, engine, rows, count, True) for _ in range(repeats))
            if mode == "recorded":
                write(card, engine, rows, count, False)  # 另一条规则，另录一遍
                found["recorded_sampled"][str(rows)] = write(card, engine, rows, count, False)
                check_recorded(engine._graphs, rows)
            card.note(**found, stride=engine.stride)
    if not found["recorded"]:
        card.note(status="做完（录制只在 CUDA 上，只测了不录制的）")


def check_recorded(graphs: GraphedDecode, rows: int) -> None:
    """测的真是录制的、抽样在内的。

    Raises:
        RuntimeError: 不是。
    """
    if graphs.trouble or not graphs.graphs or any(len(key) != 3 for key in graphs.graphs):
        raise RuntimeError(f"{rows} 条{graphs.trouble or '没有录成抽样在内的图'}")


def decode_small(card: Card) -> None:
    decode(card, "small")


def decode_base(card: Card) -> None:
    decode(card, "base")


def decode_moe(card: Card) -> None:
    decode(card, "moe")


def prompts(card: Card) -> None:
    """8 条 512 的提示一起读；只写一个词元，时间都在读上。另测接在缓存过的前缀之后读后一半。"""
    rows, length = card.pick((8, 512), (2, 16))
    model, generator = half_model(card, "small"), torch.Generator().manual_seed(1)
    engine = Engine(model, eos_ids=(), max_slots=rows, max_length=1024)
    vocab = model.config.vocab_size
    ids = [torch.randint(3, vocab, (length,), generator=generator).tolist() for _ in range(rows)]

    def read() -> None:
        for prompt in ids:
            engine.add_request(prompt, GREEDY, 1)
        while engine.has_unfinished:
            engine.step()

    card.note(tokens_per_second=rows * length / card.timed(read, 20, 3))
    slots, half = list(range(rows)), length // 2

    @torch.inference_mode()
    def continued() -> None:
        engine.decoder.prefill([prompt[half:] for prompt in ids], slots, [half] * rows)

    with torch.inference_mode():
        engine.decoder.prefill([prompt[:half] for prompt in ids], slots)
    card.note(after_prefix_tokens_per_second=rows * (length - half) / card.timed(continued, 20, 3))


def rollout(card: Card) -> None:
    """强化学习的采样：256 条，长短参差，权重每轮刷新；对 transformers 的 ``generate``，同一组权重、同样的长度。"""
    import bench_rl

    if card.seconds_left < 5:
        raise LeftOut("时间不够，没有做")
    args = bench_rl.RLBenchArguments(
        prompts=card.pick(32, 2),
        num_generations=card.pick(8, 2),
        max_new_tokens=card.pick(128, 8),
    )
    config = card.size("small")
    ours = half_model(card, "small")
    peer = bench_rl.cached_peer(config, card.device).to(next(ours.parameters()).dtype).eval()
    asked, lengths = bench_rl.sample_prompts(args, config.vocab_size), bench_rl.forced_lengths(args)
    makers = {
        "recorded": lambda forced: bench_rl.our_rollout(args, ours, asked, forced, True),
        "plain": lambda forced: bench_rl.our_rollout(args, ours, asked, forced),
        "generate": lambda forced: bench_rl.peer_rollout(args, peer, asked, forced),
    }
    if not card.on_cuda:
        del makers["recorded"]
    for kind, forced in (("", None), ("varying_", lengths)):
        rates: dict[str, float] = {}
        for name, make in makers.items():
            run = make(forced)
            tokens = run()
            rates[name] = tokens / card.timed(run, 2, 0)
            card.note(**{f"{kind}rates": rates})
        best = max(rates.get("recorded", 0.0), rates["plain"])
        card.note(**{f"{kind}tokens_per_second": best, f"{kind}ratio": best / rates["generate"]})
