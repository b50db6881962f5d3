#!/usr/bin/env bash
# Labels without Ray: every task of a Slurm array labels one part, in a copy of the run of its own, since several machines
# must not write one SQLite file on a network disk. The stages menu and adapt have to be done (`layerbudget adapt CONFIG`).
#
#     sbatch --array=1-8 examples/label_array.sh configs/mine.yaml mine
#     layerbudget merge configs/mine.yaml runs-*/mine/labels.db    # when all tasks are done
#     layerbudget run configs/mine.yaml                            # goes on with the labels
#
# A task that was killed goes on where it was: `sbatch --array=3 ...` with SHARDS=8.
#SBATCH --job-name=label
#SBATCH --output=label-%a.log
set -euo pipefail
config=$1
name=$2
part=$SLURM_ARRAY_TASK_ID
shards=${SHARDS:-$SLURM_ARRAY_TASK_COUNT}

if [ ! -d "runs-$part/$name" ]; then
  mkdir -p "runs-$part"
  cp -r "runs/$name" "runs-$part/$name.unfinished"
  mv "runs-$part/$name.unfinished" "runs-$part/$name"
fi
layerbudget label "$config" --set runs="runs-$part" --shard "$part/$shards"
