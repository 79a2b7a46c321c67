"""奖励模型：读一段对话，给出它有多好。``--reward_model_path`` 指向本地的文件或目录，三种都收：

- ``minimind reward`` 训练的 ``.pth``，旁边有它的 JSON（:mod:`minimind.rl.reward_net`）；
- Hugging Face 的序列分类器，``num_labels = 1``（由偏好数据训练出来的奖励模型大多是这种）；
- 有 ``get_score(tokenizer, messages)`` 的模型（例如 InternLM2-reward），它们自带代码，要明说 ``--trust_remote_code 1``。

分数截到 ±clip。带思考时，整段回答与 ``<answer>`` 里的答案各打一次分，按 0.4 与 0.6 相加：
想得花哨而答案不好的，不该得高分。
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minimind.answers import ANSWER_SPAN, after_thinking
from minimind.console import say
from minimind.dataset.jsonl import short
from minimind.errors import UserError
from minimind.paths import file_problem, folder_problem, resolve_path
from minimind.rl.reward_net import encode_answers, open_reward_net, score_rows
from minimind.rl.reward_rules import Sample

WHOLE_SHARE, ANSWER_SHARE = 0.4, 0.6
BATCH_SIZE = 16
_EXPECTED = "序列分类器（num_labels = 1），或有 get_score(tokenizer, messages) 的奖励模型"
_FIX = "换成奖励模型的文件或目录；没有奖励模型就去掉 --reward_model_path，用可验证的规则（--reward auto）"


class RewardModel:
    """``model(samples) -> list[float]``，由 :func:`load_reward_model` 建立。"""

    def __init__(
        self, model: Any, tokenizer: Any, path: Path, *, classifier: bool, reasoning: bool, clip: float
    ):
        self.model, self.tokenizer, self.path = model, tokenizer, path
        self.classifier, self.reasoning, self.clip = classifier, reasoning, clip
        self.max_length = _max_length(model.config, tokenizer)
        self.told_truncation = False

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """每个样本的分数。

        Raises:
            UserError: 模型给出的不是有限的数，指出是哪个样本。
        """
        chats = [_chat(sample, sample.response) for sample in samples]
        whole = self._clipped(chats, samples)
        spoken = [after_thinking(sample.response) for sample in samples] if self.reasoning else []
        answers = [ANSWER_SPAN.findall(text) for text in spoken]
        having = [i for i, found in enumerate(answers) if found]
        if having:
            picked = [samples[i] for i in having]
            chats = [_chat(samples[i], answers[i][-1].strip()) for i in having]
            for i, score in zip(having, self._clipped(chats, picked), strict=True):
                whole[i] = WHOLE_SHARE * whole[i] + ANSWER_SHARE * score
        return whole

    def _clipped(self, chats: list[list[dict]], samples: Sequence[Sample]) -> list[float]:
        scores = self._scores(chats)
        for score, sample in zip(scores, samples, strict=True):
            if not math.isfinite(score):
                raise UserError(
                    f"奖励模型给出 {score}；第 {sample.line} 行，提示 {short(sample.prompt, 60)}，"
                    f"回答 {short(sample.response, 80)}",
                    where=str(self.path),
                    expected="一个有限的数",
                    fix="多半是半精度溢出，换成 float32 保存的奖励模型",
                )
        return [min(max(score, -self.clip), self.clip) for score in scores]

    def _scores(self, chats: list[list[dict]]) -> list[float]:
        return self._classify(chats) if self.classifier else self._get_scores(chats)

    @torch.no_grad()
    def _classify(self, chats: list[list[dict]]) -> list[float]:
        """序列分类器：批内右侧补齐，超长的从左边截，留下回答。"""
        encoded = [self._encode(chat) for chat in chats]
        device, scores = next(self.model.parameters()).device, []
        for start in range(0, len(encoded), BATCH_SIZE):
            batch = self.tokenizer.pad(encoded[start : start + BATCH_SIZE], return_tensors="pt").to(device)
            scores += self.model(**batch).logits.float().squeeze(-1).tolist()
        return scores

    def _encode(self, chat: list[dict]) -> dict[str, list[int]]:
        tokenizer = self.tokenizer
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            encoded = tokenizer(text, add_special_tokens=False)
        else:  # 编码器一类的分类器：提示与回答是一个句对
            prompt = "\n".join(turn.get("content") or "" for turn in chat[:-1])
            encoded = tokenizer(prompt, chat[-1]["content"])
        over = self._over(len(encoded["input_ids"]))
        return {key: values[over:] for key, values in encoded.items()}

    def _over(self, length: int) -> int:
        """从左边截去几个 token；头一次要截时说一声。"""
        over = max(length - self.max_length, 0)
        if over and not self.told_truncation:
            self.told_truncation = True
            say(f"注意：有对话超过奖励模型的 {self.max_length} 个 token，从左边截去。")
        return over

    @torch.no_grad()
    def _get_scores(self, chats: list[list[dict]]) -> list[float]:
        return [float(self.model.get_score(self.tokenizer, chat)) for chat in chats]


class OwnRewardModel(RewardModel):
    """``minimind reward`` 训练的：渲染、读分数的位置都与训练时一样。"""

    def _scores(self, chats: list[list[dict]]) -> list[float]:
        rows = encode_answers(self.tokenizer, chats)
        rows = [tuple(part[self._over(len(part)) :] for part in row) for row in rows]
        return score_rows(self.model, rows, BATCH_SIZE, self.tokenizer.pad_token_id)


def load_reward_model(
    path: str | Path,
    device: torch.device | str,
    *,
    trust_remote_code: bool = False,
    reasoning: bool = False,
    clip: float = 3.0,
    tokenizer_path: str | None = None,
) -> RewardModel:
    """打开奖励模型；不执行目录里自带的代码，除非明说。

    Args:
        tokenizer_path: 训练它的分词器，只有 ``.pth`` 要；不给则用自带的。

    Raises:
        UserError: 没有这个文件或目录；不是奖励模型（语言模型、没有打分头、不止一个分数）；要执行自带的代码而没有允许；
            没有分词器。
    """
    folder = resolve_path(path)
    where = f"--reward_model_path {folder}"
    if folder.suffix == ".pth":
        if problem := file_problem(folder, ".pth"):
            raise UserError(
                f"权重文件{problem}", where=where, expected="minimind reward 写出的 .pth", fix=_FIX
            )
        model, tokenizer = open_reward_net(folder, where, tokenizer_path)
        model.to(device).requires_grad_(False)
        return OwnRewardModel(model, tokenizer, folder, classifier=False, reasoning=reasoning, clip=clip)
    config = _read_config(folder, where)
    names = config.get("architectures") or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        model = _load_classifier(folder, where, trust_remote_code if "auto_map" in config else False)
        classifier = True
    elif "auto_map" in config:
        model = _load_scorer(folder, where, trust_remote_code)
        classifier = False
    else:
        raise UserError(
            f"这不是奖励模型：config.json 里写的是 {'、'.join(names) or '（没有 architectures）'}",
            where=where,
            expected=_EXPECTED,
            fix=_FIX,
        )
    tokenizer = _load_tokenizer(folder, where, trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # 分类器靠它找到最后一个真词元
    tokenizer.padding_side = "right"
    dtype = torch.float32 if torch.device(device).type == "cpu" else None
    model.to(device, dtype).eval().requires_grad_(False)
    return RewardModel(model, tokenizer, folder, classifier=classifier, reasoning=reasoning, clip=clip)


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        problem = folder_problem(folder)
        found = f"目录{problem}" if problem else f"读不出 config.json（{type(error).__name__}）"
        raise UserError(
            found,
            where=where,
            expected="minimind reward 写出的 .pth，或下载到本地的 Hugging Face 模型目录",
            fix=_FIX,
        ) from error


def _load_classifier(folder: Path, where: str, remote: bool) -> Any:
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=remote, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _cannot_open(error, where) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"权重里缺 {'、'.join(missing[:3])}，打分头会是随机的",
            where=where,
            expected="训练好的奖励模型",
            fix=_FIX,
        )
    if model.config.num_labels != 1:
        raise UserError(
            f"分类器有 {model.config.num_labels} 个输出",
            where=where,
            expected="一个分数（num_labels = 1）",
            fix=_FIX,
        )
    return model


def _load_scorer(folder: Path, where: str, remote: bool) -> Any:
    from transformers import AutoModel

    if not remote:
        raise UserError(
            "这个奖励模型自带代码，默认不执行",
            where=where,
            expected="看过目录里的 .py 文件、信任它的来源",
            fix="加 --trust_remote_code 1，或换一个序列分类器",
        )
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError) as error:
        raise _cannot_open(error, where) from error
    if not callable(getattr(model, "get_score", None)):
        raise UserError(
            f"{type(model).__name__} 没有 get_score 方法", where=where, expected=_EXPECTED, fix=_FIX
        )
    return model


def _load_tokenizer(folder: Path, where: str, remote: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"奖励模型的分词器打不开（{short(str(error), 120)}）",
            where=where,
            fix="把分词器的文件放进同一个目录",
        ) from error


def _cannot_open(error: Exception, where: str) -> UserError:
    return UserError(
        f"打不开（{type(error).__name__}：{short(str(error), 160)}）",
        where=where,
        expected="transformers 认识的结构与完整的权重文件",
        fix="重新下载这个目录；" + _FIX,
    )


def _max_length(config: Any, tokenizer: Any) -> int:
    """模型收得下的 token 数；没有写明的按 2048。"""
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min((n for n in limits if isinstance(n, int) and 0 < n < 10**9), default=2048)


def _chat(sample: Sample, response: str) -> list[dict[str, Any]]:
    return [*sample.messages, {"role": "assistant", "content": response}]
