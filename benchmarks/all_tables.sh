#!/usr/bin/env bash
# All comparisons of docs/results.md that have runs left, on all GPUs of a machine, within some minutes:
#
#     bash benchmarks/all_tables.sh OUT MINUTES SMOLLM2 MINILM DATA
#
# OUT begins with the results kept in benchmarks/results and is resumed. Every GPU has LANES (2) lanes of WORKERS (10)
# runs at a time, through MPS where it is there; a lane takes the next group of comparisons, the first being those that
# matter most, so that the last runs of one group are made beside the first ones of another. Also CORES of a GPU (16),
# GPUS by number, with spaces between (all), FIRST group (0). One call at a time for an OUT, which should be of today's files.
# Afterwards, here or where OUT was copied to (its results.jsonl files are enough):
#
#     bash benchmarks/all_tables.sh OUT 0 SMOLLM2 MINILM DATA && python docs/make_results.py
set -euo pipefail
out=$1 minutes=$2 smollm2=$3 minilm=$4 data=$5
here=$(dirname "$0")
attempts=lora,gradient,gradient_r1,omega,lalora_proposed,lelora_locations,activation,lelora_medium,weightlora_plus_kept,gradient_r2,gradient_ranks_r2
some=lora,gradient,omega,lalora_proposed
tasks() { for task in "$@"; do echo "$here/smollm2_$task.yaml"; done; }

group() {  # number of the group; a comparison's arguments beside OUT, in the order of what matters
    case $1 in
        0) set -- $(tasks lelora_sparse) -- ;;
        1) set -- $(tasks gsm8k arc_easy openbookqa boolq sst2 mrpc rte cola) -- --methods $attempts ;;
        2) set -- $(tasks matrices) -- ;;
        3) set -- $(tasks lelora_budget) -- ;;
        4) set -- $(tasks gsm8k arc_easy) -- --variant quarter --methods $some ;;
        5) set -- $(tasks cola mrpc rte) -- --variant quarter --methods $some ;;
        6) set -- $(tasks ablations) -- ;;
        7) set -- "$here"/minilm_{stsb,mrpc,rte}.yaml -- --variant long --methods lora,gradient,lalora_proposed ;;
        8) set -- "$here"/minilm_{sst2,cola}.yaml -- --variant long --methods lora,gradient,lalora_proposed ;;
        9) set -- $(tasks sst2 openbookqa) -- --variant quarter --methods $some ;;
        10) set -- $(tasks arc_easy sst2) -- --variant nf4 --methods lora,gradient ;;
        11) set -- $(tasks cola mrpc rte) -- --variant nf4 --methods lora,gradient ;;
        12) set -- $(tasks gsm8k) -- --variant nf4 --methods $some ;;
        13) set -- $(tasks locations) -- ;;
        *) return 1 ;;
    esac
    files=() model=$smollm2 folder=$out kept=$here/results
    while [ "$1" != -- ]; do files+=("$1"); shift; done
    shift
    if [[ ${files[0]} == *minilm_* ]]; then
        model=$minilm folder=$out/minilm kept=$kept/minilm
    fi
    options=("$@" --place "model=$model" --place "data=$data" --any-code --keep "$kept")
}

lane() {  # GPU, first of its cores
    local number cores=$2-$(($2 + ${CORES:-16} - 1))
    export CUDA_VISIBLE_DEVICES=$1
    if [ -e "$out/mps$1/pipe" ]; then
        export CUDA_MPS_PIPE_DIRECTORY=$out/mps$1/pipe CUDA_VISIBLE_DEVICES=0
    fi
    while number=$(flock "$out/groups" sh -c 'read n < "$0"; echo $((n + 1)) > "$0"; echo $n' "$out/groups") && group "$number"; do
        left=$(((ends - $(date +%s)) / 60))
        [ $left -gt 0 ] || return 0
        OMP_NUM_THREADS=1 taskset -c "$cores" python -m launch.main compare "${files[@]}" "$folder" "${options[@]}" \
            --workers "${WORKERS:-10}" --minutes "$left" >> "$out/group$number.log" 2>&1 || echo "group $number failed: $out/group$number.log"
    done
}

mkdir -p "$out"
out=$(cd "$out" && pwd)
cp -rn "$here"/results/. "$out"
if [ "$minutes" = 0 ]; then
    number=0
    while group $number; do
        python -m launch.main compare "${files[@]}" "$folder" "${options[@]}" --minutes 0 > /dev/null
        number=$((number + 1))
    done
    exit
fi
ends=$(($(date +%s) + minutes * 60))
echo "${FIRST:-0}" > "$out/groups"
gpus=${GPUS:-$(nvidia-smi -L | awk '{print NR - 1}')} lanes=()
for gpu in $gpus; do
    if command -v nvidia-cuda-mps-control > /dev/null; then
        mkdir -p "$out/mps$gpu/pipe" "$out/mps$gpu/log"
        CUDA_VISIBLE_DEVICES=$gpu CUDA_MPS_PIPE_DIRECTORY=$out/mps$gpu/pipe CUDA_MPS_LOG_DIRECTORY=$out/mps$gpu/log nvidia-cuda-mps-control -d
    fi
    for _ in $(seq "${LANES:-2}"); do
        lane "$gpu" $((gpu * ${CORES:-16})) &
        lanes+=($!)
    done
done
wait "${lanes[@]}"
for gpu in $gpus; do
    pipe=$out/mps$gpu/pipe
    [ ! -e "$pipe" ] || echo quit | CUDA_MPS_PIPE_DIRECTORY=$pipe nvidia-cuda-mps-control || true
done
