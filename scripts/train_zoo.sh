#!/usr/bin/env bash
# Trains every model of the zoo in order of descent, then puts the released ones into the package.
# Usage: scripts/train_zoo.sh DATA, an ImageFolder with train/ and test/. Hours on a few cores; run it again to go on.
set -euo pipefail
data=${1:?usage: scripts/train_zoo.sh DATA}

# train RECIPE [RUN [SETTING...]]: the run is named like the recipe unless told otherwise
train() {
    local name=${2:-$1} run=runs/${2:-$1} resume=() settings=() setting
    [ -f "$run/model.safetensors" ] && return
    [ -f "$run/checkpoint.safetensors" ] && resume=(--resume)
    for setting in "${@:3}"; do settings+=(--set "$setting"); done
    thrifty train "$1" --set data.root="$data" --set name="$name" "${settings[@]}" "${resume[@]}"
}

models=(
    resnet20-cifar10{-start,-fbs,,-long,-antidote,-lcnet,-lcnet-35,-cnet,-lnet,-any}
    resnet56-cifar10{,-long,-antidote,-lcnet}
    mcifarnet-cifar10{,-fbs,-fbs-70}
)
# What `make bench-accuracy` sets beside them; not in the package.
compared=(resnet20-cifar10{-longer,-antidote-longer,-antidote-short,-antidote-random,-antidote-any,-lcnet-short,-gumbel,-lcnet-70,-narrow} resnet{14,8}-cifar10)
# What the others start from or are taught by.
first=({resnet20,resnet56,mcifarnet}-cifar10-base mcifarnet-cifar10-{second,start} resnet20-cifar10{-start,,-long,-longer} resnet56-cifar10{,-second,-third,-antidote-start,-antidote-second})
for recipe in "${first[@]}" "${models[@]}" "${compared[@]}"; do
    train "$recipe"
done
for recipe in resnet20-cifar10-{lcnet-short,cnet,lnet,gumbel}; do
    train "$recipe" "$recipe-seed-1" seed=1 precision=bfloat16
done
halved=" resnet56-cifar10-long resnet56-cifar10-antidote " # or all would be more than 40 MB
for model in "${models[@]}"; do
    half=()
    [[ $halved == *" $model "* ]] && half=(--half)
    python scripts/release.py "runs/$model" --root "$data" "${half[@]}"
done
python scripts/readme_tables.py
