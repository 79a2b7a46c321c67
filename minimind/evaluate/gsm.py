"""应用题：模型写出解答，从里面取出答案，与标准答案比数值。GSM8K 与中文应用题同一套。

两个成绩：

- ``strict``：只认写明了的答案：``#### 18``、``答案是 18``、``The answer is 18``、``\\boxed{18}``、``<answer>18</answer>``。
- ``flexible``：没有写明就取最后一个数。

数的写法：千分位、小数、百分数、分数与带分数、全角数字，以及 ``十二``、``三千零五`` 这样的汉字数。
标准答案取 ``####`` 之后（GSM8K 的写法），没有 ``####`` 就取最后一个数。
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from minimind.answers import after_thinking, last_number, numbers_in, reference_answer
from minimind.arguments import arg, parse_args
from minimind.console import progress
from minimind.dataset.jsonl import DataError, line_ranges, parse_line, read_lines
from minimind.errors import guard
from minimind.evaluate.common import (
    EvalArguments,
    Stopwatch,
    data_file,
    need_examples,
    pick,
    print_table,
    rate,
    save_result,
)
from minimind.evaluate.generation import generate_answers
from minimind.ranges import MANY
from minimind.tokenizer import document_start, encode_chat, encode_plain

# 写明答案的记号；取最后一处
_MARK = re.compile(
    r"####|\\boxed\s*\{|<answer>|(?:最终|正确)?答案(?:是|为|：|:|等于)+|(?:final\s+)?answer\s*(?:is|:)+|^答[：:]",
    re.I | re.M,
)
_HEAD = re.compile(r"^.*?(-?\s*[\d０-９][\d０-９,.，．/()（）]*\s*[%％]?)", re.S)
_FRACTION = re.compile(r"\\d?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_CHINESE = re.compile("负?[零〇一二两三四五六七八九十百千万亿]+(?:点[零〇一二三四五六七八九]+)?")
_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}


@dataclass
class GsmArguments(EvalArguments, group="考题"):
    """应用题：生成解答，比数值。"""

    data_path: str | None = arg(
        None,
        '题目 jsonl：{"question", "answer"} 或 {"conversations"}；默认 dataset/gsm8k_test.jsonl',
        text="path",
    )
    dev_path: str | None = arg(
        None, "少样本示例从哪里取，格式同上；取前 --shots 条；--shots 大于 0 时必须给", text="path"
    )
    shots: int = arg(0, "题前放几个示例", low=0, high=1000)
    chat: int | None = arg(None, "1 用对话模板问，0 直接续写；不给则按权重的种类", (0, 1))
    open_thinking: int | None = arg(None, "思考开关：1 先想再答，0 直接答；不给则由模型决定", (0, 1))
    max_new_tokens: int = arg(256, "解答最多多少个 token", low=1, high=MANY)
    batch_size: int = arg(32, "同时写几题", low=1, high=65536)
    save_items: int = arg(0, "结果文件里附上每一题的解答", (0, 1))

    def __post_init__(self):
        super().__post_init__()
        need_examples(self)


@dataclass(frozen=True)
class Problem:
    """一道题与它的标准解答、标准答案；问两个数的题（``208, 156``）有两个。"""

    question: str
    solution: str
    values: tuple[float, ...]


def read_problems(path: Any) -> list[Problem]:
    """读 jsonl。

    Raises:
        DataError: 缺字段，或标准答案里没有数；附文件与行号。
    """
    problems, line = [], 0
    for start, end in line_ranges(path, 4 << 20):
        for raw in read_lines(path, start, end):
            line += 1
            try:
                if (record := parse_line(raw)) is not None:
                    problems.append(_problem(record))
            except DataError as error:
                raise error.at(path, line) from None
    return problems


def _problem(record: dict[str, Any]) -> Problem:
    turns = record.get("conversations")
    if isinstance(turns, list) and len(turns) >= 2:
        question, solution = turns[-2].get("content"), turns[-1].get("content")
        if turns[-1].get("reasoning_content"):
            solution = f"{turns[-1]['reasoning_content']}\n{solution}"
    else:
        question, solution = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str):
        raise DataError(
            "没有题目或答案",
            field="question、answer",
            expected='{"question": …, "answer": …} 或 {"conversations": [问, 答]}',
            fix="对照格式改字段名",
        )
    answer = reference_answer(solution)
    parts = [last_number(part) for part in re.split(r",\s+|[，;；]\s*", answer)]
    values = (last_number(answer),) if None in parts else tuple(parts)
    if None in values:
        raise DataError(
            "标准答案里没有数", field="answer", expected="“#### 数”，或以数结尾", fix="删掉这一行"
        )
    return Problem(question, solution, values)


# ---------------------------------------------------------------- 取答案


def chinese_number(text: str) -> float | None:
    """汉字数：``三千零五``、``十二``、``一百二十万``、``负二点五``；没有返回 ``None``，有几个取最后一个。"""
    found = _CHINESE.findall(text)
    if not found:
        return None
    word, _, decimals = found[-1].removeprefix("负").partition("点")
    total = section = digit = 0
    for character in word:
        if character in _DIGITS:
            digit = digit * 10 + _DIGITS[character]  # 没有单位就是一位一位念的：二〇二四
        elif character in _UNITS:
            section += (digit or 1) * _UNITS[character]
            digit = 0
        else:  # 万、亿：管它前面的全部
            scale = 10_000 if character == "万" else 100_000_000
            section += digit
            total = (total + section) * scale if character == "亿" else total + section * scale
            section = digit = 0
    value = float(total + section + digit)
    if decimals:
        value += float("0." + "".join(str(_DIGITS[character]) for character in decimals))
    return -value if found[-1].startswith("负") else value


def stated_text(response: str) -> str | None:
    """写明的答案：最后一处记号之后、同一行里的文字；没有写明返回 ``None``。"""
    marks = list(_MARK.finditer(response))
    if not marks:
        return None
    tail = response[marks[-1].end() :].strip().split("\n", 1)[0]
    tail = _FRACTION.sub(r"(\1)/(\2)", tail)
    mark = marks[-1][0]
    if mark == "####":  # 约定这一行只有答案
        return tail
    if mark.startswith("\\boxed"):
        return tail.split("}", 1)[0]
    if mark == "<answer>":
        return tail.split("</answer>", 1)[0]
    head = _HEAD.match(tail)  # “答案是 18 个，不是 16 个”：只要第一个数
    return head[1].strip().rstrip("(（.．,，/") if head else tail


def stated_number(response: str) -> float | None:
    """写明的答案里的数；没有写明，或写明的不是数，返回 ``None``。"""
    text = stated_text(response)
    if text is None:
        return None
    value = last_number(text)
    return chinese_number(text) if value is None else value


def final_number(response: str) -> float | None:
    """写明的答案，否则最后一个数，否则最后一个汉字数。"""
    stated = stated_number(response)
    if stated is not None:
        return stated
    last = last_number(_FRACTION.sub(r"(\1)/(\2)", response))
    return chinese_number(response) if last is None else last


def same(got: float | None, want: float) -> bool:
    """数值相等，相对误差 1e-6 以内。"""
    return got is not None and math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9)


def correct(response: str, values: tuple[float, ...], strict: bool) -> bool:
    """答对了没有；有几个答案的，要每一个都出现在写明的答案里（``flexible`` 时是最后一行里）。"""
    if len(values) == 1:
        return same(stated_number(response) if strict else final_number(response), values[0])
    marks = list(_MARK.finditer(response))
    if marks:
        text = response[marks[-1].end() :].strip().split("\n", 1)[0]
    else:
        text = "" if strict else response.strip().rsplit("\n", 1)[-1]
    found = numbers_in(text)
    return all(any(same(got, want) for got in found) for want in values)


# ---------------------------------------------------------------- 考试


def encode_problem(
    tokenizer: Any, problem: Problem, examples: list[Problem], chat: bool, thinking: bool | None
) -> list[int]:
    """一道题的提示。"""
    if chat:
        turns = []
        for example in examples:
            turns += [
                {"role": "user", "content": example.question},
                {"role": "assistant", "content": example.solution},
            ]
        turns.append({"role": "user", "content": problem.question})
        return encode_chat(tokenizer, turns, add_generation_prompt=True, enable_thinking=thinking).ids
    text = "".join(f"题目：{example.question}\n解答：{example.solution}\n\n" for example in examples)
    return [*document_start(tokenizer), *encode_plain(tokenizer, f"{text}题目：{problem.question}\n解答：")]


def spoken(tokenizer: Any, prompt: list[int], text: str) -> str:
    """去掉思考之后的回答；提示末尾已替它写好 ``<think>`` 的，没有写到 ``</think>`` 就是还没有答。"""
    opened = tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
    return after_thinking(f"<think>{text}" if opened else text)


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    args = parse_args(GsmArguments, argv)
    path = data_file(args.data_path, "gsm8k_test.jsonl", "应用题 jsonl")
    problems = pick(read_problems(path), args.limit, args.seed)
    examples = (
        read_problems(data_file(args.dev_path, "", "示例 jsonl", "--dev_path"))[: args.shots]
        if args.shots
        else []
    )
    loaded, clock = args.load(), Stopwatch()
    chat = not loaded.plain if args.chat is None else bool(args.chat)
    thinking = None if args.open_thinking is None else bool(args.open_thinking)
    prompts = [encode_problem(loaded.tokenizer, problem, examples, chat, thinking) for problem in problems]
    with progress("应用题", total=len(problems), unit="题") as bar:
        answers = generate_answers(
            loaded.model,
            loaded.tokenizer,
            prompts,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            advance=bar.advance,
        )
    texts = [spoken(loaded.tokenizer, prompt, a.text) for prompt, a in zip(prompts, answers)]
    strict = rate([correct(text, p.values, strict=True) for text, p in zip(texts, problems)])
    flexible = rate([correct(text, p.values, strict=False) for text, p in zip(texts, problems)])
    stated = rate([stated_number(text) is not None for text in texts])
    stopped = rate([a.finished for a in answers])
    rows = [
        ("strict：写明的答案正确", strict),
        ("flexible：最后一个数正确", flexible),
        ("写明了答案", stated),
        ("自己停下来", stopped),
    ]
    title = f"{loaded.source.name} · {path.name} · {len(problems):,} 题，{len(examples)} 个示例"
    print_table(title, ["项目", "比例 [95 % 区间]"], [(name, value.show()) for name, value in rows])
    result: dict[str, Any] = {
        "data": path.name,
        "chat": chat,
        "questions": len(problems),
        "shots": len(examples),
    }
    names = ("strict", "flexible", "stated", "stopped")
    result["methods"] = {name: value.to_dict() for name, (_, value) in zip(names, rows)}
    if args.save_items:
        result["items"] = [
            {
                "question": p.question,
                "answer": list(p.values),
                "response": a.text,
                "flexible": final_number(text),
            }
            for p, a, text in zip(problems, answers, texts)
        ]
    save_result(args, "gsm", loaded, clock, result)


if __name__ == "__main__":
    raise SystemExit(main())
