#!/usr/bin/env bash
# train_overfit.py on the nodes of a Slurm job, until the target is verified, through time limits, preemption and the
# loss of nodes:
#   sbatch --nodes=4 slurm/train.sh --batch_size=32 [more options of train_overfit.py]     (a window a GPU at least)
#   ENGINE=deepspeed sbatch --nodes=4 slurm/train.sh --batch_size=32 --zero_stage=3
#   sbatch --nodes=2 --oversubscribe --gpus-per-node=1 --cpus-per-task=8 slurm/train.sh     (a part of each node)
# The run directory is runs/JOB_ID, or --out_dir; a requeued job goes on from its newest checkpoint. MAX_RESTARTS
# (default 20) bounds how often. What a site needs is in slurm/site.env; docs/slurm.md tells the rest.
#
# Defaults, which options of sbatch override:
#SBATCH --job-name=nanogpt-overfit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
asked='' out_dir=''
trap 'ask_to_stop USR1' USR1 # the time limit is near; set first of all, so that no early signal ends this shell
trap 'ask_to_stop TERM' TERM # cancelled, or requeued by Slurm, which also tells the ranks
set -euo pipefail

# shellcheck disable=SC2329
ask_to_stop() { # SIGNAL
    asked+=$1
    # USR1 reaches this shell alone. The ranks look for this file before the first step and after each.
    if [ "$1" = USR1 ] && [ -n "$out_dir" ]; then touch "$out_dir/STOP"; fi
}

say() { echo "$(date +%T) train.sh: $*"; }

fail() { # STATUS MESSAGE
    echo "error: $2" >&2
    exit "$1"
}

show_job() { scontrol --oneliner show job "$job"; }

requeue() { # WHY
    # Never after TERM: to requeue a job that a person has just cancelled would bring it back. Nor from a node that
    # Slurm has given up while the job runs again elsewhere.
    local facts
    facts=$(show_job)
    if [[ $asked == *TERM* || $facts != *JobState=RUNNING* || $facts != *"Restarts=$attempt "* ]]; then
        say "$1; Slurm decides what becomes of the job"
        exit 4
    elif ((attempt >= max_restarts)); then
        say "$1; not requeued, MAX_RESTARTS=$max_restarts is reached"
        exit 4
    fi
    say "$1; requeued"
    scontrol requeue "$job"
    exit 0
}

on_each_node() { srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${SRUN_ARGS[@]}" "$@"; }

: "${SLURM_JOB_ID:?start it with sbatch slurm/train.sh}"
attempt=${SLURM_RESTART_COUNT:-0}
job=$SLURM_JOB_ID # of an array the number of one task is that of the whole array too
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

# Slurm runs a copy of this file: it knows where the original is.
original=$(show_job | sed -n 's/.* Command=\([^ ]*\).*/\1/p')
repository=$(dirname "$(dirname "$original")")
[ -f "$repository/train_overfit.py" ] || repository=$SLURM_SUBMIT_DIR
[ -f "$repository/train_overfit.py" ] || fail 2 "no train_overfit.py in $repository: submit from there"
SRUN_ARGS=() CONTAINER=()
# shellcheck disable=SC1091
if [ -f "$repository/slurm/site.env" ]; then source "$repository/slurm/site.env"; fi
max_restarts=${MAX_RESTARTS:-20}
((attempt <= max_restarts)) || fail 4 "restarted more often than MAX_RESTARTS=$max_restarts allows"

run_dir=runs/$SLURM_JOB_ID health=--health=warn options=()
if [ -n "${ENGINE:-}" ]; then options+=("--engine=$ENGINE"); fi
if [ -n "${SWEEP_OPTION:-}" ]; then # slurm/sweep.sh: the value of this task of the array
    IFS=, read -ra values <<< "$SWEEP_VALUES"
    value=${values[SLURM_ARRAY_TASK_ID]}
    options+=("--$SWEEP_OPTION=$value")
    run_dir=runs/$SLURM_ARRAY_JOB_ID/$SWEEP_OPTION=${value//\//_}
    export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-sweep-$SLURM_ARRAY_JOB_ID}
fi
for option in "$@"; do
    case $option in
        --out_dir=?* | --out-dir=?*) run_dir=${option#*=} ;;
        --health=*) health=$option ;;
        *) options+=("$option") ;;
    esac
