#!/usr/bin/env bash
# Are these nodes fit to train? `nanogpt accept` on them, a rank for each GPU, or for each node without:
#   sbatch --nodes=4 slurm/accept.sh [--minutes=10] [more options of accept]
# The report is acceptance/JOB_ID/acceptance.html, or in --out_dir; the job fails where a check fails. What a site needs
# is in slurm/site.env; docs/how-to/accept.md tells the rest.
#
# Defaults, which options of sbatch override:
#SBATCH --job-name=nanogpt-accept
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=00:30:00
#SBATCH --no-requeue
#SBATCH --no-kill
set -euo pipefail

say() { echo "$(date +%T) accept.sh: $*"; }

fail() { # STATUS MESSAGE
    echo "error: $2" >&2
    exit "$1"
}

: "${SLURM_JOB_ID:?start it with sbatch slurm/accept.sh}"
# Slurm runs a copy of this file: it knows where the original is.
original=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p')
for repository in "$(readlink -f "$original")" "$SLURM_SUBMIT_DIR/slurm/accept.sh"; do
    repository=${repository%/*/*}
    if [ -f "$repository/slurm/node.sh" ]; then break; fi
done
[ -f "$repository/slurm/node.sh" ] || fail 2 "no slurm/node.sh above $original, nor in $repository: submit from the repository"
SRUN_ARGS=() CONTAINER=()
# shellcheck disable=SC1091
if [ -f "$repository/slurm/site.env" ]; then source "$repository/slurm/site.env"; fi

out_dir=acceptance/$SLURM_JOB_ID options=()
for option in "$@"; do
    case $option in
        --out_dir=?* | --out-dir=?*) out_dir=${option#*=} ;;
        --out_dir | --out-dir | --out_dir= | --out-dir=) fail 2 "write --out_dir=DIRECTORY" ;;
        *) options+=("$option") ;;
    esac
done
[ ! -e "$out_dir" ] || fail 2 "--out_dir=$out_dir is there already: name another one"
export LOG_DIR=$out_dir.logs PROGRAM=accept
made=$(mkdir -p "$LOG_DIR" 2>&1) || fail 2 "--out_dir=$out_dir cannot be written (${made##*: })"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID * 31 % 20000))
export MASTER_ADDR MASTER_PORT RENDEZVOUS_ID=$SLURM_JOB_ID
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
SRUN_ARGS+=(--cpus-per-task="$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)")
if [ "${gpus##*:}" -gt 0 ]; then SRUN_ARGS+=(--gpus-per-node="$gpus"); fi
say "nodes: $SLURM_JOB_NUM_NODES ($SLURM_JOB_NODELIST), GPUs per node: ${gpus##*:}; the report will be in $out_dir"

# A node that dies is what the report is to tell of: neither the job nor the step ends with it.
status=0
srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --no-kill \
    --kill-on-bad-exit=0 "${SRUN_ARGS[@]}" "${CONTAINER[@]}" \
    bash "$repository/slurm/node.sh" "${options[@]}" --out_dir="$out_dir" || status=$?

# torchrun's status is not the ranks', and a lost node's task has failed whatever the report says.
report=$out_dir/acceptance.json
grep -qs '"is_finished": true' "$report" || fail 1 "no acceptance was finished (status $status): see $LOG_DIR"
if grep -q '^  "verdict": "FAIL"' "$report"; then exit 1; fi
