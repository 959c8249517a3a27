#!/usr/bin/env bash
# Trains every model of the zoo in order of descent, then puts the released ones into the package.
# Usage: scripts/train_zoo.sh DATA, an ImageFolder with train/ and test/. Hours on a few cores; run it again to go on.
set -euo pipefail
data=${1:?usage: scripts/train_zoo.sh DATA}

train() {
    local run=runs/$1
    [ -f "$run/model.safetensors" ] && return
    if [ -f "$run/checkpoint.safetensors" ]; then
        thrifty train "$1" --set data.root="$data" --resume
    else
        thrifty train "$1" --set data.root="$data"
    fi
}

for net in resnet20 mcifarnet; do
    for stage in -base "" -fbs; do
        train "$net-cifar10$stage"
    done
    for model in "$net-cifar10" "$net-cifar10-fbs"; do
        python scripts/release.py "runs/$model" --root "$data"
    done
done
python scripts/readme_tables.py
