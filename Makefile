# make demo   自建 .venv 并安装，然后从零训练一个会答题的小模型
# make test   自建 .venv 并安装，然后检查格式、跑全部测试
# make matrix 在几组依赖版本里各建一个临时环境、跑 compat 测试，写出 docs/compat.md（半小时以上，同时最多占 7 GB）
# make map    由 import 语句画出各房间谁引用谁（写进 docs/training.md），数出文件、行数、闭包、循环与往上的引用
# make lock   重算 constraints.txt，已有的版本不动（ARGS="--upgrade" 全部换新，ARGS="-P rich" 只换一个）
# 可改的变量：PYTHON=python3.12   VENV=.venv   PIP_ARGS="--proxy …"   ARGS="--fast"（交给 demo 或 pytest）

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
BIN = $(VENV)/bin
# 人在看时显示下载进度（带 CUDA 的 torch 有两三 GB），持续集成里只留错误
QUIET = $(if $(CI),-q)
# 两个进程跑测试：再多也受 2 核与每进程约 400 MB 内存所限
TEST_WORKERS ?= 2
# make matrix 在几组依赖版本里各建一个临时环境、跑 compat 测试，写出 docs/compat.md（半小时以上，同时最多占 7 GB）
# make lock 用 uv：它只读元数据，各系统、各 Python 版本一次算出。torch 换版本要先在 make matrix 里通过
UV = uv==0.13.9
TORCH = torch==2.13.0

.PHONY: demo test matrix map lock lint format help clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,6s/^# //p' Makefile

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "错误：找不到 $(PYTHON)；请安装 Python 3.10 以上，或用 make PYTHON=路径 指定。" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "错误：$(PYTHON) 的版本太旧，需要 Python 3.10 以上；用 make PYTHON=路径 指定一个新的。" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "错误：建不成虚拟环境；Debian 与 Ubuntu 上请先安装 python3-venv。" >&2; exit 2; }

# 锁定的版本在某些平台没有现成的包（如 Intel 的 Mac 上的 torch），此时退回 pyproject.toml 允许的范围；LOCKED=1 不退。
# 先卸掉 minimind：本项目的旧名，与 minimind-train 都装着时后者的文件会被前者的卸载带走
PIP_INSTALL = $(BIN)/python -m pip install $(QUIET) --disable-pip-version-check $(PIP_ARGS)
define install
	@echo "安装依赖到 $(VENV)（只在第一次，或依赖改动后）…" >&2
	@$(BIN)/python -m pip uninstall -qqq -y minimind
	@$(PIP_INSTALL) -c constraints.txt -e '$(1)' || { \
		$(if $(LOCKED),echo "错误：constraints.txt 锁定的版本装不上。" >&2; exit 1;) \
		echo "留意：constraints.txt 锁定的版本装不上，改用 pyproject.toml 允许的范围，装到的版本可能没有测过…" >&2; \
		$(PIP_INSTALL) -e '$(1)'; }
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,.)

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,.[dev])
	@touch $(VENV)/.installed

demo: $(VENV)/.installed
	@$(BIN)/python -m minimind demo $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(if $(LOCKED),MINIMIND_LOCKED=1) $(BIN)/python -m pytest -n $(TEST_WORKERS) $(ARGS)

matrix: $(VENV)/.installed-dev
	$(BIN)/python scripts/matrix.py $(ARGS)

map: $(VENV)/.installed
	$(BIN)/python scripts/map.py $(ARGS)

lock: | $(BIN)/python
	$(PIP_INSTALL) $(UV)
	echo '$(TORCH)' | $(BIN)/python -m uv pip compile -q --universal --python-version 3.10 --no-annotate --extra dev \
		--custom-compile-command "make lock" -c - $(ARGS) pyproject.toml -o constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
