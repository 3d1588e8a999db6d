#!/bin/sh
# Debian's packages for the tests in SLURM; nothing where the programs are there already.
set -eu
PATH="$PATH:/usr/sbin" # where daemons live, on few users' PATH
for program in munged slurmctld slurmd sbatch shellcheck; do
    if ! command -v "$program" >/dev/null; then
        echo "$program is not installed: installing slurm-wlm, munge, shellcheck (needs root)"
        apt-get -q update
        DEBIAN_FRONTEND=noninteractive exec apt-get install -q -y --no-install-recommends \
            slurm-wlm munge shellcheck
    fi
done
