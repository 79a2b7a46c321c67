"""选择题：不让模型写，只看它给各个选项多大的概率，取最大的。

两种考法，题目相同，问的方式不同：

- ``letter``：题目后列出选项，比较 ``答案：`` 之后 A、B、C、D 的概率。要先学会“字母代表选项”，很小的模型往往只偏爱一个
  字母，所以结果里附有各字母被选了多少次。
- ``text``：不列选项，比较 ``答案：`` 之后各选项全文的对数似然 log P(选项 | 题目)。短的选项占便宜，
  所以另给按长度归一化的 ``text_norm`` = log P / 选项的 UTF-8 字节数（Brown 2020 附录 C 的做法，按字节则与分词器无关）。

随机乱猜的期望写在正确率旁边；置信区间把它包在里面，就还没有证据说明模型会做题。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minimind.arguments import arg, parse_args
from minimind.console import progress, say
from minimind.errors import UserError, guard
from minimind.evaluate.choice_data import LETTERS, Question, read_questions
from minimind.evaluate.common import (
    EvalArguments,
    Rate,
    Stopwatch,
    data_file,
    need_examples,
    pick,
    print_table,
    rate,
    save_result,
)
from minimind.evaluate.likelihood import ChoiceRow, choice_logprobs
from minimind.inference.generate import context_length
from minimind.ranges import MANY
from minimind.tokenizer import document_start, encode_chat, encode_plain, encode_plain_batch

SCORINGS = ("letter", "text")


@dataclass
class ChoiceArguments(EvalArguments, group="考题"):
    """选择题：比较各选项的对数似然。"""

    data_path: str | None = arg(
        None,
        "题目：csv、jsonl 或装着它们的文件夹（C-Eval、CMMLU、AGIEval 的布局）；默认 dataset/mc_eval.jsonl",
        text="path",
    )
    dev_path: str | None = arg(None, "少样本示例从哪里取，布局同上；--shots 大于 0 时必须给", text="path")
    shots: int = arg(0, "每题前放几个同学科的示例；没有同学科示例的题照零样本考", low=0, high=1000)
    scoring: str = arg("letter,text", "考法，逗号分隔：letter 比字母，text 比选项全文", text="filled")
    chat: int | None = arg(None, "1 用对话模板问，0 直接续写；不给则按权重的种类", (0, 1))
    subjects: str | None = arg(
        None, "只考名字以这些开头的学科，逗号分隔，例如 cmmlu/,agieval/gaokao-history", text="filled"
    )
    max_length: int = arg(
        0, "题目连示例最多多少个 token，放不下就少放示例；0 表示模型的上下文", low=0, high=MANY
    )
    max_tokens: int = arg(
        0, "一批最多多少个 token（含补齐）；0 由设备定：CPU 1024，显卡 16384", low=0, high=MANY
    )
    save_items: int = arg(0, "结果文件里附上每一题的对数似然", (0, 1))

    def __post_init__(self):
        super().__post_init__()
        need_examples(self)
        scorings = {name.strip() for name in self.scoring.split(",") if name.strip()}
        if not scorings or scorings - set(SCORINGS):
            raise UserError(
                f"{self.scoring} 里有不认识的考法",
                where="--scoring",
                expected="、".join(SCORINGS),
                fix="改 --scoring",
            )


@dataclass
class Graded:
    """一道题的成绩；``scores`` 与 ``predicted`` 按考法：letter、text、text_norm。"""

    question: Question
    shots: int
    scores: dict[str, list[float]] = field(default_factory=dict)

    def predicted(self, method: str) -> int:
        values = self.scores[method]
        return max(range(len(values)), key=values.__getitem__)

    def correct(self, method: str) -> bool:
        return self.predicted(method) == self.question.answer


# ---------------------------------------------------------------- 题目怎么写


def ask(question: Question, scoring: str) -> str:
    """题面，以“答案：”结尾。"""
    lines = [f"题目：{question.question}"]
    if scoring == "letter":
        lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices)]
    return "\n".join([*lines, "答案："])


def options(question: Question, scoring: str) -> list[str]:
    """各选项要接在题面之后的文字；空的选项换成“无”，免得没有 token 可算。"""
    if scoring == "letter":
        return list(LETTERS[: len(question.choices)])
    return [choice or "无" for choice in question.choices]


class Encoder:
    """把题目变成 token：续写是 ``[bos] 示例 题面``，对话是一问一答的示例接一问。"""

    def __init__(self, tokenizer: Any, scoring: str, chat: bool, limit: int):
        self.tokenizer, self.scoring, self.chat, self.limit = tokenizer, scoring, chat, limit

    def row(self, question: Question, examples: Sequence[Question]) -> tuple[ChoiceRow, int]:
        """一道题与实际放下的示例个数；放不下时从最后一个示例丢起（同学科的题仍共用前缀）。"""
        stem = self.stem(question)
        choices = encode_plain_batch(self.tokenizer, options(question, self.scoring))
        tail = len(stem) + max(map(len, choices))
        for count in range(len(examples), -1, -1):
            prefix = self.prefix(examples[:count])
            if count == 0 or len(prefix) + tail <= self.limit:
                break
        return ChoiceRow(tuple(prefix), tuple(stem), tuple(map(tuple, choices))), count

    def stem(self, question: Question) -> list[int]:
        text = ask(question, self.scoring)
        if not self.chat:
            return encode_plain(self.tokenizer, text)
        return encode_chat(
            self.tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True
        ).ids

    def prefix(self, examples: Sequence[Question]) -> list[int]:
        pairs = [
            (ask(example, self.scoring), options(example, self.scoring)[example.answer])
            for example in examples
        ]
        if self.chat:
            turns = [
                {"role": role, "content": text}
                for pair in pairs
                for role, text in zip(("user", "assistant"), pair)
            ]
            return encode_chat(self.tokenizer, turns).ids
        text = "".join(f"{asked}{answer}\n\n" for asked, answer in pairs)
        return [*document_start(self.tokenizer), *(encode_plain(self.tokenizer, text) if text else [])]


# ---------------------------------------------------------------- 考试


def grade_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    scorings: Sequence[str] = SCORINGS,
    examples: dict[str, list[Question]] | None = None,
    chat: bool = False,
    max_length: int = 0,
    max_tokens: int = 0,
) -> list[Graded]:
    """考一批题，结果与 ``questions`` 同序。

    Args:
        examples: 学科 → 少样本示例。
        chat: 用对话模板。
        max_length: 题目连示例的 token 上限，0 为模型的上下文。
    """
    limit = min(max_length or context_length(model), context_length(model))
    examples = examples or {}
    graded = [Graded(question, 0) for question in questions]
    for scoring in scorings:
        encoder = Encoder(tokenizer, scoring, chat, limit)
        rows = []
        for item in graded:
            row, shots = encoder.row(item.question, examples.get(item.question.subject, []))
            item.shots = max(item.shots, shots)
            rows.append(row)
        with progress(f"选择题 {scoring}", total=sum(row.width for row in rows), unit="token") as bar:
            values = choice_logprobs(model, rows, max_tokens=max_tokens, advance=bar.advance)
        for item, sums in zip(graded, values):
            item.scores[scoring] = sums
            if scoring == "text":
                sizes = [len(text.encode()) for text in options(item.question, scoring)]
                item.scores["text_norm"] = [value / size for value, size in zip(sums, sizes)]
    return graded


def summarize(graded: Sequence[Graded]) -> dict[str, Any]:
    """总成绩、分学科成绩、随机乱猜的期望、各位置被选了多少次。"""
    methods = list(graded[0].scores)
    subjects: dict[str, list[Graded]] = {}
    for item in graded:
        subjects.setdefault(item.question.subject, []).append(item)
    table = {
        name: {
            "total": len(group),
            "chance": chance(group),
            **{method: rate([item.correct(method) for item in group]).to_dict() for method in methods},
        }
        for name, group in sorted(subjects.items())
    }
    overall = {}
    for method in methods:
        entry = rate([item.correct(method) for item in graded]).to_dict()
        entry["macro"] = sum(row[method]["accuracy"] for row in table.values()) / len(table)
        picked = [item.predicted(method) for item in graded]
        entry["picked"] = {LETTERS[i]: picked.count(i) for i in range(max(picked) + 1)}
        overall[method] = entry
    right = [item.question.answer for item in graded]
    return {
        "questions": len(graded),
        "shots": sum(item.shots for item in graded) / len(graded),
        "chance": chance(graded),
        # 总猜最常见的那个字母：模型若只偏爱一个字母，最好也就是这个数
        "majority": max(right.count(i) for i in set(right)) / len(right),
        "methods": overall,
        "subjects": table,
    }


def chance(graded: Sequence[Graded]) -> float:
    """随机乱猜的期望正确率：各题 1/选项数 的平均。"""
    return sum(1 / len(item.question.choices) for item in graded) / len(graded)


def show(result: dict[str, Any], title: str) -> None:
    """分学科的表，末行是总计。"""
    methods = list(result["methods"])

    def cells(name: str, total: int, guess: float, row: dict[str, Any]) -> list[str]:
        shown = [Rate(row[method]["correct"], row[method]["total"]).show() for method in methods]
        return [name, f"{total:,}", f"{guess:.1%}", *shown]

    rows = [cells(name, row["total"], row["chance"], row) for name, row in result["subjects"].items()]
    families = {name.split("/", 1)[0] for name in result["subjects"] if "/" in name}
    for family in sorted(families) if len(families) > 1 else ():
        group = [row for name, row in result["subjects"].items() if name.startswith(f"{family}/")]
        total = sum(row["total"] for row in group)
        guess = sum(row["chance"] * row["total"] for row in group) / total
        sums = {
            method: {"correct": sum(row[method]["correct"] for row in group), "total": total}
            for method in methods
        }
        rows.append(cells(f"{family} 合计", total, guess, sums))
    if len(rows) != 1:
        rows.append(cells("总计", result["questions"], result["chance"], result["methods"]))
    print_table(title, ["学科", "题数", "乱猜", *methods], rows)
    for method in methods:
        entry = result["methods"][method]
        picked = "　".join(f"{letter} {count:,}" for letter, count in entry["picked"].items())
        print(f"{method}：各学科平均 {entry['macro']:.1%}；选了 {picked}")
    print(
        f"乱猜的期望 {result['chance']:.1%}，总猜最常见的答案 {result['majority']:.1%}；方括号里是 95 % 置信区间。"
    )


def load_examples(args: ChoiceArguments) -> dict[str, list[Question]]:
    """学科 → 前 ``--shots`` 个示例。"""
    if not args.shots:
        return {}
    found: dict[str, list[Question]] = {}
    for question in read_questions(data_file(args.dev_path, "", "少样本示例", "--dev_path", folders=True))[0]:
        group = found.setdefault(question.subject, [])
        if len(group) < args.shots:
            group.append(question)
    return found


def load_questions(args: ChoiceArguments) -> tuple[list[Question], dict[str, int], Path]:
    """要考的题、不考的各有多少、从哪里读的。"""
    path = data_file(args.data_path, "mc_eval.jsonl", "选择题，csv、jsonl 或文件夹", folders=True)
    questions, skipped = read_questions(path)
    if args.subjects:
        heads = tuple(name.strip() for name in args.subjects.split(",") if name.strip())
        names = sorted({question.subject for question in questions})
        questions = [question for question in questions if question.subject.startswith(heads)]
        if not questions:
            raise UserError(
                f"没有以 {args.subjects} 开头的学科",
                where=str(path),
                expected="、".join(names[:12]) + ("……" if len(names) > 12 else ""),
                fix="改 --subjects",
            )
    return pick(questions, args.limit, args.seed), skipped, path


@guard
def main(argv: list[str] | None = None) -> None:
    """命令行入口。"""
    args = parse_args(ChoiceArguments, argv)
    scorings = [name.strip() for name in args.scoring.split(",") if name.strip()]
    questions, skipped, path = load_questions(args)
    examples = load_examples(args)
    for reason, count in skipped.items():
        say(f"{path.name}：{count:,} 道{reason}的不考。")
    loaded, clock = args.load(), Stopwatch()
    chat = not loaded.plain if args.chat is None else bool(args.chat)
    graded = grade_questions(
        loaded.model,
        loaded.tokenizer,
        questions,
        scorings=scorings,
        examples=examples,
        chat=chat,
        max_length=args.max_length,
        max_tokens=args.max_tokens,
    )
    result = {"data": path.name, "chat": chat, "skipped": skipped, **summarize(graded)}
    without = sum(question.subject not in examples for question in questions)
    if args.shots and without:
        say(f"{without:,} 道题没有同学科的示例，按零样本考。")
    way = f"{'对话模板' if chat else '续写'}，平均 {result['shots']:.1f} 个示例"
    show(result, f"{loaded.source.name} · {path.name} · {way}")
    if args.save_items:
        result["items"] = [
            asdict(item.question) | {"shots": item.shots, "scores": item.scores} for item in graded
        ]
    save_result(args, "choice", loaded, clock, result)


if __name__ == "__main__":
    raise SystemExit(main())
