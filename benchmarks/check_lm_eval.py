"""用 lm-evaluation-harness 的 ``local-completions`` 考自己的服务，与 ``minimind eval choice`` 逐题对照。

一条命令（要装 ``lm-eval[api]``；不联网，任务就地写成本地文件）::

    python benchmarks/check_lm_eval.py --weight pretrain                 # out/ 里的权重
    python benchmarks/check_lm_eval.py --load_from 目录 --data_path ../shared/data/mc_eval.jsonl --limit 100

三个任务：

- ``minimind_letter``、``minimind_text``：同样的题面与选项，选项的对数似然由服务给（``echo`` 加 ``logprobs``）；
  逐题的对数似然相差不到 1e-3，正确率相同；
- ``minimind_write``：``generate_until``，贪心写到换行；与引擎直接写的逐字相同。

题面与选项分开切词（``minimind eval`` 的做法）和合起来切词（lm-eval 的做法）结果不同的题不考，数目会报告。
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_server import child_environment
from common import print_table
from server_clients import Service

from minimind.arguments import arg, parse_args
from minimind.console import say
from minimind.errors import UserError, guard
from minimind.evaluate.choice import ask, grade_questions, options
from minimind.evaluate.choice_data import Question, read_questions
from minimind.inference.generate import generate_batch
from minimind.inference.loading import Loaded, load_for_inference, stop_ids
from minimind.paths import resolve_path
from minimind.tokenizer import encode_plain
from minimind.tokenizer.loading import SHIPPED_DIR

SCORINGS = ("letter", "text")
WRITE_TOKENS = 16
# 没有给题目时用的几道
SAMPLE = [
    ("一年有几个月？", ["十个", "十一个", "十二个", "十三个"], 2),
    ("水在标准气压下多少度沸腾？", ["五十度", "一百度", "两百度", "三百度"], 1),
    ("中国的首都是哪里？", ["上海", "广州", "北京", "西安"], 2),
    ("太阳从哪边升起？", ["东边", "西边", "南边", "北边"], 0),
    ("三加四等于几？", ["五", "六", "七", "八"], 2),
    ("下面哪个是水果？", ["苹果", "石头", "桌子", "汽车"], 0),
    ("一周有几天？", ["五天", "六天", "七天", "八天"], 2),
    ("鱼生活在哪里？", ["水里", "树上", "天上", "沙漠"], 0),
]


@dataclass
class LmEvalArguments:
    """用 lm-evaluation-harness 考自己的服务。"""

    load_from: str = arg("model", "Hugging Face 目录；model 表示本项目的 .pth")
    save_dir: str = arg("out", "权重所在的目录")
    weight: str = arg("pretrain", "权重的名字")
    data_path: str | None = arg(None, "题目的 jsonl；不给则用自带的八道")
    limit: int = arg(0, "只考前几道；0 是全部")
    run_dir: str = arg("out/check_lm_eval", "任务文件、缓存与日志放在哪里")


# ---------------------------------------------------------------- 任务


def load_questions(args: LmEvalArguments) -> list[Question]:
    if args.data_path is None:
        questions = [Question("自带", text, tuple(choices), answer) for text, choices, answer in SAMPLE]
    else:
        questions = read_questions(resolve_path(args.data_path))[0]
    return questions[: args.limit or None]


def same_either_way(tokenizer: Any, question: Question) -> bool:
    """题面与选项分开切词、合起来切词是否一样。"""
    for scoring in SCORINGS:
        stem = ask(question, scoring)
        for choice in options(question, scoring):
            together = tokenizer(stem + choice, add_special_tokens=False).input_ids
            if together != [*encode_plain(tokenizer, stem), *encode_plain(tokenizer, choice)]:
                return False
    return True


def write_tasks(folder: Path, questions: Sequence[Question], start: str, written: Sequence[str]) -> None:
    """三个任务的 YAML（JSON 也是 YAML）与数据。

    Args:
        start: 文档开头的记号，题面前面要有它。
        written: 引擎对各题面直接写出的第一行，当作标准答案。
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "letter": start + ask(question, "letter"),
            "text": start + ask(question, "text"),
            "letter_choices": options(question, "letter"),
            "text_choices": options(question, "text"),
            "answer": question.answer,
            "written": line,
        }
        for question, line in zip(questions, written)
    ]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    tasks = [
        common
        | {
            "task": f"minimind_{scoring}",
            "output_type": "multiple_choice",
            "doc_to_text": f"{{{{{scoring}}}}}",
            "doc_to_choice": f"{{{{{scoring}_choices}}}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        for scoring in SCORINGS
    ]
    tasks.append(
        common
        | {
            "task": "minimind_write",
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{written}}",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": WRITE_TOKENS, "temperature": 0},
            "metric_list": [{"metric": "exact_match"}],
        }
    )
    for task in tasks:
        path = folder / f"{task['task']}.yaml"
        path.write_text(json.dumps(task, ensure_ascii=False, indent=1), "utf-8")


