# shellcheck shell=bash
# What the batch scripts share. They source it from the project's folder and call
#   train torchrun|deepspeed|python CONFIG [section.key=value ...]
# which trains, and puts the job back into the queue if it was interrupted and has saved.
set -euo pipefail

# `make install` puts the environment here; otherwise the one that sbatch was called in is used.
# shellcheck disable=SC1091
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# Processes on each node, for the launchers that start them themselves.
export PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
MAX_RESTARTS=${MAX_RESTARTS:-100}
restarts=${SLURM_RESTART_COUNT:-0}

# The plain id of one of an array's tasks is the id of the whole array: requeueing that would
# restart every seed.
job_id=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job_id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

train() {
    local launcher=$1 config=$2 code=0 started
    shift 2
    started=$(date +%s)
    # Looked up now, beside the start of the training: between the signal and the time limit the
    # seconds that Python's imports take are short.
    exec 3< <(run_folder "$config" "$@")
    echo "job $job_id, start $((restarts + 1)) on $SLURM_JOB_NODELIST, $(date -Is)"
    export_end_time
    # srun of SLURM 22.05 and later does not take --cpus-per-task over from sbatch.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    # When a task is lost, the others get a minute to notice; with --kill-on-bad-exit the first
    # rank that leaves with 75 would have the others killed on their way out.
    srun --kill-on-bad-exit=0 --wait=60 launch/slurm/task.sh "$launcher" \
        launch/train.py --config "$config" "$@" || code=$?
    if ((code == 0)); then return; fi
    if interrupted "$started" && ((restarts < MAX_RESTARTS)); then
        echo "job $job_id: interrupted and saved, back into the queue"
        scontrol requeue "$job_id" # ends this script too
    else
        echo "job $job_id: exit code $code after $restarts restarts, not requeued" >&2
        exit "$code"
    fi
}

# In seconds since 1970, as later versions of SLURM set it themselves. By this the trainer stops in
# time even where the signal came before it could listen.
export_end_time() {
    local end
    end=$(squeue --noheader --job "$job_id" --format %e) || return 0
    # A job without a limit has no end ("NONE"); and to date, an empty one would be midnight.
    if end=$(date -d "${end:-NONE}" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$end; fi
}

# Launchers hide their workers' exit code, so the run itself is asked. Where this start has saved
# nothing new, the next one would not either: a job that fails before it trains, or whose time limit
# is too short to get that far, is not requeued.
interrupted() {
    local started=$1 run state=0
    read -r run <&3 || return 1
    python launch/watch.py "$run" --once || state=$?
    ((state == 75)) || return 1
    [[ -n $(find "$run/checkpoints" -mindepth 1 -maxdepth 1 -newermt "@$started" 2>/dev/null) ]]
}

# The folder that CONFIG and overrides name; mistakes in them are the trainer's to report.
run_folder() {
    python - "$@" 2>/dev/null <<'EOF'
import sys
from trainer.config import load_config

print(load_config(sys.argv[1], sys.argv[2:]).run_folder)
EOF
}
