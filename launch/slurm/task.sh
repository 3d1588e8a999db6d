#!/usr/bin/env bash
# What srun starts for job.sh: one a node with torchrun and deepspeed, one a GPU with python.
# Usage: task.sh torchrun|deepspeed|python SCRIPT [ARGUMENT ...]
set -euo pipefail
source launch/slurm/rendezvous.sh

# The signal before the time limit goes to every process of the step. The trainer handles it, but
# torchrun's agent and deepspeed's runner die of it while their workers are saving. A signal that is
# ignored here stays ignored in every program started here, until it installs a handler.
trap '' USR1
# What torchrun gives its workers to save when it is told to end (SIGTERM) before it kills them.
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
    # --no_ssh: srun has started us on every node already.
    deepspeed --no_ssh --hostfile "$hosts" --node_rank "$SLURM_NODEID" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
    ;;
*)
    echo "task.sh: launcher '$launcher'; accepted: torchrun, deepspeed, python" >&2
    exit 2
    ;;
esac
