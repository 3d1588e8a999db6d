# shellcheck shell=bash
# Rank variables and rendezvous address from SLURM's variables. task.sh sources it; plain srun needs
# nothing else:
#   srun bash -c '. launch/slurm/rendezvous.sh; exec python launch/train.py --config ...'
MASTER_ADDR=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)
# A port derived from the job id, as jobs may share a node; below the kernel's ephemeral ports.
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
RANK=$SLURM_PROCID
WORLD_SIZE=$SLURM_NTASKS
LOCAL_RANK=$SLURM_LOCALID
LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} # "8(x2)" is 8 tasks on each of 2 nodes
export MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
