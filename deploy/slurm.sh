#!/usr/bin/env bash
# Builds on a Slurm cluster: sbatch deploy/slurm.sh recipes/llama3-70b.yaml [MORE RECIPES OR OPTIONS]
# Recipes, sources, cache and store lie on the cluster's shared file system; the environment has quantize-models[ray,all].
# A job that runs out of time, or is preempted and requeued, goes on at the last finished block.
#SBATCH --job-name=quantize
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

export RAY_USAGE_STATS_ENABLED=0
export QUANTIZE_CACHE=${QUANTIZE_CACHE:?a folder on the shared file system}
export QUANTIZE_STORE=${QUANTIZE_STORE:?a folder on the shared file system}
gpus=${SLURM_GPUS_ON_NODE:-0}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
ray=(ray start --block --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="$gpus" --disable-usage-stats)

srun --nodes=1 --ntasks=1 --nodelist="$head" "${ray[@]}" --head --port="$port" --include-dashboard=false &
for _ in $(seq 60); do
  ray status --address="$head:$port" >/dev/null 2>&1 && break
  sleep 2
done
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  srun --nodes="$others" --ntasks="$others" --exclude="$head" "${ray[@]}" --address="$head:$port" &
fi
for _ in $(seq 60); do
  joined=$(ray status --address="$head:$port" 2>/dev/null | grep -c '^ 1 node_') || true
  [ "$joined" -ge "$SLURM_JOB_NUM_NODES" ] && break
  sleep 2
done

device=cpu
[ "$gpus" -gt 0 ] && device=cuda
quantize build "$@" --cluster "$head:$port" --device "$device"
