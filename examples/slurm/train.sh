#!/bin/bash
# Trains on several nodes, saves before the time limit, and goes on in the same job until the training is done:
#     sbatch examples/slurm/train.sh imagenet-base --data latents --out runs/base
# All nodes need the same folders. Options of sbatch before the script's name override those below.
#SBATCH --job-name mar
#SBATCH --nodes 4
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 24:00:00
#SBATCH --signal B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode append
set -u
limit_near=
# Slurm warns this script, which asks the training to save. torchrun gives its processes 30 seconds, or as many as here.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120
trap 'limit_near=yes; scancel --signal TERM "$SLURM_JOB_ID.0"' USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "${MAR_RENDEZVOUS:-$first:29500}" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m mar train "$@" &
# A signal ends the first wait; the last one has the training's exit code.
wait $!
code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
if [ -n "$limit_near" ] && [ "$code" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
