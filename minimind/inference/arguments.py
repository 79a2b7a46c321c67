"""打开哪个模型：对话、服务、评测共用的命令行参数。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minimind.arguments import arg
from minimind.model_arguments import ON_OFF, ModelArguments
from minimind.ranges import DEVICE

if TYPE_CHECKING:
    from minimind.inference.loading import Loaded
    from minimind.inference.speculative import Drafter

# --weight、--save_dir 没写时的
DEFAULT_WEIGHT, DEFAULT_SAVE_DIR = "full_sft", "out"


@dataclass
class LoadArguments(ModelArguments, group="模型"):
    """打开哪个模型；各命令里同名的参数同一个意思。"""

    load_from: str = arg(
        "model", "model 表示本项目训练的 .pth 权重；也可以是 Hugging Face 格式的模型目录", text="path"
    )
    save_dir: str = arg(DEFAULT_SAVE_DIR, "权重所在的目录", text="path")
    weight: str = arg(
        DEFAULT_WEIGHT, "权重的名字：pretrain、full_sft、dpo、reason、ppo_actor、grpo、spo……", text="name"
    )
    lora_weight: str = arg(
        "None",
        "叠加的 LoRA：{save_dir}/lora 下的名字（如 lora_identity）或 .pth 路径；逗号分隔几份，"
        "各自的增量相加（a,b 与 b,a 相同）；None 表示不用",
        text="weights",
    )
    chat_template: str | None = arg(
        None, "换一份对话模板：.jinja 文件，或 minimind 表示本项目的；不给则用分词器自己的", text="path"
    )
    inference_rope_scaling: int = arg(0, "用 YaRN 把上下文外推到训练长度之外", ON_OFF)
    device: str = arg("auto", "设备：auto、cpu、cuda:0、npu:0、mps", pattern=DEVICE, group="设备")
    dtype: str = arg(
        "auto",
        "计算精度；auto：CPU 用 float32，显卡用半精度。同一种子同一答案只有 float32 保证",
        ("auto", "float32", "bfloat16", "float16"),
        group="设备",
    )
    quantize: str = arg(
        "none",
        "int8：权重存成 8 位，只在 CPU 上，省内存、单路更快，答案略有出入",
        ("none", "int8"),
        group="设备",
    )

    def load(self, **changes: Any) -> Loaded:
        """打开；``changes`` 换掉其中几个。

        Raises:
            UserError: 见 :func:`minimind.inference.loading.load_for_inference`。
        """
        from minimind.inference.loading import load_for_inference  # 要载入 torch，--help 不必等它

        options = {name: getattr(self, name) for name in LoadArguments.__dataclass_fields__}
        options["inference_rope_scaling"] = bool(self.inference_rope_scaling)
        return load_for_inference(**{**options, **changes})


@dataclass
class DraftArguments(LoadArguments, group="推测解码"):
    """还要不要先猜后面几个词元。"""

    draft: str = arg(
        "auto",
        "先猜后面几个词元，一次核对完，写得快些，文字不变：prompt 照上文猜；尺寸（如 tiny）是同名的小权重来猜，"
        "也可以是 .pth 路径；none 不猜；auto：CPU 上是 prompt，别处不猜",
        text="filled",
    )

    def drafter(self, loaded: Loaded) -> Callable[[], Drafter] | None:
        """按参数与模型决定谁来猜；每个引擎造一个。

        Raises:
            UserError: 见 :func:`minimind.inference.drafting.choose_drafter`。
        """
        from minimind.inference.drafting import choose_drafter

        return choose_drafter(self.draft, loaded, self.weight, self.save_dir)
