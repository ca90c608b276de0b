#!/usr/bin/env bash
# train_overfit.py on every GPU of this node, or of several:
#   launch/torchrun.sh --data=my.txt
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh     (on each node, with its own NODE_RANK)
# NGPU: processes on this node, by default one for each GPU, or one where there is none.
set -euo pipefail

if [ -z "${NGPU:-}" ]; then
    NGPU=1
    if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then NGPU=gpu; fi
fi
if [ "${NNODES:-1}" -eq 1 ]; then
    rendezvous=(--standalone) # a free port, so that two jobs on one node do not meet
else
    : "${NODE_RANK:?must number this node, from 0 to NNODES - 1}" "${MASTER_ADDR:?must be the address of node 0}"
    rendezvous=(--nnodes="$NNODES" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}")
fi
exec torchrun "${rendezvous[@]}" --nproc_per_node="$NGPU" "$(dirname "${BASH_SOURCE[0]}")/../train_overfit.py" "$@"
