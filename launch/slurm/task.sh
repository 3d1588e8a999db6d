#!/usr/bin/env bash
# Started by srun for job.sh: one task per node with torchrun and deepspeed, one per GPU with python.
# Usage: task.sh torchrun|deepspeed|python SCRIPT [ARGUMENT ...]
set -euo pipefail
source launch/slurm/rendezvous.sh

# SLURM signals every process of the step before the time limit. The trainer handles the signal, but
# it would kill torchrun's agent and deepspeed's runner while their workers save. Child processes
# inherit the ignored signal until they install a handler.
trap '' USR1
# Seconds between torchrun's SIGTERM and SIGKILL to its workers, for saving.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

launcher=$1
shift
case $launcher in
python)
    exec python "$@"
    ;;
torchrun)
    exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
        --nproc_per_node "$PROCESSES" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
    ;;
deepspeed)
    hosts=$(mktemp)
    trap 'rm -f "$hosts"' EXIT
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$PROCESSES/" >"$hosts"
    # --no_ssh: srun has already started this script on every node.
    deepspeed --no_ssh --hostfile "$hosts" --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
    ;;
*)
    echo "task.sh: launcher '$launcher'; accepted: torchrun, deepspeed, python" >&2
    exit 2
    ;;
esac
