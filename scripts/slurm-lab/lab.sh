# What `up` and `down` agree on: where the lab lies, how large it is, and which processes are its own. To be sourced.

LAB=${SLURMLAB:-${TMPDIR:-/tmp}/runner-slurm-lab}
NODES=${SLURMLAB_NODES:-4}        # virtual nodes n1 n2 …, all of them this machine
NODE_CPUS=${SLURMLAB_CPUS:-4}     # what each of them claims to have
NODE_MB=${SLURMLAB_MB:-4000}
NODE_GPUS=${SLURMLAB_GPUS:-2}
FIRST_PORT=${SLURMLAB_PORT:-17800}
MARK="# slurm-lab in $LAB"        # ends our line of /etc/hosts

export SLURM_CONF=$LAB/etc/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "slurm-lab: $*" >&2
    exit 1
}

# Whether the process of this number is there, is called so, and has not ended: numbers are given away again.
is_called() {
    [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null
}

# runs NAME: whether that daemon of this lab runs (slurmd-n3 is a slurmd).
runs() {
    local number
    number=$(cat "$LAB/run/$1.pid" 2>/dev/null) && is_called "$number" "${1%%-*}"
}

# within SECONDS COMMAND…: try until it succeeds.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}
