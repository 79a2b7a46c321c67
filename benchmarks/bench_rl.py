"""强化学习的速度：采样词元/秒对 transformers 的 ``generate``，GRPO 一整步的秒数对 TRL 的 ``GRPOTrainer``。

一条命令::

    python benchmarks/bench_rl.py                  # tiny 与 small，CPU 约十分钟
    python benchmarks/bench_rl.py --sizes tiny --trl 0

两边同一组权重（随机初始化，稠密 v2 就是 Llama）、同样的提示、同一台机器、同一个进程里轮流测：

- 采样：``prompts`` 个提示各答 ``num_generations`` 次，每条至多 ``max_new_tokens`` 个。等长（结束符不起作用）与
  四倍参差（各条长度均匀取自四分之一到全长，两边强制同样的长度）各测一遍。``generate`` 不给对数概率，
  本项目顺带给出，没有另算它的便宜；
- 整步：采样、打分、前向反向、AdamW，每步一次更新，β = 0。以相邻两次打分之间的时间为一步。
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import alternate, clock_for, median, print_table, write_result
from train_peers import build_ours, build_peer
from transformers import StoppingCriteria, StoppingCriteriaList

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.errors import guard
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.microworld import ensure_microworld
from minimind.model import count_parameters, preset
from minimind.paths import resolve_path
from minimind.runtime.device import resolve_device, synchronize
from minimind.tokenizer import load_tokenizer

# 训练里的学习率与速度无关，两边取同一个小值，权重几乎不动，步步一样长
LEARNING_RATE = 1e-6


@dataclass
class RLBenchArguments:
    """采样与 GRPO 整步的速度，对照 transformers 与 TRL。"""

    sizes: str = arg("tiny,small", "模型尺寸，逗号分隔")
    prompts: int = arg(8, "几个不同的提示")
    num_generations: int = arg(8, "每个提示答几次")
    prompt_length: int = arg(48, "采样时最长的提示；各提示长度均匀取自三分之一到它")
    max_new_tokens: int = arg(64, "回答至多多少个词元")
    repeats: int = arg(5, "采样轮流测几次，取中位数")
    grpo_steps: int = arg(4, "整步测几步（另有一步预热），取中位数；0 表示不测")
    trl: int = arg(1, "整步是否与 TRL 对照（要装 trl）", (0, 1))
    device: str = arg("auto", "设备")
    dtype: str = arg("float32", "整步的计算精度，两边相同", ("float32", "bfloat16"))
    run_dir: str = arg("out/bench_rl", "训练产生的文件放在哪里")
    name: str = arg("", "结果文件名的后缀")


# ---------------------------------------------------------------- 采样


class StopAt:
    """引擎一侧强制长度：写够就停。"""

    def __init__(self, length: int):
        self.left = length

    def adjust(self, logits: torch.Tensor) -> None:
        """不改分布。"""

    def accept(self, token: int) -> bool:
        self.left -= 1
        return self.left == 0


class ForcedLengths(StoppingCriteria):
    """``generate`` 一侧强制长度：每行写够就算完。"""

    def __init__(self, prompt_width: int, lengths: torch.Tensor):
        self.prompt_width, self.lengths = prompt_width, lengths

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] - self.prompt_width >= self.lengths


def sample_prompts(args: RLBenchArguments, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(args.prompt_length / 3, args.prompt_length, args.prompts).round().int().tolist()
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def forced_lengths(args: RLBenchArguments) -> list[int]:
    """四倍参差的长度，每条一个。"""
    generator = torch.Generator().manual_seed(1)
    count = args.prompts * args.num_generations
    low = max(1, args.max_new_tokens // 4)
    return torch.randint(low, args.max_new_tokens + 1, (count,), generator=generator).tolist()


def our_rollout(
    args: RLBenchArguments,
    model: Any,
    prompts: list[list[int]],
    lengths: list[int] | None,
    recorded: bool = False,
) -> Callable[[], int]:
    """返回「采样一轮，给出词元数」。每轮都刷新权重，与训练里一样；``recorded`` 在卡上录制一步。"""
    engine = Engine(
        model, eos_ids=(), max_slots=args.prompts * args.num_generations, stride=8, cuda_graphs=recorded
    )

    def run() -> int:
        engine.refresh()
        left = iter(lengths or [])
        hook = (lambda: StopAt(next(left))) if lengths else None
        for seed, prompt in enumerate(prompts):
            params = SamplingParams(temperature=1.0, seed=seed)
            engine.add_request(prompt, params, args.max_new_tokens, n=args.num_generations, hook=hook)
        total = 0
        while engine.has_unfinished:
            total += sum(len(sequence.ids) for sequence in engine.step())
        return total

    return run


def peer_rollout(
    args: RLBenchArguments, model: Any, prompts: list[list[int]], lengths: list[int] | None
) -> Callable[[], int]:
    """同样的事交给 ``generate``：左填充，纯温度抽样。"""
    device = model.device
    rows = [prompt for prompt in prompts for _ in range(args.num_generations)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    options: dict[str, Any] = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    if lengths:
        stop = ForcedLengths(width, torch.tensor(lengths, device=device))
        options["stopping_criteria"] = StoppingCriteriaList([stop])

    def run() -> int:
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=args.max_new_tokens, **options
        )
        written = out.shape[1] - width
        return sum(lengths) if lengths else written * len(rows)

    return run


def cached_peer(config: Any, device: torch.device) -> Any:
    """对照的模型，开着 KV 缓存（训练基准里它是关的）。"""
    peer = build_peer(config, device)
    peer.config.use_cache = peer.generation_config.use_cache = True
    return peer


def measure_rollout(args: RLBenchArguments, size: str, device: torch.device) -> dict[str, Any]:
    config = preset(size)
    ours, peer = build_ours(config, device).eval(), cached_peer(config, device).eval()
    prompts = sample_prompts(args, config.vocab_size)
    result: dict[str, Any] = {}
    for kind, lengths in (("equal", None), ("varying", forced_lengths(args))):
        makers = {"ours": our_rollout(args, ours, prompts, lengths)}
        makers["generate"] = peer_rollout(args, peer, prompts, lengths)
        tokens = {name: run() for name, run in makers.items()}
        if tokens["ours"] != tokens["generate"]:
            raise RuntimeError(f"两边写的词元数不同：{tokens}")
        times = alternate(makers, args.repeats, lambda: synchronize(device), clock_for(device))
        rates = {name: [tokens[name] / second for second in seconds] for name, seconds in times.items()}
        result[kind] = {
            name: {"tokens_per_second": median(rate), "min": min(rate), "max": max(rate)}
            for name, rate in rates.items()
        }
        result[kind]["tokens"] = tokens["ours"]
        result[kind]["ratio"] = median(rates["ours"]) / median(rates["generate"])
    return result


# ---------------------------------------------------------------- 整步


class Stamps:
    """打分的时刻；分数只看文字，两边同一个函数。"""

    def __init__(self, device: torch.device):
        self.device, self.clock, self.times = device, clock_for(device), []

    def score(self, texts: list[str]) -> list[float]:
        synchronize(self.device)
        self.times.append(self.clock())
        return [(len(text) % 7) / 6 for text in texts]

    def steps(self) -> list[float]:
        """去掉预热的那一步。"""
        return [b - a for a, b in zip(self.times, self.times[1:])][1:]


def our_steps(args: RLBenchArguments, size: str, device: torch.device, data: Path) -> list[float]:
    """真的运行 GRPO 配方，只把奖励换成记时的那一个。"""
    from minimind.recipes import grpo, rl
    from minimind.rl.rewards import RewardResult

    stamps = Stamps(device)

    class TimedRewards:
        weights, bounds, identity = {"timed": 1.0}, (0.0, 1.0), "timed"

        def __call__(self, samples: Any) -> RewardResult:
            total = torch.tensor(stamps.score([sample.response for sample in samples]))
            return RewardResult(total, {"timed": total})

        def describe(self) -> str:
            return "奖励：只为记时。"

    original, rl.build_rewards = rl.build_rewards, lambda *a, **k: TimedRewards()
    try:
        grpo.run(
            grpo.GRPOArguments(
                preset=size,
                from_weight="none",
                data_path=str(data),
                val_ratio=0.0,
                device=str(device),
                dtype=args.dtype,
                batch_size=args.prompts,
                accumulation_steps=1,
                num_generations=args.num_generations,
                max_gen_len=args.max_new_tokens,
                rows_per_forward=args.prompts * args.num_generations,
                optimizer="adamw",
                learning_rate=LEARNING_RATE,
                max_steps=args.grpo_steps + 2,
                save_interval=0,
                save_dir=args.run_dir,
                checkpoint_dir=args.run_dir,
                num_workers=0,
            )
        )
    finally:
        rl.build_rewards = original
    return stamps.steps()


def trl_steps(args: RLBenchArguments, size: str, device: torch.device, data: Path) -> list[float]:
    """TRL 的 GRPOTrainer：同样的提示、回答数、长度、优化器，全部装进一个微批。"""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line)["conversations"] for line in data.read_text(encoding="utf-8").splitlines()[:400]]
    dataset = Dataset.from_list([{"prompt": turns[:-1]} for turns in rows])
    stamps = Stamps(device)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return stamps.score([turns[0]["content"] for turns in completions])

    config = GRPOConfig(
        output_dir=str(resolve_path(args.run_dir) / "trl"),
        per_device_train_batch_size=args.prompts * args.num_generations,
        num_generations=args.num_generations,
        gradient_accumulation_steps=1,
        max_completion_length=args.max_new_tokens,
        max_steps=args.grpo_steps + 2,
        learning_rate=LEARNING_RATE,
        temperature=1.0,
        beta=0.0,
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        logging_steps=10_000,
        disable_tqdm=True,
    )
    model = cached_peer(preset(size), device)
    GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=dataset,
        processing_class=load_tokenizer(),
    ).train()
    return stamps.steps()


def measure_steps(args: RLBenchArguments, size: str, device: torch.device) -> dict[str, Any]:
    data = ensure_microworld() / "rl.jsonl"
    runs = {"ours": our_steps(args, size, device, data)}
    if args.trl:
        runs["trl"] = trl_steps(args, size, device, data)
        runs["ours"] += our_steps(args, size, device, data)  # 前后各测一遍，机器的忙闲两边摊
    result: dict[str, Any] = {
        name: {"seconds": median(times), "min": min(times), "max": max(times)} for name, times in runs.items()
    }
    if args.trl:
        result["ratio"] = result["trl"]["seconds"] / result["ours"]["seconds"]
    return result


# ---------------------------------------------------------------- 汇总


def report(results: dict[str, Any], clock: str) -> None:
    rows = []
    for size, result in results.items():
        for kind, title in (("equal", "等长"), ("varying", "四倍参差")):
            part = result["rollout"][kind]
            ours, peer = (part[name]["tokens_per_second"] for name in ("ours", "generate"))
            rows.append(
                (f"{size} 采样，{title}", f"{ours:,.0f} 词元/秒", f"{peer:,.0f}", f"{part['ratio']:.2f}×")
            )
        if "grpo_step" in result:
            step = result["grpo_step"]
            peer = f"{step['trl']['seconds']:.2f}" if "trl" in step else "没测"
            ratio = f"{step['ratio']:.2f}×" if "trl" in step else ""
            rows.append((f"{size} GRPO 一步", f"{step['ours']['seconds']:.2f} 秒", peer, ratio))
    print_table("强化学习的速度", ("", "本项目", "transformers / TRL", "倍数"), rows, clock)


@guard
def main(argv: list[str] | None = None) -> int:
    """命令行入口。"""
    args = parse_args(RLBenchArguments, argv)
    device = resolve_device(args.device)
    clock = "处理器时间（单线程）" if clock_for(device) is time.process_time else "墙钟"
    results: dict[str, Any] = {}
    for size in args.sizes.split(","):
        say(f"{size}：采样……")
        results[size] = {
            "parameters": count_parameters(build_ours(preset(size), torch.device("cpu"))),
            "rollout": measure_rollout(args, size, device),
        }
        if args.grpo_steps:
            say(f"{size}：GRPO 整步……")
            results[size]["grpo_step"] = measure_steps(args, size, device)
    report(results, clock)
    name = f"rl-{args.name}" if args.name else "rl"
    path = write_result(name, device, {"arguments": asdict(args), "clock": clock, "sizes": results})
    say(f"结果写在 {path}。")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
