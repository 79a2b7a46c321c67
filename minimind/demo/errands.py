"""演示的第十段：差事。先微调出调用的样子，再几回合地走，只看最后答得对不对；说明见 docs/agent.md。"""

from __future__ import annotations

from minimind.demo.exam import of_level
from minimind.demo.road import Road
from minimind.evaluate.errands import share_by_task, solved, walk_errands
from minimind.evaluate.microworld import accuracy
from minimind.recipes import full_sft
from minimind.recipes.agent import AgentArguments
from minimind.recipes.agent import run as train_agent

# 与 benchmarks/stages/agent.py 三个种子测过的相同，只是步数少一半。机器慢也走满：样子没有微调出来，强化学习一道对的也采不到；
# 步数再少又看不出涨
TUNING = {"max_seq_len": 512, "batch_size": 4, "epochs": 1, "learning_rate": 2e-3}
LEARNING = {"num_generations": 8, "accumulation_steps": 1, "dynamic_sampling": 1, "learning_rate": 5e-4}
STEPS, PROMPTS = 10, 8


def tuning_arguments(road: Road) -> full_sft.SFTArguments:
    """与 ``minimind sft`` 是同一个 dataclass；下面的同理。"""
    names = {"from_weight": "full_sft", "save_weight": "agent_sft"}
    return full_sft.SFTArguments(**road.common(**TUNING, **names, eval_interval=0), **road.data("agent_sft"))


def agent_arguments(road: Road) -> AgentArguments:
    prompts, length = (1, 8) if road.args.fast else (PROMPTS, 48)
    common = road.common(
        **LEARNING,
        max_seq_len=480,
        from_weight="agent_sft",
        batch_size=prompts,
        epochs=1000,
        max_steps=min(STEPS, road.args.max_steps or STEPS),
        max_gen_len=length,
        max_turns=4,
        max_total_len=600,
        log_interval=2,
        eval_interval=5,
        val_max_rows=8 if road.args.fast else 60,
    )
    return AgentArguments(**common, **road.data("agent"))


def run_agent(road: Road) -> None:
    """什么时候用工具、用到哪一步，自己试出来。"""
    full_sft.run(tuning_arguments(road))
    arguments = agent_arguments(road)
    before, chat_before = examine(road, "agent_sft", arguments)
    result = train_agent(arguments)
    road.draw_curve("agent", "差事的曲线", result.log)
    after, chat_after = examine(road, "agent", arguments)
    needed = sum(row["calls"] > 0 for row in road.papers.errands)
    road.score(f"要用工具的题答对（留出 {needed} 题）", "agent: errands with tools", before, after)
    road.score("普通对话答对（没有工具）", "agent: dialogue", chat_before, chat_after)


def examine(road: Road, weight: str, arguments: AgentArguments) -> tuple[float, float]:
    """考差事与普通对话：``(要用工具的题答对, 普通对话答对)``。"""
    loaded = road.load(weight, dtype="float32")
    road.answers[weight], _ = walk_errands(loaded.model, loaded.tokenizer, road.papers.errands, arguments)
    chats = of_level(road.sit(f"{weight}_easy", loaded, road.papers.easy, "普通对话"), "easy")
    return solved(share_by_task(road.answers[weight])), accuracy(chats)
