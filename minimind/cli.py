"""``minimind <命令>``：一张命令表；选中哪个命令才导入哪个模块，所以 ``--help`` 不必等 torch。"""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import dataclass

from minimind import __version__, signals
from minimind.errors import UserError, guard


@dataclass(frozen=True)
class Command:
    """一个命令：``target`` 是 ``模块:函数``，函数收下其余命令行参数的列表，返回退出码或 None。"""

    target: str
    help: str
    group: str


COMMANDS = {
    "demo": Command("minimind.demo:main", "从零走完全程：十个阶段的训练与考试、成绩单、对话", "先试试"),
    "chat": Command("minimind.chat:main", "与训练好的模型对话（同 python eval_llm.py）", "先试试"),
    "selftest": Command(
        "minimind.selftest:main", "自检：这台机器算得对不对、多快，出一张表与一份 JSON", "先试试"
    ),
    "plan": Command(
        "minimind.plan:main", "这么多分钟能训练出什么：测速，给出尺寸、预期与命令，--go 接着跑", "先试试"
    ),
    "pretrain": Command("minimind.recipes.pretrain:main", "预训练", "训练"),
    "sft": Command("minimind.recipes.full_sft:main", "全参数监督微调", "训练"),
    "lora": Command("minimind.recipes.lora:main", "LoRA 微调：只训练低秩增量", "训练"),
    "dpo": Command("minimind.recipes.dpo:main", "直接偏好优化：更愿意说好的那个回答", "训练"),
    "reward": Command("minimind.recipes.reward:main", "奖励模型：由好坏成对的回答学会打分", "训练"),
    "distill": Command("minimind.recipes.distillation:main", "知识蒸馏：小模型跟着大模型学", "训练"),
    "reason": Command("minimind.recipes.reason:main", "推理微调：先想再答", "训练"),
    "ppo": Command("minimind.recipes.ppo:main", "强化学习：PPO，有价值网络", "训练"),
    "grpo": Command("minimind.recipes.grpo:main", "强化学习：GRPO，同题多答、组内比较", "训练"),
    "spo": Command("minimind.recipes.spo:main", "强化学习：SPO，单条采样、和自己的过去比", "训练"),
    "agent": Command("minimind.recipes.agent:main", "强化学习：几回合的对话，自己调用工具再作答", "训练"),
    "report": Command("minimind.report.training:main", "把训练日志画成曲线，写成报告", "训练"),
    "watch": Command(
        "minimind.watch.cli:main", "在浏览器里看训练：曲线、还要多久、样例，正在跑的与跑完的", "训练"
    ),
    "eval choice": Command("minimind.evaluate.choice:main", "选择题：C-Eval、CMMLU、AGIEval 的布局", "评测"),
    "eval gsm": Command("minimind.evaluate.gsm:main", "GSM8K 式的应用题，中英文", "评测"),
    "eval tools": Command("minimind.evaluate.tools_accuracy:main", "工具调用：格式、名字、参数", "评测"),
    "eval world": Command("minimind.evaluate.cli:main_world", "微世界的考题，分任务", "评测"),
    "eval bpb": Command("minimind.evaluate.cli:main_bpb", "一个文件的每字节比特数", "评测"),
    "tokenizer train": Command("minimind.tokenizer.train:main_train", "训练分词器", "分词器"),
    "tokenizer eval": Command("minimind.tokenizer.eval:main_eval", "比较分词器的压缩率", "分词器"),
    "data check": Command("minimind.dataset.check:main_check", "检查数据：条数、长度分布、坏行", "数据"),
    "data download": Command("minimind.dataset.download:main_download", "下载公开数据集，可断点续传", "数据"),
    "data convert": Command(
        "minimind.dataset.convert:main_convert", "别家的写法与文件（Alpaca、Parquet、gz……）→ jsonl", "数据"
    ),
    "data mix": Command("minimind.dataset.mix:main_mix", "按权重把几份数据配成一份，精确到条", "数据"),
    "data dedup": Command("minimind.dataset.dedup:main_dedup", "去掉完全重复与近似重复", "数据"),
    "data make-microworld": Command("minimind.microworld:main_make", "写出内置的微世界语料", "数据"),
    "serve": Command("minimind.serve.cli:main", "OpenAI 兼容的服务", "服务"),
    "export hf": Command(
        "minimind.export.cli:main_hf", "导出成 Hugging Face 目录：transformers、vLLM 直接读", "导出"
    ),
    "export gguf": Command("minimind.export.cli:main_gguf", "导出成 GGUF：llama.cpp、Ollama 直接跑", "导出"),
    "import": Command("minimind.export.cli:main_import", "收进 Hugging Face 目录或公共项目的 .pth", "导出"),
    "export lora": Command("minimind.export.lora:main_lora", "把 LoRA 写成 peft 的适配器目录", "导出"),
    "export merge": Command("minimind.export.lora:main_merge", "把 LoRA 合并进底座，写成普通权重", "导出"),
}

# 公共项目的叫法。它的 eval_llm.py 是对话，那个文件名照旧；minimind eval … 是评测
ALIASES = {"distillation": "distill", "full_sft": "sft", "full-sft": "sft"}


def help_text() -> str:
    """按组列出全部命令。"""
    lines = ["用法：minimind <命令> [参数]", "", "从空目录到能对话的小语言模型。", ""]
    group = None
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines.append(f"{group}：")
        lines.append(f"  {name:<22}{command.help}")
    lines += ["", "minimind <命令> --help 查看该命令的全部参数；minimind --version 显示版本。"]
    return "\n".join(lines)


def find_command(argv: list[str]) -> tuple[str, list[str]]:
    """从命令行认出命令名，返回 ``(命令名, 其余参数)``；先试两个词的命令，再试一个词的。

    Raises:
        UserError: 没有这个命令；附最接近的名字。
    """
    words = [word for word in argv[:2] if not word.startswith("-")]
    for size in (2, 1):
        name = " ".join(words[:size])
        name = ALIASES.get(name, name)
        if len(words) >= size and name in COMMANDS:
            return name, argv[size:]
    family = [name for name in COMMANDS if name.split()[0] == words[0]]
    if family:
        found = f"命令 {words[0]} 后面还要再写一个词" if len(words) == 1 else f"没有命令 {' '.join(words)}"
        fix = "用 minimind --help 查看全部命令"
        if words[0] == "eval" and len(argv) > 1:  # 公共项目的习惯：eval 是对话
            fix += "；要对话用 minimind chat 或 python eval_llm.py"
        raise UserError(found, expected="、".join(family), fix=fix)
    candidates = [*COMMANDS, *ALIASES]
    close = difflib.get_close_matches(" ".join(words), candidates, n=1, cutoff=0.5)
    close = close or difflib.get_close_matches(words[0], candidates, n=1, cutoff=0.5)
    raise UserError(
        f"没有命令 {words[0]}",
        fix=f"你要的也许是 minimind {close[0]}" if close else "用 minimind --help 查看全部命令",
    )


@guard
def main(argv: list[str] | None = None) -> int | None:
    """命令行总入口。"""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"minimind {__version__}")
        return 0
    if argv[0].startswith("-"):
        raise UserError(f"第一个词应当是命令，看到的是 {argv[0]}", fix="用 minimind --help 查看全部命令")
    name, rest = find_command(argv)
    module, function = COMMANDS[name].target.split(":")
    # 让各命令自己的 --help 与报错写出完整的命令名
    sys.argv[0] = f"minimind {name}"
    with signals.leaving_at_once():
        command = getattr(importlib.import_module(module), function)
    return command(rest)
