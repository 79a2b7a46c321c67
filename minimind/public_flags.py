"""公共项目的参数叫法：换个名字就是本项目的、要换算的、这里没有的，全在这一份表里。

每个都照它的意思收下，或用一句话说改用什么；没有收下而不起作用的。名字与本项目相同的不在这里。
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from minimind.errors import UserError

Values = Mapping[str, Any]
# 公共项目的 --sglang_base_url 不写就是它
SGLANG_URL = "http://localhost:8998"


@dataclass(frozen=True)
class PublicFlag:
    """公共项目的一个参数。

    Args:
        like: 与本项目的哪个参数同类型、同范围；没有 ``means`` 时就是它。命令有这个参数才收。
        means: ``(值, 别的参数的值) -> 改哪几个``。
        choices: 取值与 ``like`` 不同时写在这里。
        shown: 说明里写它等于什么。
        on: 命令另要有这个参数才收。
    """

    like: str
    means: Callable[[Any, Values], dict[str, Any]] | None = None
    choices: tuple[str, ...] | None = None
    shown: str = ""
    on: str | None = None


def _minibatches(size: int, values: Values) -> dict[str, Any]:
    """每个小批几条 → 分成几个小批，一份至多 ``size`` 条。"""
    rollouts = values["batch_size"] * values["accumulation_steps"] * values["num_generations"]
    return {"minibatches": -(-rollouts // size)}


def _engine(name: str, values: Values) -> dict[str, Any]:
    url, kind = values["rollout_url"], values["rollout_kind"]
    if name == "torch" and url:
        raise UserError(
            f"torch 是在本进程里采样，却又给了采样服务的网址 {url}",
            where="--rollout_engine torch",
            fix="去掉其中一个",
        )
    if name == "sglang" and kind == "vllm":
        raise UserError(
            "与 --rollout_kind vllm 说的不一样", where="--rollout_engine sglang", fix="去掉其中一个"
        )
    return {} if name == "torch" else {"rollout_kind": "sglang", "rollout_url": url or SGLANG_URL}


# 次序要紧：换算时看别的参数的，排在那些之后
ACCEPTED: dict[str, PublicFlag] = {
    "cliprange_value": PublicFlag("value_clip"),
    "ppo_update_iters": PublicFlag("ppo_epochs"),
    "early_stop_kl": PublicFlag("target_kl"),
    "mini_batch_size": PublicFlag(
        "batch_size",
        _minibatches,
        shown="每个小批几条：--minibatches 是一步采样的条数除以它",
        on="minibatches",
    ),
    "sglang_base_url": PublicFlag(
        "rollout_url",
        lambda url, _: {"rollout_url": url, "rollout_kind": "sglang"},
        shown="就是 --rollout_url，种类是 sglang",
    ),
    "sglang_shared_path": PublicFlag("rollout_weights_dir"),
    "rollout_engine": PublicFlag(
        "rollout_kind", _engine, ("torch", "sglang"), shown="torch 在本进程里采样，sglang 同 --rollout_kind"
    ),
    "max_seq_len": PublicFlag("max_length", on="max_queue"),
}

_RL, _PPO, _TRAIN, _EVAL = "num_generations", "ppo_epochs", "accumulation_steps", "limit"
_WATCH = (
    "回答的奖励、长度、写不完的比例每 --log_interval 步打印一行；回答本身训练后用 minimind chat 看；去掉它"
)
_LOCAL = "评测只考本机的权重（--weight 或 --load_from）；去掉它"
_GREEDY = "评测一律贪心作答，结果才可重复；去掉它"
# 名字 → （有哪个参数的命令才是说的这个，改用什么）
REFUSED: dict[str, tuple[str, str]] = {
    "thinking_ratio": (_RL, "改用 --reasoning 1（每题都先想再答）或 0（都不想）；不能按比例混着"),
    "debug_mode": (_RL, _WATCH),
    "debug_interval": (_RL, _WATCH),
    "debug_log_ratio": (_PPO, "日志里的 approx_kl 与 clip_share 说的就是策略离采样时多远；去掉它"),
    "sglang_model_path": (_RL, "采样与训练用同一个分词器，由 --tokenizer_path 决定；去掉它"),
    "update_old_actor_freq": (_PPO, "采样时的策略每步都是最新的，它的对数概率随采样记下；去掉它"),
    "ddp": (_TRAIN, "用 torchrun --nproc_per_node 卡数 启动就是多卡；去掉它"),
    "local_rank": (_TRAIN, "由 torchrun 的环境变量给出；去掉它"),
    "warmup_iters": (_TRAIN, "改用 --warmup_ratio，预热占总步数的比例"),
    "wandb_api_key": (_TRAIN, "密钥会随参数记进日志；放进环境变量 WANDB_API_KEY 或 SWANLAB_API_KEY"),
    "backend": (_EVAL, _LOCAL),
    "api_base_url": (_EVAL, _LOCAL),
    "api_key": (_EVAL, _LOCAL),
    "api_model": (_EVAL, _LOCAL),
    "temperature": (_EVAL, _GREEDY),
    "top_p": (_EVAL, _GREEDY),
    "stream": (_EVAL, "评测不显示逐词的回答，要看加 --save_items 1；去掉它"),
    "show_speed": (_EVAL, "评测结束时总会写出用时；去掉它"),
}


def accepted(fields: Collection[str]) -> dict[str, PublicFlag]:
    """有这些参数的命令另外收哪些名字。"""
    return {
        name: flag
        for name, flag in ACCEPTED.items()
        if name not in fields and flag.like in fields and (flag.on is None or flag.on in fields)
    }


def refusal(name: str, fields: Collection[str]) -> str | None:
    """这个命令不收 ``name`` 时改用什么；不是公共项目的叫法是 ``None``。"""
    on, sentence = REFUSED.get(name.replace("-", "_"), (None, None))
    return sentence if on in fields else None


def summary(fields: Collection[str]) -> str:
    """写在说明末尾的几行；没有可说的是空的。"""
    lines = [
        f"  --{name:<20}  {flag.shown or f'就是 --{flag.like}'}" for name, flag in accepted(fields).items()
    ]
    return "\n".join(["公共项目的叫法也收：", *lines]) if lines else ""


def translate(given: Values, values: dict[str, Any], defaults: Values) -> dict[str, Any]:
    """把写了的公共叫法换成本项目的参数。

    Args:
        given: 公共叫法 → 值。
        values: 本项目的各参数读出的值。
        defaults: 它们的默认值，用来看有没有两边都写。

    Raises:
        UserError: 两边都写了而说的不一样。
    """
    for name, flag in ACCEPTED.items():
        if name not in given:
            continue
        means = flag.means or (lambda value, _, like=flag.like: {like: value})
        for target, value in means(given[name], values).items():
            if values[target] not in (defaults[target], value):
                raise UserError(
                    f"与 --{target} {values[target]} 说的不一样",
                    where=f"--{name} {given[name]}",
                    fix="两个是一回事，只写一个",
                )
            values = {**values, target: value}
    return values
