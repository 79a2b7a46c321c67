"""``minimind export hf``、``minimind export gguf`` 与 ``minimind import`` 的命令行。"""

from __future__ import annotations

import argparse
from typing import Any

from minimind.arguments import ChineseParser
from minimind.console import say
from minimind.errors import UserError, guard
from minimind.paths import resolve_path

PRECISIONS = ("auto", "float32", "float16", "bfloat16")


def _flag(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """``--a_b`` 与 ``--a-b`` 都接受。"""
    names = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
    parser.add_argument(*names, dest=name, **options)


def _source_parser(command: str, description: str) -> ChineseParser:
    parser = ChineseParser(prog=f"minimind export {command}", description=description, allow_abbrev=False)
    parser.add_argument("name", metavar="名字", help="权重的名字，如 full_sft；或 .pth 文件的路径")
    return parser


def _source_flags(parser: ChineseParser) -> None:
    _flag(parser, "save_dir", default="out", help="权重所在的目录")
    _flag(parser, "lora_weight", default="None", help="先合并进去的 LoRA，逗号分隔几份；None 表示不用")
    _flag(parser, "hidden_size", type=int, help="隐层宽度；不给则由权重文件决定")
    _flag(parser, "num_hidden_layers", type=int, help="层数；不给则由权重旁的 JSON 决定")
    _flag(parser, "use_moe", type=int, choices=(0, 1), help="是否混合专家；不给则由权重文件决定")
    _flag(parser, "arch", choices=("v2", "v3"), help="模型结构；不给则由权重旁的 JSON 决定")
    _flag(parser, "tokenizer_path", help="分词器目录；不给则用自带的")
    _flag(
        parser,
        "inference_rope_scaling",
        nargs="?",
        const=1,
        type=int,
        choices=(0, 1),
        default=0,
        help="把 YaRN 外推写进配置",
    )
    _flag(parser, "force", action="store_true", default=None, help="覆盖已有的目标")


SOURCE_NAMES = (
    "name", "save_dir", "lora_weight", "hidden_size", "num_hidden_layers", "use_moe", "arch", "tokenizer_path",
)  # fmt: skip


def _open(args: argparse.Namespace) -> Any:
    from minimind.export.source import open_source

    return open_source(
        **{name: getattr(args, name) for name in SOURCE_NAMES},
        inference_rope_scaling=bool(args.inference_rope_scaling),
    )


@guard
def main_hf(argv: list[str] | None = None) -> None:
    """导出 Hugging Face 目录。"""
    parser = _source_parser("hf", "导出成 Hugging Face 目录（safetensors、分词器、对话模板）")
    parser.add_argument("folder", metavar="目录", help="写到哪个目录")
    _flag(parser, "dtype", choices=PRECISIONS, default="auto", help="权重的精度；auto 与 .pth 相同，一位不变")
    _source_flags(parser)
    args = parser.parse_args(argv)

    from minimind.export.files import check_folder
    from minimind.export.hf import CODE_FILES, OWN_FILES, export_hf
    from minimind.export.layouts import ARCHITECTURES, NATIVE
    from minimind.export.source import DTYPES

    folder, force = resolve_path(args.folder), bool(args.force)
    check_folder(folder, force, OWN_FILES)  # 先查能不能写，再花时间读权重
    source = _open(args)
    dtype = source.dtype if args.dtype == "auto" else DTYPES[args.dtype]
    layout = export_hf(source, folder, dtype, force)
    how = (
        f"transformers 读取时加 trust_remote_code=True（模型文件 {'、'.join(CODE_FILES)} 在目录里）"
        if layout == NATIVE
        else "AutoModelForCausalLM、vLLM 直接读，不需要 trust_remote_code"
    )
    say(f"已写出 {folder}：{ARCHITECTURES[layout]}，{str(dtype).removeprefix('torch.')}；{how}。")


@guard
def main_gguf(argv: list[str] | None = None) -> None:
    """导出 GGUF 与 Modelfile。"""
    parser = _source_parser("gguf", "导出成 GGUF 文件，旁边附 Ollama 的 Modelfile")
    parser.add_argument("file", metavar="文件", help="写到哪个文件，如 minimind.gguf")
    _flag(parser, "type", choices=("f32", "f16", "q8_0"), default="f16", help="矩阵的精度")
    _flag(parser, "num_ctx", type=int, default=2048, help="Modelfile 里的上下文长度")
    _source_flags(parser)
    args = parser.parse_args(argv)

    from minimind.export.files import check_target, whole_file
    from minimind.export.gguf import export_gguf
    from minimind.export.ollama import modelfile, modelfile_path

    if args.num_ctx < 1:
        raise UserError(f"--num_ctx={args.num_ctx} 应当至少为 1", fix="改成正整数，如 2048")
    path = resolve_path(args.file)
    force = bool(args.force)
    check_target(path, force)
    check_target(modelfile_path(path), force)
    source = _open(args)
    arch = export_gguf(source, path, args.type, force)
    with whole_file(modelfile_path(path)) as temporary:
        temporary.write_text(modelfile(source, path.name, args.num_ctx), encoding="utf-8")
    size = path.stat().st_size / 1e6
    say(
        f"已写出 {path}：{arch}，{args.type}，{size:.1f} MB；旁边的 {modelfile_path(path).name} 给 Ollama 用。"
    )


@guard
def main_import(argv: list[str] | None = None) -> None:
    """导入外来的权重。"""
    parser = ChineseParser(
        prog="minimind import",
        description="把 Hugging Face 目录或公共 MiniMind 的 .pth 收进来，写成 out/名字_隐藏维.pth 与旁注",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="来源", help="Hugging Face 目录，或 .pth 文件")
    _flag(parser, "name", help="收进来叫什么；默认用目录名或文件名")
    _flag(parser, "save_dir", default="out", help="写到哪个目录")
    _flag(parser, "dtype", choices=PRECISIONS, default="auto", help="权重的精度；auto 不改，一位不变")
    _flag(parser, "tokenizer_path", help="训练这份权重的分词器目录；默认用来源目录里的")
    _flag(parser, "num_attention_heads", type=int, help="注意力头数；.pth 的形状里看不出来，默认 8")
    _flag(
        parser, "num_experts_per_tok", type=int, help="每词元专家数；.pth 里看不出来，默认 v2 为 2、v3 为 1"
    )
    _flag(parser, "rope_theta", type=float, help="旋转位置编码的底数；.pth 里看不出来，默认 1e6")
    _flag(parser, "force", action="store_true", default=None, help="覆盖已有的权重")
    args = parser.parse_args(argv)

    from minimind.export.importing import import_model
    from minimind.export.source import DTYPES

    target, model = import_model(
        args.source,
        args.name,
        args.save_dir,
        DTYPES.get(args.dtype),
        args.tokenizer_path,
        bool(args.force),
        num_attention_heads=args.num_attention_heads,
        num_experts_per_tok=args.num_experts_per_tok,
        rope_theta=args.rope_theta,
    )
    for note in model.notes:
        say(f"注意：{note}。")
    _report_import(args, target, model)


def _report_import(args: argparse.Namespace, target: Any, model: Any) -> None:
    """说明写到了哪里、怎么用；分词器不是随包的那个时，之后每次都要带上它。"""
    from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint
    from minimind.trainer.checkpoint import parse_stem

    config = model.config
    name = parse_stem(target)[0]
    extra = "" if args.save_dir == "out" else f" --save_dir {args.save_dir}"
    own = model.sidecar.get("tokenizer_hash")
    if own and own != tokenizer_fingerprint(load_tokenizer()):
        extra += f" --tokenizer_path {args.tokenizer_path or args.source}"
    kind = f"{config.arch}{'，混合专家' if config.use_moe else ''}，{config.num_hidden_layers} 层，宽 {config.hidden_size}"
    say(f"已写出 {target}（{kind}）。对话：minimind chat --weight {name}{extra}")
