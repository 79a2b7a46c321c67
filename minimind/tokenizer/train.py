"""训练分词器：字节级 BPE。随包的一份就是用这里的默认参数训练的。

``minimind tokenizer train``，或公共项目的老命令 ``python trainer/train_tokenizer.py``。
配比与各种做法的对照表在 docs/tokenizer.md。
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minimind.arguments import Arguments, arg, parse_args
from minimind.console import format_duration, say
from minimind.errors import UserError, guard
from minimind.paths import resolve_path
from minimind.tokenizer.corpus import EXCLUDED_TAGS, mixed_texts, parse_mix
from minimind.tokenizer.special import IM_END, IM_START, PAD, SPECIAL_TOKENS, TAGS

# 与 Qwen2 同一条预切分规则：数字逐个成词；一个标点或空格可以带上后面的整串字母或汉字；标点串可以带上换行。
# 逐字相同，llama.cpp 的 GGUF 才能标成现成的 "qwen2" 预切分。
PRE_TOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# 每个对话回合都有、原始语料里却不多见的词：保证它们各是一个 token，一个回合省两三个 token
LAYOUT_TEXT = 'system\nuser\nassistant\n{"name": "a", "arguments": {"a": "a"}}\n'
LAYOUT_REPEATS = 3000

DEFAULT_MIX = "pretrain_zh=1,pretrain_en=1.4,sft=1.2,gsm8k_train=1.1,math_zh=1"


@dataclass
class TokenizerArguments(Arguments):
    """训练一个字节级 BPE 分词器，连同对话模板写进一个文件夹。"""

    data_dir: str = arg("dataset", "语料文件夹", text="path")
    mix: str = arg(
        DEFAULT_MIX, "语料与权重，逗号分隔；名字是 data_dir 下的 jsonl，也可以写 jsonl 的路径", text="paths"
    )
    exclude_tags: str = arg(
        ",".join(EXCLUDED_TAGS),
        "跳过这些来源（data_dir/meta 下的标签，默认是禁止商用或只许研究用的）；空文字表示都用",
        text="any",
    )
    vocab_size: int = arg(
        6400,
        "词表大小，含控制 token；要装得下它们与 256 个字节",
        low=len(SPECIAL_TOKENS) + 257,
        high=1_000_000,
    )
    on_bad_line: str = arg("error", "遇到坏行：error 报错停下，skip 跳过并计数", ("error", "skip"))
    save_dir: str = arg("out/tokenizer", "写到哪个文件夹", text="path")


def train_bpe(texts: Iterable[str], vocab_size: int = 6400) -> Tokenizer:
    """在 ``texts`` 上训练；同样的文本与顺序给出逐字节相同的结果。

    Raises:
        UserError: 词表装不下控制 token 和 256 个字节，或语料太少、凑不满词表。
    """
    floor = len(SPECIAL_TOKENS) + 256
    if vocab_size <= floor:
        raise UserError(
            f"词表太小：{vocab_size}",
            where="--vocab_size",
            expected=f"大于 {floor}（控制 token 加 256 个字节）",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # 标签不设 special：decode(skip_special_tokens=True) 要留下 <think> 等给解析器
        special_tokens=[AddedToken(t, special=t not in TAGS, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain(texts, repeat(LAYOUT_TEXT, LAYOUT_REPEATS)), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"语料太少，只凑出 {tokenizer.get_vocab_size()} 个 token",
            expected=f"{vocab_size} 个",
            fix="加语料，或减小 --vocab_size",
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """写出 transformers、llama.cpp 等都认得的三个文件；对话模板抄随包的那份。"""
    folder.mkdir(parents=True, exist_ok=True)
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:  # 训练器把所有控制 token 都登记成 special，这里改回来
        token["special"] = token["content"] not in TAGS
    text = json.dumps(spec, ensure_ascii=False, indent=1)
    (folder / "tokenizer.json").write_text(text + "\n", "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": IM_START,
        "eos_token": IM_END,
        "pad_token": PAD,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    template = Path(__file__).with_name("chat_template.jinja")
    if folder.resolve() != template.parent:
        shutil.copyfile(template, folder / template.name)


@guard
def main_train(argv: list[str] | None = None) -> None:
    """``minimind tokenizer train`` 的入口。"""
    args = parse_args(TokenizerArguments, argv, prog="minimind tokenizer train")
    sources = parse_mix(args.mix, resolve_path(args.data_dir))
    for source in sources:
        say(f"语料 {source.path}，权重 {source.weight:g}")
    start = time.monotonic()
    bad = [] if args.on_bad_line == "skip" else None
    exclude = tuple(filter(None, args.exclude_tags.split(",")))
    tokenizer = train_bpe(mixed_texts(sources, exclude, bad), args.vocab_size)
    if bad:
        say(f"跳过 {len(bad):,} 个坏行，第一个是：{bad[0]}")
    folder = resolve_path(args.save_dir)
    save_tokenizer(tokenizer, folder)
    say(f"{args.vocab_size} 个 token，用时 {format_duration(time.monotonic() - start)}，写到 {folder}")


if __name__ == "__main__":
    raise SystemExit(main_train())
