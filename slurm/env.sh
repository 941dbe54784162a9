# Text of every task of train.sbatch, on every node: makes `mmtrain` runnable there.
# Choose one: an environment on a shared file system (the default: .venv of the folder that the job
# was submitted from), modules of your site, or a container (see README.md). Keep it quick.

# module load cuda/13.0

if [ -z "${MMTRAIN_WRAPPER:-}" ] && [[ "${MMTRAIN_SRUN:-}" != *--container-image* ]]; then
    venv=${MMTRAIN_VENV:-$PWD/.venv}
    if [ ! -x "$venv/bin/python" ]; then
        echo "env.sh: no Python at $venv/bin on $(hostname); run 'make setup' or set MMTRAIN_VENV" >&2
        exit 66 # an input is missing
    fi
    PATH=$venv/bin:$PATH
fi

export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
# one compiled helper for each node: a shared folder leaves stale locks that hang every later start
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-/tmp/mmtrain-ext-$(id -u)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# export NCCL_SOCKET_IFNAME=ib0    # the fast network, when NCCL picks another
# export NCCL_DEBUG=WARN
