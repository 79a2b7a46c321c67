"""演示的第三到六段：LoRA、DPO、蒸馏、推理。都从微调的权重开始，各改一样本事，再看别的忘了没有。"""

from __future__ import annotations

from pathlib import Path

from minimind.demo.exam import of_level, polite_share, well_formed_share
from minimind.demo.road import Road
from minimind.evaluate.microworld import Answered, accuracy
from minimind.paths import resolve_path
from minimind.recipes import distillation, dpo, full_sft, lora, pretrain, reason

# 与 benchmarks/stages 里三个种子测过的设置相同
LORA = {"batch_size": 4, "epochs": 4}
DPO = {"batch_size": 16, "learning_rate": 1.8e-4, "embed_lr_scale": 0.5, "sft_coef": 1.0}
REASON_STEPS = 200
# 学生的宽与层：参数是 tiny 的四分之一多；先预训练不多的几步，再有无教师各学一遍
STUDENT = {"hidden_size": 96, "num_hidden_layers": 4}
STUDENT_PRETRAIN = {"max_steps": 300, "learning_rate": 1e-2, "schedule": "wsd", "decay_ratio": 0.7}
# 数据少、要反复看时教师才帮得上：一万段对话只过一遍，有无教师差不多
DIALOGUES = 1000
STUDENT_PLAN = {"epochs": 6, "learning_rate": 3e-3}
DISTILL = {"alpha": 0.2, "temperature": 1.0}


def easy(results: list[Answered], skip: tuple[str, ...] = ()) -> list[Answered]:
    """简单题的回答，去掉 ``skip`` 里的任务。"""
    return [answered for answered in of_level(results, "easy") if answered.item["task"] not in skip]


def lora_arguments(road: Road) -> lora.LoRAArguments:
    """与 ``minimind lora`` 是同一个 dataclass；以下各段同理。"""
    return lora.LoRAArguments(**road.common(**LORA), **road.data("lora_identity"))


def run_lora(road: Road) -> None:
    """换一个身份，只存几十分之一大的增量。"""
    before = road.sit("full_sft_identity", road.load("full_sft"), road.papers.identity, "换身份之前")
    result = lora.run(lora_arguments(road))
    road.draw_curve("lora", "LoRA 曲线", result.log)
    model = road.load("full_sft", lora_weight="lora_identity")
    after = road.sit("lora_identity", model, road.papers.identity, "新身份")
    road.score(f"新身份答对（留出 {len(after)} 题）", "lora: new identity", accuracy(before), accuracy(after))
    # 旧身份的题自然答不对了，不算“忘了”
    rest = easy(road.sit("lora_easy", model, road.papers.easy, "别的忘了没有"), skip=("identity",))
    road.score(
        "别的对话答对",
        "lora: other dialogue",
        accuracy(easy(road.tuned("chats"), skip=("identity",))),
        accuracy(rest),
    )


def dpo_arguments(road: Road) -> dpo.DPOArguments:
    return dpo.DPOArguments(**road.common(**DPO), **road.data("dpo"))


def run_dpo(road: Road) -> None:
    """客气而简短，胜过不耐烦与平常。"""
    result = dpo.run(dpo_arguments(road))
    road.draw_curve("dpo", "DPO 曲线", result.log)
    before, after = (
        easy(road.tuned("chats")),
        road.sit("dpo", road.load("dpo"), road.papers.easy, "答得客气吗"),
    )
    road.score("分得清好坏（留出的偏好对）", "dpo: preference accuracy", None, result.metrics["val_accuracy"])
    road.score("开口客气的回答", "dpo: polite answers", polite_share(before), polite_share(after))
    road.score("对话答对", "dpo: dialogue", accuracy(before), accuracy(after))


def student_plan(road: Road) -> dict[str, float]:
    """学生学几轮，步子多大；两边共用。"""
    return {**STUDENT_PLAN, "epochs": max(1, round(STUDENT_PLAN["epochs"] * road.pace))}


def student_start(road: Road) -> pretrain.PretrainArguments:
    """学生自己的预训练，两边共用。"""
    plan = {**STUDENT_PRETRAIN, "max_steps": road.steps(STUDENT_PRETRAIN["max_steps"])}
    common = road.common(preset=None, **STUDENT, **plan, epochs=100, save_weight="student_pretrain")
    return pretrain.PretrainArguments(**common, **road.data("pretrain"))


def few_dialogues(road: Road) -> dict[str, str]:
    """学生的数据：微调语料的前 :data:`DIALOGUES` 段；留出部分不变。"""
    paths = road.data("sft")
    lines = Path(paths["data_path"]).read_text(encoding="utf-8").splitlines(keepends=True)
    few = resolve_path(road.args.out_dir) / "student_sft.jsonl"
    few.write_text("".join(lines[:DIALOGUES]), encoding="utf-8")
    return {**paths, "data_path": str(few)}


def student_arguments(road: Road) -> full_sft.SFTArguments:
    """没有教师的学生：同样的起点、数据、次序、步数与学习率，只有交叉熵。"""
    start = {"from_weight": "student_pretrain", "save_weight": "student"}
    common = road.common(preset=None, **STUDENT, **student_plan(road), **start)
    return full_sft.SFTArguments(**common, **few_dialogues(road))


def distill_arguments(road: Road) -> distillation.DistillationArguments:
    size = {
        "student_hidden_size": STUDENT["hidden_size"],
        "student_num_layers": STUDENT["num_hidden_layers"],
        "from_student_weight": "student_pretrain",
    }
    common = road.common(preset=None, **size, **student_plan(road), **DISTILL)
    return distillation.DistillationArguments(**common, **few_dialogues(road))


def run_distill(road: Road) -> None:
    """四分之一大的学生：自己学，与跟着教师学，训练量相同。

    不考答对：这么短的训练，学生只答对一成多，有无教师的差在种子的起伏之内（docs/log.md）；交叉熵的差每个种子都看得见。
    """
    pretrain.run(student_start(road))
    alone, taught = full_sft.run(student_arguments(road)), distillation.run(distill_arguments(road))
    road.draw_curve(
        "distill", "蒸馏曲线：没有教师与有教师", alone.log, taught.log, legend=("没有教师", "有教师")
    )
    road.score(
        "留出对话的交叉熵（没有教师 → 有，越低越好）",
        "distill: cross-entropy",
        alone.metrics["val_loss"],
        taught.metrics["val_ce"],
        kind="number",
        higher_is_better=False,
    )


def reason_arguments(road: Road, data: str) -> reason.ReasonArguments:
    plan = {"epochs": 100, "max_steps": road.steps(REASON_STEPS), "save_weight": data}
    return reason.ReasonArguments(**road.common(**plan), **road.data(data))


def run_reason(road: Road) -> None:
    """先想再答，与同样训练量下只报答案的对照。"""
    results = {}
    logs = []
    for data in ("reason_direct", "reason"):
        logs.append(reason.run(reason_arguments(road, data)).log)
        results[data] = road.sit(data, road.load(data), road.papers.multistep, "多步题")
    road.draw_curve("reason", "推理曲线：只报答案与先想再答", *logs, legend=("只报答案", "先想再答"))
    direct, thought = results["reason_direct"], results["reason"]
    road.score(
        f"多步题答对（留出 {len(thought)} 题）",
        "reason: multi-step",
        accuracy(road.tuned("multistep")),
        accuracy(thought),
    )
    road.score(
        "训练量相同（只报答案 → 先想再答）",
        "reason: direct, with thinking",
        accuracy(direct),
        accuracy(thought),
    )
    road.score("标签完整、自己停下", "reason: well-formed", None, well_formed_share(thought))
