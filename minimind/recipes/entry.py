"""十个配方共同的开头与入口：命令行、进程组、起点的模型。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minimind.arguments import parse_args
from minimind.errors import guard
from minimind.model import MiniMindLM
from minimind.trainer.trainer_utils import init_model, model_config, shutdown_distributed, start_run
from minimind.watch.beside import page_beside


def entry(arguments: type, run: Callable[[Any], Any]) -> Callable[..., int]:
    """配方的 ``main(argv=None) -> 退出码``：解析参数，运行，不论怎么结束都解散进程组。

    Args:
        arguments: 参数的 dataclass。
        run: 收下它的函数。
    """

    @guard
    def main(argv: list[str] | None = None) -> None:
        """命令行入口。"""
        args = parse_args(arguments, argv)
        try:
            with page_beside(args.save_dir, bool(args.watch)):
                run(args)
        except BaseException as error:
            shutdown_distributed(error)
            raise
        shutdown_distributed()

    return main


def open_model(args: Any) -> tuple[MiniMindLM, Any]:
    """建进程组、选设备、设种子，再按参数打开起点的模型。

    Returns:
        ``(model, tokenizer)``，模型是 fp32，已在它的设备上（``model.device``）。
    """
    device = start_run(args)
    model, tokenizer = init_model(
        model_config(args), args.from_weight, args.tokenizer_path, args.save_dir, device
    )
    model.config.record_trained_length(args.trained_length(model.config.trained_length))
    return model, tokenizer
