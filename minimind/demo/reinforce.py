"""演示的第七到九段：PPO、GRPO、SPO。同样的起点、题目与采样条数，只靠答得对不对来学。"""

from __future__ import annotations

from minimind.demo.road import Road
from minimind.evaluate.microworld import accuracy
from minimind.rl.arguments import RLArguments
from minimind.trainer.loop import TrainResult

# 每步采样 16 题 × 8 条（PPO、SPO 是 128 题 × 1 条），三种算法相同
RL_STEPS, PROMPTS, GENERATIONS, MAX_LENGTH = 45, 16, 8, 64


def rl_common(road: Road, generations: int) -> dict:
    """三种算法共用的设置；``generations`` 是每题答几遍。"""
    prompts, length = (1, 8) if road.args.fast else (PROMPTS, MAX_LENGTH)
    return road.common(
        batch_size=prompts * GENERATIONS // generations,
        num_generations=generations,
        accumulation_steps=1,
        epochs=1000,
        max_steps=road.steps(RL_STEPS),
        max_gen_len=length,
        log_interval=5,
        eval_interval=15,
        **road.data("rl"),
    )


def ppo_arguments(road: Road) -> RLArguments:
    from minimind.recipes.ppo import PPOArguments

    # 走两轮多用六成时间；价值网络从头学，步子大些
    return PPOArguments(**rl_common(road, 1), ppo_epochs=1, critic_learning_rate=1e-3)


def grpo_arguments(road: Road) -> RLArguments:
    from minimind.recipes.grpo import GRPOArguments

    return GRPOArguments(**rl_common(road, GENERATIONS))


def spo_arguments(road: Road) -> RLArguments:
    from minimind.recipes.spo import SPOArguments

    return SPOArguments(**rl_common(road, 1))


def finish(road: Road, name: str, arguments: RLArguments, result: TrainResult) -> None:
    """画曲线、考多步题。"""
    road.rewards[name.upper()] = result.log, arguments.batch_size * arguments.num_generations
    road.draw_curve(name, f"{name.upper()} 曲线", result.log)
    road.draw_rewards()
    before = road.tuned("multistep")
    after = road.sit(name, road.load(arguments.save_weight), road.papers.multistep, "多步题")
    road.score(
        f"多步题答对（留出 {len(after)} 题）", f"{name}: multi-step", accuracy(before), accuracy(after)
    )


def run_ppo(road: Road) -> None:
    """价值网络估计写到一半大约能得几分，比它估计的好就多写。"""
    from minimind.recipes import ppo

    arguments = ppo_arguments(road)
    finish(road, "ppo", arguments, ppo.run(arguments))


def run_grpo(road: Road) -> None:
    """同一道题答八遍，比同组平均好的多写。"""
    from minimind.recipes import grpo

    arguments = grpo_arguments(road)
    finish(road, "grpo", arguments, grpo.run(arguments))


def run_spo(road: Road) -> None:
    """每题只答一遍，和它自己过去的成绩比。"""
    from minimind.recipes import spo

    arguments = spo_arguments(road)
    finish(road, "spo", arguments, spo.run(arguments))
