"""在别处采样：vLLM、SGLang 或本项目的服务，按 URL 连过去；每步训练前把权重送过去。

进出都是 token id。三种服务用各自文档里的接口：

- ``vllm``（与任何照做的 OpenAI 兼容服务）：``POST /v1/completions``，``prompt`` 是 id，``return_token_ids`` 要回 id，
  ``logprobs`` 要回对数概率。送权重：写进服务启动时的那个目录，``POST /collective_rpc`` 调 ``reload_weights``，
  再 ``POST /reset_prefix_cache``；vLLM 要以 ``VLLM_SERVER_DEV_MODE=1`` 启动，本项目的服务要给 ``--reload_dir``。
  vLLM 默认报温度 1 的对数概率，温度不是 1 时要以 ``--logprobs-mode processed_logprobs`` 启动；本项目的服务按请求里的
  ``logprobs_mode`` 报，抽样的种子也与 :class:`LocalRollout` 的用法相同，答案一字不差。
- ``sglang``：``POST /generate``，``input_ids`` 进、``output_ids`` 出。送权重：``POST /update_weights_from_disk``。

权重走磁盘：服务与训练要看得见同一个目录。
"""

from __future__ import annotations

import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minimind.errors import UserError
from minimind.rl.rollout import Rollout, decode_responses
from minimind.runtime.checkpoint import unwrap
from minimind.runtime.device import mix_seeds
from minimind.runtime.files import atomic_write, write_text

KINDS = ("auto", "vllm", "sglang")
CONNECTIONS = 32  # 同时在途的提示数；服务自己会把它们拼成批


