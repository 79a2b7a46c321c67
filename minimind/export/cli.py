"""``minimind export hf``、``minimind export gguf`` 与 ``minimind import`` 的命令行。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minimind.arguments import Arguments, arg, parse_args
from minimind.console import say
from minimind.errors import guard
from minimind.model_arguments import ON_OFF, ModelArguments
from minimind.paths import resolve_path
from minimind.ranges import MANY

PRECISIONS = ("auto", "float32", "float16", "bfloat16")


@dataclass
class SourceArguments(ModelArguments, group="来源"):
    """导出哪一份权重。"""

    name: str = arg("", "权重的名字，如 full_sft；或 .pth 文件的路径", metavar="名字", text="weight")
    save_dir: str = arg("out", "权重所在的目录", text="path")
    lora_weight: str = arg("None", "先合并进去的 LoRA，逗号分隔几份；None 表示不用", text="weights")
    inference_rope_scaling: int = arg(0, "把 YaRN 外推写进配置", ON_OFF)
    force: bool = arg(False, "覆盖已有的目标")

    def open(self) -> Any:
        """打开权重，见 :func:`minimind.export.source.open_source`。"""
        from minimind.export.source import open_source

        options = {name: getattr(self, name) for name in SourceArguments.__dataclass_fields__}
        del options["force"]
        return open_source(**options | {"inference_rope_scaling": bool(self.inference_rope_scaling)})


@dataclass
class ExportHFArguments(SourceArguments, group="去处"):
    """导出成 Hugging Face 目录（safetensors、分词器、对话模板）"""

    folder: str = arg("", "写到哪个目录", metavar="目录", text="path")
    dtype: str = arg("auto", "权重的精度；auto 与 .pth 相同，一位不变", PRECISIONS)
    layout: str = arg(
        "auto",
        "auto：同构的公开结构，没有才带模型文件；minimind：总是本项目的结构，带模型文件",
        ("auto", "minimind"),
    )


@dataclass
class ExportGGUFArguments(SourceArguments, group="去处"):
    """导出成 GGUF 文件，旁边附 Ollama 的 Modelfile"""

    file: str = arg("", "写到哪个文件，如 minimind.gguf", metavar="文件", text="path")
    type: str = arg("f16", "矩阵的精度", ("f32", "f16", "q8_0"))
    num_ctx: int = arg(2048, "Modelfile 里的上下文长度", low=1, high=MANY)


@dataclass
class ImportArguments(Arguments):
    """把 Hugging Face 目录或公共 MiniMind 的 .pth 收进来，写成 out/名字_隐藏维.pth 与旁注"""

    source: str = arg("", "Hugging Face 目录，或 .pth 文件", metavar="来源", text="path")
    name: str | None = arg(None, "收进来叫什么；不给则用目录名或文件名", text="name")
    save_dir: str = arg("out", "写到哪个目录", text="path")
    dtype: str = arg("auto", "权重的精度；auto 不改，一位不变", PRECISIONS)
    tokenizer_path: str | None = arg(None, "训练这份权重的分词器目录；不给则用来源目录里的", text="path")
    num_attention_heads: int | None = arg(
        None, "注意力头数；.pth 的形状里看不出来，不给则 8", low=1, high=1024
    )
    num_experts_per_tok: int | None = arg(
        None, "每词元专家数；.pth 里看不出来，不给则 v2 为 2、v3 为 1", low=1, high=1024
    )
    rope_theta: float | None = arg(
        None, "旋转位置编码的底数；.pth 里看不出来，不给则 1e6", above=1, high=1e12
    )
    force: bool = arg(False, "覆盖已有的权重")


@guard
def main_hf(argv: list[str] | None = None) -> None:
    """导出 Hugging Face 目录。"""
    args = parse_args(ExportHFArguments, argv, prog="minimind export hf")

    from minimind.export.files import check_folder
    from minimind.export.hf import CODE_FILES, OWN_FILES, export_hf
    from minimind.export.layouts import ARCHITECTURES, NATIVE
    from minimind.export.source import DTYPES

    folder, force = resolve_path(args.folder), args.force
    check_folder(folder, force, OWN_FILES)  # 先查能不能写，再花时间读权重
    source = args.open()
    dtype = source.dtype if args.dtype == "auto" else DTYPES[args.dtype]
    layout = export_hf(source, folder, dtype, force, None if args.layout == "auto" else args.layout)
    how = (
        f"transformers 读取时加 trust_remote_code=True（模型文件 {'、'.join(CODE_FILES)} 在目录里）"
        if layout == NATIVE
        else "AutoModelForCausalLM、vLLM 直接读，不需要 trust_remote_code"
    )
    say(f"已写出 {folder}：{ARCHITECTURES[layout]}，{str(dtype).removeprefix('torch.')}；{how}。")


@guard
def main_gguf(argv: list[str] | None = None) -> None:
    """导出 GGUF 与 Modelfile。"""
    args = parse_args(ExportGGUFArguments, argv, prog="minimind export gguf")

    from minimind.export.files import whole_file
    from minimind.export.gguf import export_gguf
    from minimind.export.ollama import modelfile, modelfile_path
    from minimind.runtime.files import check_target

    path = resolve_path(args.file)
    force = args.force
    check_target(path, force)
    check_target(modelfile_path(path), force)
    source = args.open()
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
    args = parse_args(ImportArguments, argv, prog="minimind import")

    from minimind.export.importing import import_model
    from minimind.export.source import DTYPES

    target, model = import_model(
        args.source,
        args.name,
        args.save_dir,
        DTYPES.get(args.dtype),
        args.tokenizer_path,
        args.force,
        num_attention_heads=args.num_attention_heads,
        num_experts_per_tok=args.num_experts_per_tok,
        rope_theta=args.rope_theta,
    )
    for note in model.notes:
        say(f"注意：{note}。")
    _report_import(args, target, model)


def _report_import(args: ImportArguments, target: Any, model: Any) -> None:
    """说明写到了哪里、怎么用；分词器不是随包的那个时，之后每次都要带上它。"""
    from minimind.runtime.checkpoint import parse_stem
    from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint

    config = model.config
    name = parse_stem(target)[0]
    extra = "" if args.save_dir == "out" else f" --save_dir {args.save_dir}"
    own = model.sidecar.get("tokenizer_hash")
    if own and own != tokenizer_fingerprint(load_tokenizer()):
        extra += f" --tokenizer_path {args.tokenizer_path or args.source}"
    kind = f"{config.arch}{'，混合专家' if config.use_moe else ''}，{config.num_hidden_layers} 层，宽 {config.hidden_size}"
    say(f"已写出 {target}（{kind}）。对话：minimind chat --weight {name}{extra}")
