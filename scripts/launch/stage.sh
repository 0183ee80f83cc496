#!/usr/bin/env bash
# One stage of training on this machine's GPUs, or on several machines; run it in the repository's root.
#
#   scripts/launch/stage.sh masks fsdp2 model=meta-llama/Llama-3.1-8B output_dir=runs/masks
#   scripts/launch/stage.sh masks_and_weights zero3 output_dir=runs/both
#   scripts/launch/stage.sh sft zero3 sparse=runs/masks/artefact output_dir=runs/sft
#
# STAGE is a file of configs/train, ENGINE one of configs/accelerate (ddp, fsdp2, zero1, zero2, zero3).
# NUM_GPUS (default: all) are those of one machine. On several: NUM_NODES, NODE_RANK and MAIN_ADDRESS on each.
set -euo pipefail
if (($# < 2)); then
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
stage=$1 engine=$2
shift 2
gpus=${NUM_GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
nodes=${NUM_NODES:-1}
config=configs/accelerate/$engine.yaml
where=()
if ((nodes > 1)); then
  config=configs/accelerate/${engine}_2nodes.yaml
  where=(--num_machines "$nodes" --machine_rank "${NODE_RANK:?rank of this node, from 0}"
    --main_process_ip "${MAIN_ADDRESS:?address of node 0}")
fi
exec accelerate launch --config_file "$config" --num_processes $((gpus * nodes)) ${where[@]+"${where[@]}"} \
  scripts/train.py "configs/train/$stage.yaml" "num_processes=$((gpus * nodes))" "$@"
