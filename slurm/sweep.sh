#!/usr/bin/env bash
# slurm/train.sh for each value of one option, as an array of jobs, and a table when all of them are over:
#   slurm/sweep.sh seed=0,1,2,3
#   slurm/sweep.sh learning_rate=3e-4,6e-4,1e-3 --nodes=2 --partition=gpu -- --max_steps=500
# After the values options of sbatch, after -- options of train_overfit.py. The runs are in runs/ARRAY_ID/OPTION=VALUE,
# the table in runs/ARRAY_ID/summary.md. W&B puts them into the group sweep-ARRAY_ID, or WANDB_RUN_GROUP.
set -euo pipefail

if [[ ! ${1:-} =~ ^[a-z_]+=[^,]+(,[^,]+)*$ ]]; then
    echo "error: usage: slurm/sweep.sh OPTION=VALUE,VALUE,... [options of sbatch] [-- options of train_overfit.py]" >&2
    exit 2
fi
sweep=$1
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -f "$here/site.env" ]; then
    set -a # SBATCH_ACCOUNT and the like are for sbatch
    # shellcheck disable=SC1091
    source "$here/site.env"
    set +a
fi
for_sbatch=() who_and_where=()
while (($# > 0)) && [ "$1" != -- ]; do
    for_sbatch+=("$1")
    case $1 in
        --partition=* | --account=* | --qos=* | -[pAq]?*) who_and_where+=("$1") ;;
        --partition | --account | --qos | -[pAq]) who_and_where+=("$1" "${2:-}") ;;
    esac
    shift
done
if (($# > 0)); then shift; fi
case "$sweep $*" in
    *out_dir* | *out-dir*)
        echo "error: slurm/sweep.sh gives each run a directory of its own: leave --out_dir out" >&2
        exit 2
        ;;
esac

commas=${sweep//[^,]/}
# Held until it is known that the directory is free, as Slurm uses numbers again: its runs would be in the table.
array=$(sbatch --parsable --hold --array="0-${#commas}" "${for_sbatch[@]}" "$here/train.sh" "$sweep" "$@")
where=()
if [[ $array == *";"* ]]; then where=("--clusters=${array#*;}"); fi # with --clusters its name follows
array=${array%%;*}
if ! made=$({ mkdir -p runs && mkdir "runs/$array"; } 2>&1); then
    scancel "${where[@]}" "$array"
    echo "error: runs/$array cannot be made (${made##*: }): job $array is cancelled; start again" >&2
    exit 2
fi
case " ${for_sbatch[*]} " in
    *" --hold "* | *" -H "*) ;;
    *) scontrol "${where[@]}" release "$array" ;;
esac
table=$(printf 'python3 %q %q' "$here/summary.py" "runs/$array")
summary=$(sbatch --parsable --dependency="afterany:$array" --job-name=sweep-summary --nodes=1 --ntasks=1 --time=5 \
    "${who_and_where[@]}" --output="runs/$array/summary.md" --wrap="$table")
echo "job $array: ${sweep%%=*} = ${sweep#*=}; job ${summary%%;*} writes runs/$array/summary.md when all are over"
