#!/usr/bin/env bash
# Train on one machine or on several with torchrun.
#
#   launch/torchrun.sh --config configs/digits.yaml                    # one machine, one rank per GPU
#   NPROC_PER_NODE=2 launch/torchrun.sh                                # one machine, 2 ranks
#   NNODES=4 HEAD=gpu-01:29500 launch/torchrun.sh --config FILE        # the same line on each of 4 machines
#
# What to change, all by environment variables:
#   NPROC_PER_NODE  ranks per machine (default: one per GPU; 2 where there is none)
#   NNODES          machines (default 1); FROM:TO lets the job go on with any number between the two
#   HEAD            name:port of one of the machines, reachable from all (needed when NNODES is not 1)
#   JOB             a name that all machines of one job share (default: distckpt)
#   MAX_RESTARTS    restarts after a rank has failed or a machine was lost, each from the newest checkpoint (default 3)
#   LOST_S          seconds without a sign of life after which a machine counts as lost (default 15)
#   WAIT_S          seconds that machines wait until there are enough of them (default 600)
#   JOIN_S          seconds that machines wait for more to join, once there are enough of them (default 30)
#   STOP_S          seconds that the ranks get to save the current step and end after SIGTERM, SIGINT or SIGUSR1
#                   (default 120; a torch that does not know TORCH_ELASTIC_SHUTDOWN_TIMEOUT gives 30)
#   SCRIPT          what to run (default: train.py)
#   PYTHON          the Python of the environment (default: .venv/bin/python if there, or python3)
#
# The checkpoints' directory must be one that every machine reaches: shared storage or an s3:// URL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

nnodes=${NNODES:-1}
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

if [[ $nnodes == 1 ]]; then
    meeting=(--standalone --local-addr=127.0.0.1)
else
    : "${HEAD:?NNODES=$nnodes needs HEAD=name:port of one of the machines, the same on all}"
    alive="keep_alive_interval=$((${LOST_S:-15} / 3)),keep_alive_max_attempt=3"
    meeting=(--nnodes="$nnodes" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-distckpt}"
        --rdzv-conf="join_timeout=${WAIT_S:-600},last_call_timeout=${JOIN_S:-30},$alive")
    # Else torchrun keeps one store for all starts of the ranks, on the first machine that led them: what dead ranks
    # said in it is taken for the living ones' words, it is lost with that machine, and none that joins later finds it.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

if [[ -z ${NPROC_PER_NODE:-} ]]; then
    NPROC_PER_NODE=$({ nvidia-smi --list-gpus 2> /dev/null || true; } | grep -c '^GPU' || true)
    ((NPROC_PER_NODE > 0)) || NPROC_PER_NODE=2
fi

# The fifth one is what Slurm sends ahead of the end, if asked to (sbatch --signal=USR1@120). Torch reads either name.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCHELASTIC_SIGNALS_TO_HANDLE=$PET_SIGNALS_TO_HANDLE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_S:-120}
exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node="$NPROC_PER_NODE" \
    --max-restarts="${MAX_RESTARTS:-3}" "${SCRIPT:-train.py}" "$@"
