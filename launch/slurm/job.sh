# shellcheck shell=bash
# Shared by the batch scripts, which source it from the project's folder and call
#   train torchrun|deepspeed|python CONFIG [section.key=value ...]
# to train, and to requeue the job if it was interrupted and has saved.
set -euo pipefail

# The environment of `make install`; otherwise the one in which sbatch was called.
# shellcheck disable=SC1091
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# Processes per node, for launchers that start them.
export PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
MAX_RESTARTS=${MAX_RESTARTS:-100}
restarts=${SLURM_RESTART_COUNT:-0}

# The plain id of an array task may be the id of the whole array: requeueing it would restart every
# seed.
job_id=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job_id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

train() {
    local launcher=$1 config=$2 code=0 started
    shift 2
    started=$(date +%s)
    # Determined now, concurrently with training: between the signal and the time limit there may
    # be no time for Python's imports.
    exec 3< <(run_folder "$config" "$@")
    echo "job $job_id, start $((restarts + 1)) on $SLURM_JOB_NODELIST, $(date -Is)"
    export_end_time
    # srun of SLURM 22.05 and later does not inherit --cpus-per-task from sbatch.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    # After the loss of a task the others have a minute to exit. With --kill-on-bad-exit, the first
    # rank to exit with 75 would cause SLURM to kill the others during their shutdown.
    srun --kill-on-bad-exit=0 --wait=60 launch/slurm/task.sh "$launcher" \
        launch/train.py --config "$config" "$@" || code=$?
    if ((code == 0)); then return; fi
    if interrupted "$started" && ((restarts < MAX_RESTARTS)); then
        echo "job $job_id: interrupted and saved, requeued"
        scontrol requeue "$job_id" # ends this script too
    else
        echo "job $job_id: exit code $code after $restarts restarts, not requeued" >&2
        exit "$code"
    fi
}

# SLURM_JOB_END_TIME in Unix time, as later versions of SLURM set it. With it the trainer stops in
# time even if the signal came before its handler was installed.
export_end_time() {
    local end
    end=$(squeue --noheader --job "$job_id" --format %e) || return 0
    # A job without a limit has the end "NONE"; `date` would read an empty string as midnight.
    if end=$(date -d "${end:-NONE}" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$end; fi
}

# Launchers hide their workers' exit codes, so the state is read from the run folder. A job that has
# saved nothing since this start is not requeued: it fails before training, or its time limit is too
# short.
interrupted() {
    local started=$1 run state=0
    read -r run <&3 || return 1
    python launch/watch.py "$run" --once || state=$?
    ((state == 75)) || return 1
    [[ -n $(find "$run/checkpoints" -mindepth 1 -maxdepth 1 -newermt "@$started" 2>/dev/null) ]]
}

# The run folder of CONFIG and overrides; errors in them are reported by the trainer.
run_folder() {
    python - "$@" 2>/dev/null <<'EOF'
import sys
from trainer.config.config import load_config

print(load_config(sys.argv[1], sys.argv[2:]).run_folder)
EOF
}