def first_lines(loaded: Loaded, prompts: Sequence[list[int]]) -> list[str]:
    """引擎贪心写的，到换行为止。"""
    eos = stop_ids(loaded.model, loaded.tokenizer)
    done = dict(generate_batch(loaded.model, prompts, max_new_tokens=WRITE_TOKENS, eos_ids=eos))
    texts = [
        loaded.tokenizer.decode(done[i].ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for i in range(len(prompts))
    ]
    return [text.split("\n")[0] for text in texts]


# ---------------------------------------------------------------- 考


def run_harness(folder: Path, port: int, tokenizer: Path, max_length: int) -> dict[str, Any]:
    """lm-eval 的结果：任务 → 成绩与逐题记录。"""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_CACHE", str(folder / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    options = {
        "model": "minimind",
        "base_url": f"http://127.0.0.1:{port}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(tokenizer),
        "num_concurrent": 4,
        "max_length": max_length,
    }
    names = [*(f"minimind_{scoring}" for scoring in SCORINGS), "minimind_write"]
    return lm_eval.simple_evaluate(
        model="local-completions",
        model_args=options,
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )


def compare(result: dict[str, Any], graded: Sequence[Any]) -> list[dict[str, Any]]:
    """两边逐题对照；选择题的每一项对数似然、正确率，续写的逐字相同的比例。"""
    rows = []
    for scoring in SCORINGS:
        samples = sorted(result["samples"][f"minimind_{scoring}"], key=lambda one: one["doc_id"])
        gap = 0.0
        for sample, item in zip(samples, graded, strict=True):
            theirs = [float(one[0][0]) for one in sample["resps"]]
            gap = max(gap, *(abs(a - b) for a, b in zip(theirs, item.scores[scoring], strict=True)))
        ours = sum(item.correct(scoring) for item in graded) / len(graded)
        theirs = float(result["results"][f"minimind_{scoring}"]["acc,none"])
        rows.append({"task": scoring, "ours": ours, "harness": theirs, "gap": gap})
    exact = float(result["results"]["minimind_write"]["exact_match,none"])
    rows.append({"task": "write", "ours": 1.0, "harness": exact, "gap": 0.0})
    return rows


def check(args: LmEvalArguments) -> list[dict[str, Any]]:
    """开服务、考、对照。

    Raises:
        UserError: 没有装 lm-eval，或一道能比的题也没有。
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("没有装 lm-evaluation-harness", fix="pip install 'lm-eval[api]'")
    folder = resolve_path(args.run_dir)
    loaded = load_for_inference(
        load_from=args.load_from, save_dir=args.save_dir, weight=args.weight, device="cpu", dtype="float32"
    )
    tokenizer = loaded.tokenizer
    everything = load_questions(args)
    questions = [question for question in everything if same_either_way(tokenizer, question)]
    if len(questions) < len(everything):
        say(f"{len(everything) - len(questions)} 道两种切词不同，不考。")
    if not questions:
        raise UserError("一道能比的题也没有", where=str(args.data_path), fix="换一份题目")
    start = tokenizer.bos_token or ""
    heads = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [[*heads, *encode_plain(tokenizer, ask(question, "text"))] for question in questions]
    write_tasks(folder, questions, start, first_lines(loaded, prompts))
    graded = grade_questions(loaded.model, tokenizer, questions, scorings=SCORINGS)
    command = [sys.executable, "-m", "minimind", "serve", "--port", "{port}", "--load_from", args.load_from]
    command += ["--save_dir", str(resolve_path(args.save_dir)), "--weight", args.weight]
    command += ["--device", "cpu", "--dtype", "float32", "--max_length", "4096"]
    native = not (resolve_path(args.load_from) / "tokenizer.json").is_file()
    path = SHIPPED_DIR if native else resolve_path(args.load_from)
    with Service(command, "/health", folder / "server.log", child_environment()) as service:
        return compare(run_harness(folder, service.port, path, 4096), graded)


@guard
def main(argv: list[str] | None = None) -> int:
    """命令行入口；对不上时以 1 退出。"""
    args = parse_args(LmEvalArguments, argv)
    rows = check(args)
    cells = [
        (row["task"], f"{row['ours']:.4f}", f"{row['harness']:.4f}", f"{row['gap']:.1e}") for row in rows
    ]
    print_table(
        "lm-evaluation-harness 对自己的服务", ("任务", "minimind eval", "lm-eval", "对数似然最大差"), cells
    )
    same = all(row["gap"] < 1e-3 and abs(row["ours"] - row["harness"]) < 1e-9 for row in rows)
    say("两边相同。" if same else "两边不同。")
    (resolve_path(args.run_dir) / "result.json").write_text(
        json.dumps({"arguments": asdict(args), "tasks": rows}, ensure_ascii=False, indent=1), "utf-8"
    )
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
