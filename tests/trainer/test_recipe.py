"""训练循环的门面：五个参数的 ``train``，一份改不动的配方记录，一个不大的 ``Run``。"""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from trainer_helpers import ToyRows, tiny_args, tiny_model, toy_recipe

from minimind.trainer.loop import train
from minimind.trainer.recipe import Data, Recipe, Run
from minimind.trainer.setup import set_up

MOST = 15


def test_训练只收五样():
    assert list(inspect.signature(train).parameters) == ["args", "recipe", "model", "tokenizer", "data"]


def test_配方只须写明名字_损失_拼批():
    required = [
        field.name
        for field in dataclasses.fields(Recipe)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    assert required == ["name", "loss", "collate"]


def test_配方与数据的记录改不动():
    for record, name in ((toy_recipe(), "loss"), (Data([1]), "train")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)


def test_循环看得到的至多十五样(tmp_path):
    """新添一样之前先想它该归谁：进度、日志、配方、数据……"""
    recipe = toy_recipe()
    run = set_up(tiny_args(tmp_path), recipe, tiny_model(), None, Data(ToyRows(4)))
    assert len(vars(run)) <= MOST and set(vars(run)) == {field.name for field in dataclasses.fields(Run)}
    assert recipe.weights is None and run.recipe.weights == tmp_path / "out" / "toy_64.pth"