class RemoteRollout:
    """接口同 :class:`minimind.rl.rollout.LocalRollout`。

    Args:
        url: 服务的地址，例如 ``http://127.0.0.1:8000``；末尾的 ``/v1`` 可有可无。
        tokenizer: 用来解码文字，也给出结束符；须与服务用的是同一个。
        max_new_tokens, temperature: 回答的长度上限与抽样温度。
        kind: 服务的种类，见模块说明；``auto`` 时问一声 ``/get_model_info``，应答的就是 SGLang。
        weights_dir: 权重写到哪里；vLLM 须是它启动时的模型目录（不给就问 ``/v1/models`` 的 ``root``），
            SGLang 不给则用临时目录。
        timeout: 一次请求最多等多少秒。
        api_key: 服务要求的密钥。

    Raises:
        UserError: 连不上，或答复里没有 token id、对数概率。
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        kind: str = "auto",
        weights_dir: str | Path | None = None,
        timeout: float = 600.0,
        api_key: str | None = None,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind 只能是 {KINDS} 之一，得到 {kind!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.tokenizer, self.max_new_tokens, self.temperature = tokenizer, max_new_tokens, temperature
        self.timeout, self.api_key = timeout, api_key
        self.kind = self._detect() if kind == "auto" else kind
        self.model_name = root = None
        if self.kind == "vllm":
            card = self._first_model()
            self.model_name, root = card["id"], card.get("root")
        self.weights_dir = Path(weights_dir or root) if weights_dir or root else None

    def generate(self, prompts: Sequence[Sequence[int]], num_generations: int, seed: int) -> Rollout:
        """每个提示答 ``num_generations`` 次；同一个种子的结果是否一样由服务决定。"""
        ask = self._ask_sglang if self.kind == "sglang" else self._ask_openai

        def one(item: tuple[int, Sequence[int]]) -> list[tuple[list[int], list[float], bool]]:
            group, prompt = item
            answers = ask(list(prompt), num_generations, mix_seeds(seed, group))
            if len(answers) != num_generations:
                raise self._bad(f"要 {num_generations} 条回答，只给了 {len(answers)} 条")
            return answers

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            groups = list(pool.map(one, enumerate(prompts)))
        answers = [answer for group in groups for answer in group]
        responses = [ids for ids, _, _ in answers]
        return Rollout(
            prompts=[list(prompt) for prompt in prompts for _ in range(num_generations)],
            responses=responses,
            logprobs=[torch.tensor(logprobs) for _, logprobs, _ in answers],
            truncated=[truncated for _, _, truncated in answers],
            texts=decode_responses(self.tokenizer, responses),
            group=[group for group in range(len(prompts)) for _ in range(num_generations)],
        )

    def push_weights(self, model: nn.Module) -> None:
        """把 ``model`` 此刻的权重写成 Hugging Face 目录，让服务重新读。

        Raises:
            UserError: 不知道写到哪里，或服务没有重读的接口。
        """
        if self.weights_dir is None and self.kind == "vllm":
            raise UserError(
                "不知道服务从哪个目录读权重",
                where=self.url,
                fix="给出 weights_dir：服务启动时的模型目录，训练进程也要能写",
            )
        if self.weights_dir is None:
            self.weights_dir = Path(tempfile.mkdtemp(prefix="minimind-rollout-"))
        write_weights(unwrap(model), self.weights_dir)
        if self.kind == "sglang":
            reply = self._post("/update_weights_from_disk", {"model_path": str(self.weights_dir)})
            if not reply.get("success"):
                raise self._bad(f"SGLang 没能重读权重：{reply.get('message')}")
            return
        hint = "vLLM 要以环境变量 VLLM_SERVER_DEV_MODE=1 启动，本项目的服务要给 --reload_dir，才有 /collective_rpc"
        self._post("/collective_rpc", {"method": "reload_weights"}, hint)
        self._post("/reset_prefix_cache", {}, hint)  # 旧权重算出的提示缓存不能再用

    # ---------------------------------------------------------------- 两种问法

    def _ask_openai(self, prompt: list[int], n: int, seed: int) -> list[tuple[list[int], list[float], bool]]:
        body = {
            "model": self.model_name,
            "prompt": prompt,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            "n": n,
            "seed": seed,
            "logprobs": 1,
            "logprobs_mode": "processed_logprobs",
            "return_token_ids": True,
        }
        choices = sorted(self._post("/v1/completions", body).get("choices", []), key=lambda c: c["index"])
        answers = []
        for choice in choices:
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
            answers.append(self._checked(choice.get("token_ids"), logprobs, choice.get("finish_reason")))
        return answers

    def _ask_sglang(self, prompt: list[int], n: int, seed: int) -> list[tuple[list[int], list[float], bool]]:
        sampling = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "n": n,
        }
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        reply = self._post("/generate", body)
        answers = []
        for choice in reply if isinstance(reply, list) else [reply]:
            meta = choice.get("meta_info", {})
            pairs = meta.get("output_token_logprobs")
            ids = [pair[1] for pair in pairs] if pairs is not None else None
            logprobs = [pair[0] for pair in pairs] if pairs is not None else None
            answers.append(self._checked(ids, logprobs, (meta.get("finish_reason") or {}).get("type")))
        return answers

    def _checked(self, ids: Any, logprobs: Any, reason: Any) -> tuple[list[int], list[float], bool]:
        """一条回答的 id、对数概率、是否写满；缺了哪样就说清，绝不拿文字重新切分来凑。"""
        if not ids:
            raise self._bad("答复里没有 token id", "vLLM 0.10.2 以上支持 return_token_ids，请升级")
        if logprobs is None or len(logprobs) != len(ids) or any(value is None for value in logprobs):
            raise self._bad(f"有 {len(ids)} 个 token，对数概率却有 {len(logprobs or [])} 个")
        if reason not in ("stop", "length"):
            raise self._bad(f"回答没有正常结束（finish_reason={reason!r}）")
        return [int(token) for token in ids], [float(value) for value in logprobs], reason == "length"

    # ---------------------------------------------------------------- HTTP

    def _detect(self) -> str:
        try:
            self._request("/get_model_info", None)
        except urllib.error.HTTPError:  # 连得上但没有这个接口
            return "vllm"
        return "sglang"

    def _first_model(self) -> dict[str, Any]:
        try:
            models = self._request("/v1/models", None).get("data")
        except urllib.error.HTTPError as error:
            raise self._bad(f"/v1/models 答复 {error.code}") from error
        if not models:
            raise self._bad("/v1/models 里一个模型也没有")
        return models[0]

    def _post(self, path: str, body: dict[str, Any], hint: str = "") -> Any:
        give_up = time.monotonic() + self.timeout
        while True:
            try:
                return self._request(path, body)
            except urllib.error.HTTPError as error:
                # 服务排满了，过一会儿再来：一步的提示往往比它排得下的多
                if error.code == 429 and time.monotonic() < give_up:
                    time.sleep(_retry_after(error))
                    continue
                raise self._refused(path, error, hint) from error

    def _refused(self, path: str, error: urllib.error.HTTPError, hint: str) -> UserError:
        detail = error.read(400).decode("utf-8", "replace")
        return self._bad(f"{path} 答复 {error.code}：{detail}", hint)

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                text = reply.read()
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"连不上采样服务（{getattr(error, 'reason', error)}）",
                where=self.url,
                expected="一个正在运行的 vLLM、SGLang 或本项目的服务",
                fix="先启动服务，核对 --rollout_url；或去掉它在本进程里采样",
            ) from error
        try:
            return json.loads(text) if text.strip() else {}
        except json.JSONDecodeError as error:
            raise self._bad(f"{path} 的答复不是 JSON") from error

    def _bad(self, what: str, fix: str = "") -> UserError:
        return UserError(what, where=self.url, expected=f"{self.kind_name} 的接口", fix=fix or None)

    @property
    def kind_name(self) -> str:
        return {"vllm": "vLLM（OpenAI 兼容）", "sglang": "SGLang"}.get(getattr(self, "kind", ""), "采样服务")


def _retry_after(error: urllib.error.HTTPError) -> float:
    """``Retry-After`` 的秒数；没写或写的是日期时 1 秒，至多 10 秒。"""
    value = error.headers.get("Retry-After") or ""
    return min(float(value), 10.0) if value.isdigit() else 1.0


def write_weights(model: nn.Module, folder: Path) -> None:
    """``model.safetensors`` 与 ``config.json``；稠密 v2 就是 Llama，v3 就是 Qwen3，键名不用改。

    已有的其他文件（分词器等）不动；先写临时文件再改名，服务不会读到半截。
    """
    from safetensors.torch import save

    from minimind.export.layouts import hf_config

    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(model.parameters()).dtype
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    # save_file 写成只有自己可读，服务的用户就打不开；这里与普通文件的权限相同
    atomic_write(
        folder / "model.safetensors", lambda file: file.write(save(state, metadata={"format": "pt"}))
    )
    text = json.dumps(hf_config(model.config, dtype), ensure_ascii=False, indent=2)
    write_text(folder / "config.json", text + "\n")