done
options+=("--out_dir=$run_dir" "$health")

# What this attempt leaves: a log a rank, and a file that is older than all it writes.
export LOG_DIR=$run_dir/logs/$SLURM_JOB_ID.$attempt
mkdir -p "$LOG_DIR"
scontrol show hostnames "$SLURM_JOB_NODELIST" > "$LOG_DIR/nodes"
out_dir=$run_dir
if [[ $asked == *USR1* ]]; then touch "$out_dir/STOP"; fi # it came before there was a directory

# A requeue, perhaps days later, runs the code that the job began with.
code=$run_dir/code/$SLURM_JOB_ID
if [ ! -d "$code" ]; then
    rm -rf "$code.tmp" && mkdir -p "$code.tmp"
    cp -R "$repository"/{train_overfit.py,ds_config.json,nanogpt,slurm} "$code.tmp"
    git -C "$repository" describe --always --dirty --abbrev=40 --exclude='*' > "$code.tmp/COMMIT" 2> /dev/null || true
    mv "$code.tmp" "$code"
fi

# 29500 for everybody would make two jobs on a node meet. Below 32768, where the kernel hands out ports.
MASTER_ADDR=$(head -n 1 "$LOG_DIR/nodes")
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 31 + attempt) % 20000))
export MASTER_ADDR MASTER_PORT
export RENDEZVOUS_ID=$SLURM_JOB_ID.$attempt
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$LOG_DIR/nccl_trace_rank_}
# Every GPU and CPU that the job has on a node. A step gets no GPU that it does not ask for, one CPU by default, and
# from Slurm 22.05 on not what --cpus-per-task told sbatch. Of nodes with different numbers of CPUs the fewest count.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
SRUN_ARGS+=(--cpus-per-task="$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)")
if [ "${gpus##*:}" -gt 0 ]; then SRUN_ARGS+=(--gpus-per-node="$gpus"); fi

say "job $SLURM_JOB_ID, attempt $attempt of at most $((max_restarts + 1)): $run_dir, logs in $LOG_DIR"
say "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), ${gpus##*:} GPUs and $SLURM_CPUS_ON_NODE CPUs each"
say "rendezvous $MASTER_ADDR:$MASTER_PORT, id $RENDEZVOUS_ID"

# In the background, as bash runs a trap only when no command is in the foreground. wait returns at each signal.
on_each_node --kill-on-bad-exit=1 "${CONTAINER[@]}" bash "$code/slurm/node.sh" "${options[@]}" &
step=$!
while kill -0 "$step" 2> /dev/null; do wait "$step" || true; done
status=0
wait "$step" || status=$?

# The ranks' own status does not survive torchrun: the report tells, unless it is of an earlier attempt.
reason=
if [ -f "$run_dir/report.json" ] && { [ "$status" = 0 ] || [ "$run_dir/report.json" -nt "$LOG_DIR/nodes" ]; }; then
    reason=$(sed -n 's/.*"exit_reason": "\(.*\)".*/\1/p' "$run_dir/report.json")
fi
if [[ $asked == *USR1* ]]; then rm -f "$run_dir/STOP"; fi # it was for this attempt
case $reason in
    target_reached)
        say "target reached"
        exit 0
        ;;
    max_steps | max_minutes)
        say "target not reached: $reason"
        exit 3
        ;;
    non_finite) exit 1 ;;
esac
# With a grace time preemption tells the ranks, and not this shell.
if [[ $(show_job) =~ PreemptTime=[0-9] ]]; then requeue "preempted"; fi
if [ "$reason" = stopped ]; then
    if [[ $asked == *USR1* ]]; then requeue "time limit near, saved"; fi
    say "asked to stop, saved"
    exit 4
fi
# Slurm takes minutes to notice that a node is gone. What looks like a failure of the ranks may be that.
if ! timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true; then
    requeue "a node does not answer"
fi
[ "$status" -gt 0 ] || status=1
fail "$status" "a rank failed, see $LOG_DIR"
