#!/usr/bin/env bash
# SD3.5 with STAR in VeRL-Omni, on one node or several. Run it in a checkout of VeRL-Omni (its reward is found by a
# relative path), with star-kernels installed in VeRL-Omni's environment:
#
#   one node, 2 GPUs that train and 1 for the reward:     bash .../examples/verl-omni/run.sh
#   two nodes of 8 GPUs that train, and 1 for the reward:
#     first node:    ray start --head --num-gpus=8
#     second node:   ray start --address=FIRST_NODE:6379 --num-gpus=8
#     third node:    ray start --address=FIRST_NODE:6379 --num-gpus=1
#     first node:    NNODES=2 GPUS_PER_NODE=8 RAY_ADDRESS=auto bash .../examples/verl-omni/run.sh
#
# Nodes share the data, this folder and the checkout under the same paths. Arguments override settings of star.yaml:
# run.sh trainer.total_training_steps=300
set -euo pipefail

# The folder of this script: of star.yaml and star_plugin.py.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Where data/ocr/sd3/train.parquet is.
export WORKSPACE=${WORKSPACE:-$HOME}

# Nodes and GPUs that train and roll out; the reward's GPUs come in addition.
export NNODES=${NNODES:-1}
export GPUS_PER_NODE=${GPUS_PER_NODE:-2}
export REWARD_GPUS=${REWARD_GPUS:-1}
export GPUS=$((NNODES * GPUS_PER_NODE))

# Work of a GPU stays the same on any number of them: 4 prompts of a rollout and 2 of an update for each.
export PROMPTS=$((4 * GPUS))
export PROMPTS_PER_UPDATE=$((2 * GPUS))

# Lets Python find star_plugin; star.yaml passes it on to the workers of every node.
export PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH}

# --config-dir adds this folder to the folders in which VeRL-Omni's command looks for configurations.
exec python3 -m verl_omni.trainer.main_diffusion --config-dir "$HERE" --config-name star "$@"
