"""说清是哪个模型的参数：训练、对话、服务、评测、导出的命令都从这一份继承。

这里不引用 torch，各命令的 ``--help`` 才不必等它。
"""

from __future__ import annotations

from dataclasses import dataclass

from minimind.arguments import Arguments, arg

# 模型的两种布局，见 minimind.model.model_minimind
ARCHS = ("v2", "v3")
ON_OFF = (0, 1)


@dataclass
class ModelArguments(Arguments, group="模型"):
    """模型的尺寸、布局与分词器；不给的由权重文件与它旁边的 JSON 决定。"""

    hidden_size: int | None = arg(None, "隐层宽度；不给则由权重文件决定", low=1, high=16384, resume="content")
    num_hidden_layers: int | None = arg(
        None, "层数；不给则由权重旁的 JSON 决定，没有 JSON 时从权重的键数", low=1, high=256, resume="content"
    )
    use_moe: int | None = arg(None, "是否混合专家；不给则由权重文件决定", ON_OFF, resume="content")
    arch: str | None = arg(
        None, "模型结构；不给则由权重旁的 JSON 决定，没有 JSON 时从权重的键认", ARCHS, resume="content"
    )
    tokenizer_path: str | None = arg(
        None, "分词器目录；不给则用自带的（HF 目录用它自己的）", text="path", resume="content"
    )
