# shellcheck shell=bash
# Who this task is and where all of them meet, from SLURM's own variables. task.sh sources it; by
# itself it is all that plain srun needs:
#   srun bash -c '. launch/slurm/rendezvous.sh; exec python launch/train.py --config ...'
MASTER_ADDR=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)
# A port of the job's own, as jobs may share a node; below the ports that the kernel hands out.
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
RANK=$SLURM_PROCID
WORLD_SIZE=$SLURM_NTASKS
LOCAL_RANK=$SLURM_LOCALID
LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*} # "8(x2)" is 8 tasks on each of 2 nodes
export MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
