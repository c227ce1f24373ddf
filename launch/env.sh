# The one file to edit for a site: sourced by pipeline.sh on the login node and by stage.sbatch on every node of a job.
# shellcheck shell=bash disable=SC2034

# What `python -m compress` runs in; the same path on every node. Empty: what is on PATH already.
COMPRESS_VENV=${COMPRESS_VENV:-}

# Options of every sbatch: partition, account, quality of service, GPUs.
COMPRESS_SBATCH=${COMPRESS_SBATCH:-}          # such as "--partition=batch --account=llm --gpus-per-node=8"

# A container for every step (enroot/pyxis), and what it mounts; empty: none. Mount folders under their own names.
COMPRESS_CONTAINER=${COMPRESS_CONTAINER:-}    # such as /images/compress.sqsh
COMPRESS_MOUNTS=${COMPRESS_MOUNTS:-}          # such as /lustre:/lustre

# Seconds that a checkpoint may take; a job is told to save so long, and a minute, before its time limit.
COMPRESS_GRACE=${COMPRESS_GRACE:-300}
# Tries in a row that may pass without a newly committed step.
COMPRESS_TRIES=${COMPRESS_TRIES:-3}
# Seconds that stage=doctor may take to look at the nodes before a stage on several ranks; a job with less time goes without. 0: never.
COMPRESS_DOCTOR=${COMPRESS_DOCTOR:-600}

# The network between nodes, where NCCL or gloo choose the wrong one.
# export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

if [[ -n $COMPRESS_VENV ]]; then
  # shellcheck disable=SC1091
  source "$COMPRESS_VENV/bin/activate"
fi
