#!/usr/bin/env bash
# One torchrun on one node of the job, for slurm/train.sh and slurm/accept.sh: a rank for each GPU, or one where the job
# has none.
set -euo pipefail
: "${MASTER_ADDR:?is missing: srun must pass the environment of slurm/train.sh on (--export in SRUN_ARGS?)}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ranks=$((${SLURM_GPUS_ON_NODE:-0} > 0 ? SLURM_GPUS_ON_NODE : 1))
threads=$((SLURM_CPUS_ON_NODE / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export PYTHONUNBUFFERED=1
ulimit -n "$(ulimit -Hn)"

# torchrun, without its own traceback where torch is missing or broken, a rank has failed or a signal came.
torchrun='
import os, socket, sys, time
host = socket.gethostname()
def leave(line):
    print(line, file=sys.stderr, flush=True)
    time.sleep(1)  # srun ends the step at the first failure, and loses what it has not read
    sys.exit(1)
try:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main
except Exception as error:
    leave(f"error: {host}: {sys.executable} cannot import torch ({type(error).__name__}: {error})")
try:
    main()
except SignalException as signal:
    leave(f"{host}: torchrun was sent {signal.sigval.name}")
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if os.environ.get("PROGRAM") == "accept" and failure.exitcode == 1:
        sys.exit(1)  # its report has said what failed
    how = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
    leave(f"error: {host}: rank {rank} failed ({how})")'
# A log a rank, and all of them in the job log. tee outlives the signals that torchrun sends to a rank's process group. A
# rank dies with its torchrun: each has a session of its own, which a Slurm that tracks process groups would not find.
# shellcheck disable=SC2016
rank='exec setpriv --pdeathsig KILL python3 "$@" > >(trap "" TERM INT USR1 USR2; exec tee -a "$LOG_DIR/rank_$RANK.log") 2>&1'
program=("$here/train_overfit.py")
if [ "${PROGRAM:-train}" = accept ]; then
    program=(-m nanogpt accept)
    export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
fi
# Restarts are Slurm's. A rank that is asked to stop gets as long as Slurm gives (torchrun has an option for that from
# torch 2.12 on alone).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
exec python3 -c "$torchrun" --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$ranks" \
    --rdzv-backend=static --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$RENDEZVOUS_ID" --max-restarts=0 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    --no-python bash -c "$rank" rank "${program[@]}" "$@"
