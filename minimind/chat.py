"""命令行对话：``python eval_llm.py`` 与 ``minimind chat`` 的正文。

自动测试念一遍固定的问题；手动输入可以多轮；管道、重定向送来的，一行一问。预训练权重只会续写，所以换一套开头给它接。
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minimind.arguments import Arguments, arg, parse_args
from minimind.errors import UserError, guard
from minimind.inference.arguments import DraftArguments
from minimind.inference.prompts import CHAT_PROMPTS, PLAIN_PROMPTS
from minimind.ranges import MANY

TOOL_PROMPTS = (
    "用计算器算 347*28。",
    "北京现在几点？",
    "3 斤是多少千克？",
    "查一下“梯度”是什么意思。",
    "你是谁？",
)


@dataclass
class SamplingArguments(Arguments, group="采样"):
    """怎么抽下一个词元。"""

    max_new_tokens: int = arg(8192, "回答最多多少个 token", low=1, high=MANY)
    temperature: float = arg(0.85, "采样温度，越大越随机；0 表示每步取概率最大的", low=0, high=100)
    top_p: float = arg(0.85, "只在累计概率达到它的最小集合里抽；1 表示不限", above=0, high=1)
    top_k: int = arg(0, "只在概率最大的 k 个里抽；0 表示不限", low=0, high=MANY)
    min_p: float = arg(0.0, "丢掉概率低于最大者这么多倍的；0 表示不限", low=0, below=1)
    repetition_penalty: float = arg(1.0, "大于 1 时压低已出现过的 token；1 表示不罚", above=0, high=100)
    seed: int | None = arg(None, "随机种子；不给则每次不同", low=0, high=2**63 - 1)


@dataclass
class ChatArguments(SamplingArguments, DraftArguments, group="对话"):
    """与训练好的模型对话。"""

    historys: int = arg(0, "携带最近多少条历史消息，一问一答是两条；0 表示每次重新开始", low=0, high=MANY)
    open_thinking: int | None = arg(None, "思考开关：1 先想再答，0 直接答；不给则由模型决定", (0, 1))
    tools: int = arg(0, "给模型几样安全的工具（计算器、时钟、单位换算、词典）并替它执行", (0, 1))
    tool_names: str = arg(
        "all",
        "给哪几样：calculator、get_time、convert_unit、look_up，逗号分隔；all 是全部",
        text="filled",
    )
    tool_rounds: int = arg(4, "一问里最多执行几轮工具", low=1, high=1000)
    show_speed: int = arg(1, "每次回答后显示速度", (0, 1))
    mode: str | None = arg(
        None,
        "auto 自动测试，manual 手动输入；不给则启动后询问，输入来自管道或文件时一行一问"
        "（printf '你好\\n再见\\n' | minimind chat；头一行是 0 或 1 的当作回答询问）",
        ("auto", "manual"),
    )
    prompt: str | None = arg(None, "只问这一句，答完退出", text="filled")


def say_out(text: str) -> None:
    """对话内容走 stdout，立即显示。"""
    print(text, end="", flush=True)


def ask_mode() -> str:
    """启动菜单；输入流结束按自动测试处理。"""
    while True:
        try:
            choice = input("[0] 自动测试\n[1] 手动输入\n").strip()
        except EOFError:
            return "auto"
        if choice in ("0", "1"):
            return "manual" if choice == "1" else "auto"
        say_out(f"请输入 0 或 1（看到的是 {choice!r}）。\n")


def typed_prompts() -> Iterator[str]:
    """逐行读入，空行或输入流结束为止。"""
    while True:
        try:
            line = input("你：")
        except EOFError:
            say_out("\n")
            return
        except UnicodeDecodeError:
            say_out("\n这一行不是合法的 UTF-8，已略过。\n")
            continue
        if not line.strip():
            return
        yield line


def is_piped() -> bool:
    """问题由管道或文件送来，不是有人在终端里打。"""
    # 关掉的标准输入是空的一份；没有 buffer 的是替身，按终端的规矩逐行问
    return sys.stdin is None or (hasattr(sys.stdin, "buffer") and not sys.stdin.isatty())


def piped_prompts(at: dict[str, int]) -> Iterator[str]:
    """管道里的问题，一行一问，来一行答一行；空行略过，开头的 BOM 与行尾的回车不算。

    Args:
        at: 读到第几行记在 ``at["line"]``，报错时说得出。

    Raises:
        UserError: 有一行不是 UTF-8；前面的已经答过。
    """
    for number, raw in enumerate(sys.stdin.buffer if sys.stdin else (), 1):
        at["line"] = number
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"第 {number} 行不是合法的 UTF-8（第 {error.start + 1} 个字节）",
                where="标准输入",
                expected="UTF-8 的文字，一行一问",
                fix="先转换编码，例如 iconv -f GB18030 -t UTF-8 问题.txt | minimind chat",
            ) from error
        if line.strip():
            yield line


def talk(
    session,
    prompts: Iterable[str],
    *,
    echo: bool,
    show_speed: bool,
    forgiving: bool,
    interruptible: bool = False,
) -> None:
    """逐个问、流式答。

    Args:
        echo: 先把问题打印出来（自动测试）。
        forgiving: 真为手动对话，一问太长时说明后继续；假则让错误结束程序。
        interruptible: 答着的时候按 Ctrl-C 只停下这个回答，接着问；假则结束程序。
    """
    for prompt in prompts:
        if echo:
            say_out(f"你：{prompt}\n")
        say_out("续：" if session.plain else "答：")
        try:
            for piece in session.reply(prompt):
                say_out(piece)
        except UserError as error:
            if not forgiving:
                say_out("\n")
                raise
            say_out(f"\n{error}\n\n")
            continue
        except KeyboardInterrupt:
            if not interruptible:
                raise
            session.interrupt()
            say_out("\n（停下了，这一问一答不记入历史；要退出，在输入处按 Ctrl-C 或空行回车）\n\n")
            continue
        if session.dropped:
            say_out(f"\n（上下文放不下，略去了最早的 {session.dropped} 条历史）")
        speed = session.speed
        tail = f"\n[速度] {speed.per_second:.2f} tokens/s（{speed.tokens} 个）" if show_speed else ""
        say_out(f"{tail}\n\n")


def open_session(args: ChatArguments):
    """按参数打开模型，返回 :class:`minimind.inference.chat.ChatSession`；有 ``--tools`` 时返回 ToolSession。"""
    from minimind.inference.chat import ChatSession
    from minimind.inference.sampling import SamplingParams

    params = SamplingParams(
        args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed
    )
    toolbox = pick_tools(args) if args.tools else None
    loaded = args.load()
    session = ChatSession(
        loaded.model,
        loaded.tokenizer,
        params,
        max_new_tokens=args.max_new_tokens,
        history_messages=args.historys,
        plain=loaded.plain,
        enable_thinking=None if args.open_thinking is None else bool(args.open_thinking),
        draft=args.drafter(loaded),
    )
    if toolbox is None:
        return session
    if loaded.plain:
        raise UserError(
            "预训练权重只会续写，不会用工具",
            where=f"--weight {args.weight}",
            fix="换一个微调过的权重，或去掉 --tools",
        )
    from minimind.inference.tool_loop import ToolSession

    return ToolSession(session, toolbox, args.tool_rounds)


def pick_tools(args: ChatArguments):
    """``--tool_names`` 选中的工具箱。"""
    from minimind.tools import EXAMPLE_TOOLS, Toolbox

    return Toolbox(EXAMPLE_TOOLS).pick(args.tool_names)


def run(session, args: ChatArguments) -> None:
    """按 ``--prompt``、``--mode``、管道或菜单的选择进行对话。"""
    common = {"show_speed": bool(args.show_speed)}
    mode, piped, at = args.mode, None, {}
    if args.prompt is None and mode != "auto" and is_piped():
        lines = piped_prompts(at)
        first = next(lines, None)
        if mode is None and (first is None or first.strip() in ("0", "1")):  # 旧脚本这样回答菜单；空的同从前
            mode = "manual" if first and first.strip() == "1" else "auto"
        elif first is not None:
            lines = itertools.chain([first], lines)
        piped = lines if mode != "auto" else None
    if args.prompt is not None:
        talk(session, [args.prompt], echo=False, forgiving=False, **common)
    elif piped is not None:
        try:
            talk(session, piped, echo=True, forgiving=False, **common)
        except UserError as error:
            place = error.where or f"标准输入第 {at['line']} 行"
            raise UserError(error.what, where=place, expected=error.expected, fix=error.fix) from error
    elif (mode or ask_mode()) == "auto":
        prompts = TOOL_PROMPTS if args.tools else PLAIN_PROMPTS if session.plain else CHAT_PROMPTS
        talk(session, prompts, echo=True, forgiving=False, **common)
    else:
        say_out("（空行退出；答着的时候 Ctrl-C 停下这个回答）\n")
        forgiving = sys.stdin.isatty()
        talk(session, typed_prompts(), echo=False, forgiving=forgiving, interruptible=True, **common)


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    args = parse_args(ChatArguments, argv)
    # 行编辑与中文退格；Windows 没有 readline，控制台自带
    if not is_piped() and sys.stdin.isatty() and os.name != "nt":
        import readline  # noqa: F401
    if args.seed is None:
        import torch

        torch.manual_seed(random.SystemRandom().randrange(2**31))
    run(open_session(args), args)
