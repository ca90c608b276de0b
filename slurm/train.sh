#!/usr/bin/env bash
# train_overfit.py on the nodes of a Slurm job, until the target is verified, through time limits, preemption and the
# loss of nodes:
#   sbatch --nodes=4 slurm/train.sh --batch_size=32 [more options of train_overfit.py]     (a window a GPU at least)
#   ENGINE=deepspeed sbatch --nodes=4 slurm/train.sh --batch_size=32 --zero_stage=3
#   sbatch --nodes=2 --oversubscribe --gpus-per-node=1 --cpus-per-task=8 slurm/train.sh     (a part of each node)
# The run directory is runs/JOB_ID, or --out_dir; a requeued job goes on from its newest checkpoint. MAX_RESTARTS
# (default 20) bounds how often. What a site needs is in slurm/site.env; docs/how-to/slurm.md tells the rest.
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

# Slurm's line on this job; the number of one task of an array is that of the whole array too.
show_job() { scontrol --oneliner show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID "; }

fact() { sed -n "s/.* $1=\([^ ]*\).*/\1/p" <<< "$facts"; } # NAME: of what Slurm knows of this job

requeue() { # WHY
    # Never after TERM: to requeue a job that a person has just cancelled would bring it back. Nor from a node that
    # Slurm has given up while the job runs again elsewhere.
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

expand_home() { # ~/PATH or ~USER/PATH, as the ranks would, who may have another HOME in a container
    local user=${1%%/*} home=${HOME:-}
    if [ "$user" != "~" ] || [ -z "$home" ]; then
        user=${user:1}
        home=$(getent passwd "${user:-$(id -u)}" | cut -d: -f6) || fail 2 "--out_dir=$1: there is no user $user"
    fi
    echo "$home${1#"${1%%/*}"}"
}

lost_node() { # whether a node is gone, which Slurm takes minutes to notice
    local waited=0 down='State=(DOWN|FAIL|[A-Z+]*(\*|NOT_RESPONDING))'
    if timeout 60 "${each_node[@]}" --overlap true; then return 1; fi
    if [ -n "$ran" ]; then return 0; fi
    # What kept the ranks from running may be no node's fault, and would come again. So Slurm must say that it is one's,
    # and is asked as long as a step runs on this node.
    until [[ $(scontrol --oneliner show node "$SLURM_JOB_NODELIST") =~ $down ]]; do
        timeout 60 "${each_node[@]}" --nodes=1 --ntasks=1 --nodelist="$MASTER_ADDR" --overlap true || return 1
        ((waited < 300)) || return 1
        sleep 5
        waited=$((waited + 5))
    done
}

: "${SLURM_JOB_ID:?start it with sbatch slurm/train.sh}"
# One task a node, with this script's environment, whatever sbatch was told of tasks and of --export.
each_node=(srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)

# A job that another job submits inherits its SLURM_RESTART_COUNT and SLURM_ARRAY_JOB_ID: Slurm itself must say so too.
facts=$(show_job)
attempt=$(fact Restarts)
if ((${SLURM_RESTART_COUNT:-0} < attempt)); then attempt=${SLURM_RESTART_COUNT:-0}; fi # requeued a moment ago
export SLURM_RESTART_COUNT=$attempt
task=$(fact ArrayTaskId) job=$SLURM_JOB_ID
if [ -n "$task" ]; then job=$(fact ArrayJobId)_$task; fi

# Slurm runs a copy of this file: it knows where the original is, and shows that with its arguments, up to a newline.
words=${*:+ $*}
original=${facts#* Command=}
original=${original%% WorkDir=*}
original=${original%"${words%%$'\n'*}"}
for repository in "$(readlink -f "$original")" "$SLURM_SUBMIT_DIR/slurm/train.sh"; do
    repository=${repository%/*/*}
    if [ -f "$repository/train_overfit.py" ]; then break; fi
done
[ -f "$repository/train_overfit.py" ] || fail 2 "no train_overfit.py above $original, nor in $repository: submit from the repository"
SRUN_ARGS=() CONTAINER=()
# shellcheck disable=SC1091
if [ -f "$repository/slurm/site.env" ]; then source "$repository/slurm/site.env"; fi
max_restarts=${MAX_RESTARTS:-20}
[[ $max_restarts =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail 2 "MAX_RESTARTS=$max_restarts must be a whole number"
((attempt <= max_restarts)) || fail 4 "restarted more often than MAX_RESTARTS=$max_restarts allows"

named='' health=--health=warn options=()
if [ -n "${ENGINE:-}" ]; then options+=("--engine=$ENGINE"); fi
if [ -n "$task" ] && [[ ${1:-} =~ ^[a-z_]+= ]]; then # OPTION=VALUE,VALUE,... of slurm/sweep.sh: a value a task
    IFS=, read -ra values <<< "${1#*=}"
    value=${values[task]:-}
    [ -n "$value" ] || fail 2 "$1 has no value for task $task of the array"
    options+=("--${1%%=*}=$value")
    named=runs/${job%_*}/${1%%=*}=${value//\//_}
    shift
    export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-sweep-${job%_*}}
fi
while (($# > 0)); do
    option=$1
    shift
    if [[ $option =~ ^--(out[_-]dir|health)$ && ${1:---} != --* ]]; then # its value is a word of its own
        option=$option=$1
        shift
    fi
    case $option in
        --out_dir="~"* | --out-dir="~"*) named=$(expand_home "${option#*=}") ;;
        --out_dir=?* | --out-dir=?*) named=${option#*=} ;;
        --out_dir= | --out-dir=) fail 2 "$option needs a value" ;;
        --health=*) health=$option ;;
        *) options+=("$option") ;;
    esac
done

# A job's name is its number, in runs/, code/ and logs/ and for the fence (storage/run_lock.py). Slurm uses numbers again,
# and clusters share disks: where the number is another job's, this one's name has the time too. A requeued job knows
# its own by the copy of the code, which says whose it is.
identity="${SLURM_CLUSTER_NAME:-} $SLURM_JOB_ID $(fact AllocNode:Sid)"
unique=$SLURM_JOB_ID-$(date +%Y%m%dT%H%M%S) name=$SLURM_JOB_ID own=''
codes=(runs/"$name"{,-*}/code/"$name"{,-*})
if [ -n "$named" ]; then codes=("$named/code/$name"{,-*}); fi
for code in "${codes[@]}"; do
    if ((attempt > 0)) && [ "$(cat "$code/JOB" 2> /dev/null)" = "$identity" ]; then own=$code; fi
done
if [ -n "$own" ]; then
    name=${own##*/} run_dir=${own%/code/*}
elif [ -n "$named" ]; then
    run_dir=$named
    if [ -e "$named/code/$name" ] || [ -e "$named/logs/$name.0" ]; then name=$unique; fi
else
    run_dir=runs/$name
    mkdir -p runs 2> /dev/null || true
    if ! mkdir "$run_dir" 2> /dev/null && [ -e "$run_dir" ]; then
        say "$run_dir is of an earlier job with this number: this job writes runs/$unique"
        name=$unique run_dir=runs/$unique
    fi
fi
code=$run_dir/code/$name
export RUN_JOB=$name
options+=("--out_dir=$run_dir" "$health")

# What this attempt leaves: a log a rank, and a file that is older than all it writes.
export LOG_DIR=$run_dir/logs/$name.$attempt
made=$(mkdir -p "$LOG_DIR" 2>&1) || fail 2 "--out_dir=$run_dir cannot be written (${made##*: })"
scontrol show hostnames "$SLURM_JOB_NODELIST" > "$LOG_DIR/nodes"
out_dir=$run_dir
if [[ $asked == *USR1* ]]; then touch "$out_dir/STOP"; fi # it came before there was a directory

# A requeue, perhaps days later, runs the code that the job began with.
if [ ! -d "$code" ]; then
    rm -rf "$code.tmp" && mkdir -p "$code.tmp"
    cp -R "$repository"/{train_overfit.py,ds_config.json,nanogpt,slurm} "$code.tmp"
    git -C "$repository" describe --always --dirty --abbrev=40 --exclude='*' > "$code.tmp/COMMIT" 2> /dev/null || true
    echo "$identity" > "$code.tmp/JOB"
    mv "$code.tmp" "$code"
fi

# 29500 for everybody would make two jobs on a node meet. Below 32768, where the kernel hands out ports.
MASTER_ADDR=$(head -n 1 "$LOG_DIR/nodes")
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 31 + attempt) % 20000))
export MASTER_ADDR MASTER_PORT
export RENDEZVOUS_ID=$name.$attempt
# torch's flight recorder: so many collectives of each rank, written by the run's own watchdog.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$LOG_DIR/flight_recorder_rank_}
# Every GPU and CPU that the job has on a node. A step gets no GPU that it does not ask for, one CPU by default, and
# from Slurm 22.05 on not what --cpus-per-task told sbatch. Of nodes with different numbers of CPUs the fewest count.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
SRUN_ARGS+=(--cpus-per-task="$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)")
if [ "${gpus##*:}" -gt 0 ]; then SRUN_ARGS+=(--gpus-per-node="$gpus"); fi

say "job $name, attempt $attempt of at most $((max_restarts + 1)): $run_dir, logs in $LOG_DIR"
say "nodes: $SLURM_JOB_NUM_NODES ($SLURM_JOB_NODELIST), GPUs per node: ${gpus##*:}, CPUs per node: $SLURM_CPUS_ON_NODE"
say "rendezvous $MASTER_ADDR:$MASTER_PORT, id $RENDEZVOUS_ID"

# In the background, as bash runs a trap only when no command is in the foreground. wait returns at each signal.
"${each_node[@]}" --kill-on-bad-exit=1 "${SRUN_ARGS[@]}" "${CONTAINER[@]}" bash "$code/slurm/node.sh" "${options[@]}" &
step=$!
while kill -0 "$step" 2> /dev/null; do wait "$step" || true; done
status=0
wait "$step" || status=$?

# The ranks' own status does not survive torchrun: the report tells, unless it is of an earlier attempt.
reason=
if [ -f "$run_dir/report.json" ] && { [ "$status" = 0 ] || [ "$run_dir/report.json" -nt "$LOG_DIR/nodes" ] ||
    grep -qs 'already: nothing to do; ' "$LOG_DIR/rank_0.log"; }; then
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
# What looks like a failure of the ranks may be a lost node's.
ran=$(compgen -G "$LOG_DIR/rank_*.log") || true
if lost_node; then requeue "a node does not answer"; fi
[ -n "$ran" ] || fail 1 "no rank has started, see above"
fail 1 "a rank failed, see $LOG_DIR"
