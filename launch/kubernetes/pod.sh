#!/usr/bin/env bash
# Train in one pod of several, and end with a code that tells the Job's podFailurePolicy the run's outcome:
#
#   0   complete
#   75  preempted, and saved
#   1   failed, or ended without a word
#
#   DIRECTORY=s3://bucket/run-7 NNODES=2 HEAD=distckpt-0.distckpt:29500 launch/kubernetes/pod.sh --config FILE
#
# Where one pod alone is evicted, the others wait in their torchrun for its replacement, and go on; where it is the
# first one, at which they meet, all end, with 75.
# The variables are those of launch/torchrun.sh, and DIRECTORY, where the checkpoints lie. Kubeflow Trainer tells the
# number of pods, the first one and the number of ranks in variables of torchrun's own (PET_...), which are taken, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${DIRECTORY:?is to name the checkpoints directory: a volume that all pods share, or s3://BUCKET/RUN}"
export NNODES=${NNODES:-${PET_NNODES:-1}}
export HEAD=${HEAD:-${PET_MASTER_ADDR:-localhost}:${PET_MASTER_PORT:-29500}}
[[ ${PET_NPROC_PER_NODE:-auto} == auto ]] || export NPROC_PER_NODE=${NPROC_PER_NODE:-$PET_NPROC_PER_NODE}

# Pods may be scheduled hours apart. The first one waits a day for the others, and they wait for it, without an end.
trap 'exit 75' TERM
export WAIT_S=${WAIT_S:-86400}
if ((${JOB_COMPLETION_INDEX:-0} > 0)); then
    until (: < "/dev/tcp/${HEAD%:*}/${HEAD##*:}") 2> /dev/null; do sleep 1; done
fi

read -r _ _ before < <(launch/outcome.sh "$DIRECTORY")
launch/torchrun.sh --checkpoint.directory "$DIRECTORY" "$@" &
torchrun=$!
trap 'kill -TERM "$torchrun" 2> /dev/null || true' TERM
while kill -0 "$torchrun" 2> /dev/null; do wait "$torchrun" || true; done # each trapped signal ends one wait

# Rank 0, which may be in another pod, is the last to say how it ended; where it cannot, its claim expires in a minute.
SECONDS=0
while read -r state step since < <(launch/outcome.sh "$DIRECTORY") && [[ $state == running ]] && ((SECONDS < 90)); do
    sleep 1
done
[[ $since != "$before" ]] || state=unknown # what is recorded was said by an earlier job
echo "pod.sh: $state, newest checkpoint: step $step"

case $state in
    complete) exit 0 ;;
    preempted) exit 75 ;;
    *) exit 1 ;;
esac
