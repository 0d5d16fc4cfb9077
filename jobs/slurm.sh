#!/bin/bash
# A job in 16 shards, each a task of a Slurm array:
#
#     sbatch jobs/slurm.sh jobs/cpu.yaml        what follows goes to `batchclf run`
#     batchclf status OUTPUT --watch            how far each shard is, from any machine
#     batchclf merge OUTPUT                     one predictions.jsonl, when all are complete
#
# Input and output are on storage that all nodes reach. A minute before its time is up a task
# commits what it has, and is queued again; it goes on where it was, also after a node's death.
#SBATCH --job-name=batchclf
#SBATCH --array=0-15
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=batchclf-%A_%a.log
# For provider cuda, and the driver's libraries with it: #SBATCH --gpus-per-task=1

srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" batchclf run "$@"
code=$?
# 143: stopped by a signal, all committed. A job that somebody cancelled is not queued again.
if [ "$code" -eq 143 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
