"""三个强化学习配方共用的参数。"""

from __future__ import annotations

from dataclasses import dataclass

from minimind.arguments import Arguments, arg, override
from minimind.errors import UserError
from minimind.model_arguments import ON_OFF
from minimind.ranges import URL
from minimind.trainer.train_args import MAX_LENGTH, TrainArguments


@dataclass
class RolloutArguments(Arguments, group="采样"):
    """怎么采样。"""

    max_gen_len: int = arg(128, "回答最多多少个 token", low=1, high=MAX_LENGTH)
    num_generations: int = arg(8, "每个提示采样几条回答", low=1, high=1024)
    temperature: float = arg(
        1.0, "采样温度；损失里的 logits 也除以它（贪心没有随机性，策略梯度无从估计）", above=0, high=100
    )
    reasoning: int = arg(0, "是否先想再答（1：从 reason 权重开始，提示里开着思考，奖励含格式分）", ON_OFF)
    rollout_url: str | None = arg(
        None,
        "用 OpenAI 兼容的服务（vLLM、SGLang、本项目的）采样，例如 http://127.0.0.1:8000，密钥放在环境变量 ROLLOUT_API_KEY；不给则在本进程里采样",
        pattern=URL,
        resume="noted",
    )
    rollout_kind: str = arg(
        "auto",
        "采样服务的种类：vllm（含其他照做的 OpenAI 兼容服务）、sglang",
        ("auto", "vllm", "sglang"),
        resume="harmless",
    )
    rollout_weights_dir: str | None = arg(
        None,
        "每步把权重写到哪个目录让采样服务重读，两边都要看得见；不给则问服务",
        text="path",
        resume="harmless",
    )
    rollout_slots: int = arg(
        64, "本进程里采样时同时写多少条（省内存用，不影响结果的分布）", low=1, high=65536, resume="rounding"
    )
    rows_per_forward: int = arg(
        16, "训练时一次前向放多少条回答（省内存用，不影响结果）", low=1, high=65536, resume="rounding"
    )


@dataclass
class RewardArguments(Arguments, group="奖励"):
    """怎么打分。"""

    reward: str | None = arg(
        None,
        "奖励，例如 auto、exact:1,format:0.5、文件.py:函数；不给则用可验证的规则，有奖励模型就用它",
        text="paths",
        resume="content",
    )
    reward_model_path: str | None = arg(
        None,
        "奖励模型：minimind reward 写出的 .pth，或目录（HF 序列分类模型、带 get_score 的模型）",
        text="path",
        resume="content",
    )
    trust_remote_code: int = arg(0, "允许执行奖励模型目录里自带的代码", ON_OFF, resume="harmless")


@dataclass
class RLArguments(RolloutArguments, RewardArguments, TrainArguments):
    """强化学习的共用参数：一步采样 batch_size × accumulation_steps × 进程数 个提示，每个答 num_generations 次。"""

    from_weight: str | None = override(  # type: ignore[assignment]
        TrainArguments,
        "from_weight",
        None,
        help="从哪个权重开始（名字）；不给则 full_sft，--reasoning 1 时 reason",
    )
    batch_size: int = override(TrainArguments, "batch_size", 2, help="每个进程每个微批次的提示数")
    max_seq_len: int = override(TrainArguments, "max_seq_len", 512, help="提示的长度上限，更长的丢弃并计数")
    # 微调的一成多：步子再大，采样很快只剩一种写法（tiny 上每步 128 条，3e-4 比 1e-3 多涨一倍多）
    LEARNING_RATE_TIMES_WIDTH = 0.06
    weight_decay: float = override(TrainArguments, "weight_decay", 0.0)
    embed_lr_scale: float = override(TrainArguments, "embed_lr_scale", 1.0)
    log_interval: int = override(TrainArguments, "log_interval", 5)
    save_interval: int = override(TrainArguments, "save_interval", 50)
    eval_interval: int = override(TrainArguments, "eval_interval", 50)

    def trained_length(self, before: int | None) -> int:
        """``max_seq_len`` 只是提示的上限，多半到不了；起点见过多长就是多长。"""
        return before or self.max_seq_len

    def __post_init__(self):
        super().__post_init__()
        if self.from_weight is None:
            self.from_weight = "reason" if self.reasoning else "full_sft"
        if self.max_seq_len + self.max_gen_len > MAX_LENGTH:
            raise UserError(
                f"合起来是 {self.max_seq_len + self.max_gen_len}",
                where=f"--max_seq_len {self.max_seq_len} 与 --max_gen_len {self.max_gen_len}",
                expected=f"不超过模型的位置上限 {MAX_LENGTH}",
                fix="减小其中一个",
            )
