#!/usr/bin/env bash
# train_overfit.py --engine=deepspeed on every GPU of this node, or of the nodes in a hostfile ("node0 slots=8" a line):
#   launch/deepspeed.sh --zero_stage=3
#   HOSTFILE=hosts launch/deepspeed.sh                              (from one node, which reaches the others by ssh)
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=node0 launch/deepspeed.sh  (on each node, without ssh)
# NGPU, NNODES: how many GPUs of each node and how many nodes of the hostfile, by default all.
set -euo pipefail

if [ -n "${HOSTFILE:-}" ] && [ ! -f "$HOSTFILE" ]; then
    echo "error: HOSTFILE=$HOSTFILE: no such file" >&2
    exit 2
fi
if [ -n "${NGPU:-}" ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    echo "error: deepspeed ignores CUDA_VISIBLE_DEVICES when NGPU is set: unset one of the two" >&2
    exit 2
fi
nodes=(--hostfile="${HOSTFILE:-/job/hostfile}") # DeepSpeed's own default; it need not exist
if [ -n "${NNODES:-}" ]; then nodes+=(--num_nodes="$NNODES"); fi
if [ -n "${NGPU:-}" ]; then nodes+=(--num_gpus="$NGPU"); fi
if [ -n "${MASTER_ADDR:-}" ]; then nodes+=(--master_addr="$MASTER_ADDR"); fi
if [ -n "${MASTER_PORT:-}" ]; then nodes+=(--master_port="$MASTER_PORT"); fi
if [ -n "${NODE_RANK:-}" ]; then nodes+=(--no_ssh --node_rank="$NODE_RANK"); fi
exec deepspeed "${nodes[@]}" "$(dirname "${BASH_SOURCE[0]}")/../train_overfit.py" --engine=deepspeed "$@"
