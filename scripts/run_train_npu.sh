#!/usr/bin/env bash
# 在昇腾 NPU 上用 torchrun 启动一个训练阶段。
#
#   bash scripts/run_train_npu.sh pretrain --epochs 1 --batch_size 32
#
# 可用环境变量：
#   NPROC_PER_NODE   用几张卡；不给则数 ASCEND_RT_VISIBLE_DEVICES，再不行问 npu-smi，都没有就停下
#   MASTER_PORT      通信端口，默认 29500
#   NNODES、NODE_RANK、MASTER_ADDR   多机时给出
#   HCCL_CONNECT_TIMEOUT、HCCL_EXEC_TIMEOUT   已设置的不改
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "错误：$1" >&2
    exit 2
}

stages() {
    (cd "$root/trainer" && ls train_*.py) | sed 's/^train_//; s/\.py$//' | grep -v '^tokenizer$' | paste -sd' ' -
}

# 逗号分隔的卡号个数；"0-3,6" 这样的区间也认
count_devices() {
    awk -F, '{ n = 0; for (i = 1; i <= NF; i++) { if (split($i, r, "-") == 2) n += r[2] - r[1] + 1; else if ($i != "") n++ } print n }' <<<"$1"
}

# npu-smi info -m 每颗芯片一行，第三列是逻辑编号（控制器那一行是 "-"）
count_from_smi() {
    command -v npu-smi >/dev/null || { echo 0; return; }
    { npu-smi info -m 2>/dev/null || true; } | awk '$3 ~ /^[0-9]+$/ { n++ } END { print n + 0 }'
}

[ $# -ge 1 ] || fail "没有给出训练阶段；用法：bash scripts/run_train_npu.sh 阶段 [参数…]，阶段可以是：$(stages)。"
stage="$1"
shift
[ "$stage" = sft ] && stage=full_sft
script="$root/trainer/train_${stage}.py"
[ -f "$script" ] || fail "没有训练阶段 ${stage}；可以是：$(stages)。"

cards="${NPROC_PER_NODE:-}"
if [ -z "$cards" ] && [ -n "${ASCEND_RT_VISIBLE_DEVICES:-}" ]; then
    cards="$(count_devices "$ASCEND_RT_VISIBLE_DEVICES")"
fi
[ -n "$cards" ] || cards="$(count_from_smi)"
[ "$cards" != 0 ] || fail "没有 NPU 应答：npu-smi info -m 一张卡也没有列出。请检查驱动与 npu-smi；卡确实在，就用环境变量 NPROC_PER_NODE 写明几张；没有 NPU，请直接运行 python trainer/train_${stage}.py。"
[[ "$cards" =~ ^[1-9][0-9]*$ ]] || fail "卡数应当是正整数，看到的是 ${cards}；请改环境变量 NPROC_PER_NODE。"

# 首步编译算子要几分钟，默认的 120 秒建链超时不够
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1200}"
export HCCL_EXEC_TIMEOUT="${HCCL_EXEC_TIMEOUT:-1800}"

launcher=(torchrun)
command -v torchrun >/dev/null || launcher=("${PYTHON:-python3}" -m torch.distributed.run)

options=(--nproc_per_node "$cards" --master_port "${MASTER_PORT:-29500}")
[ -z "${NNODES:-}" ] || options+=(--nnodes "$NNODES")
[ -z "${NODE_RANK:-}" ] || options+=(--node_rank "$NODE_RANK")
[ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")

echo "NPU 训练：阶段 ${stage}，${cards} 张卡，端口 ${MASTER_PORT:-29500}" >&2
exec "${launcher[@]}" "${options[@]}" "$script" "$@"
