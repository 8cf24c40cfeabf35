#!/usr/bin/env bash
# Pretraining on several nodes with Slurm. It resumes by itself after the time limit and after a preemption:
#   sbatch scripts/slurm.sh --recipe vit_huge_in1k --dataset DATA --output_dir outputs/huge
#SBATCH --job-name=hf_mae
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -uo pipefail

# All nodes meet at the first one.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:${PORT:-29500}" \
    -m hf_mae.cli pretrain --resume auto "$@" &

# Three minutes before the limit, torchrun stops every rank. Each saves its current step, and the job is queued again.
signalled=""
trap 'signalled=yes; kill -TERM $!' USR1 TERM
wait $!
code=$?
if [ -n "$signalled" ]; then
    wait $!
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
