#!/usr/bin/env bash
# A real Slurm cluster on one machine: munged, slurmctld and N slurmd, without touching /etc or the machine's own Slurm.
# Every node has its own network namespace (address, ports) and UTS namespace (hostname), so that rendezvous, ports
# and hostnames behave as on N machines.
#
#   cluster.sh install          the daemons, with apt-get (Debian, Ubuntu)
#   cluster.sh up [N]           start N nodes, 3 by default, and wait until they are idle
#   eval "$(cluster.sh env)"    SLURM_CONF for sbatch, squeue and scontrol
#   cluster.sh cut NODE         a power cut: the network first, then every process; its peers hear nothing
#   cluster.sh crash NODE       every process dies; its peers hear at once
#   cluster.sh freeze NODE      its slurmd hangs; the job's processes live on and reach everybody
#   cluster.sh slow NODE RATE   a bad cable: it receives at RATE (10mbit), until it is slowed to RATE 0
#   cluster.sh quota NODE PERCENT  what runs there, and what it starts, gets so much of one core, until PERCENT is 0
#   cluster.sh boot NODE        after cut, crash or freeze: a fresh slurmd
#   cluster.sh forget ID        the controller forgets every job, and the next one gets this number
#   cluster.sh down             stop everything and remove it
#
#   cluster.sh can              whether this machine lets us: root with CAP_NET_ADMIN and CAP_SYS_ADMIN
#
# CLUSTER_DIR: configuration, state and logs. PROCTRACK: cgroup or pgid.
set -euo pipefail
dir=${CLUSTER_DIR:-/tmp/slurm-cluster}
net=10.99.77 bridge=slurmbr0 # the controller is .1, node I is .10 + I
cpus=4 gpus=2                # of a node; pretended
# How Slurm finds a step's processes. Under cgroup, which real clusters use, and under pgid --signal reaches only what
# srun started, never torchrun's workers. linuxproc would reach them too, and hide what fails in production.
proctrack=${PROCTRACK:-$(if [ -w /sys/fs/cgroup/freezer ]; then echo cgroup; else echo pgid; fi)}
export SLURM_CONF=$dir/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin

install_daemons() {
    if type -P slurmctld slurmd munged ip > /dev/null; then return; fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge iproute2 util-linux
}

can() { # whether a cluster can be started here, or one line that says why not
    local tool
    [ "$(id -u)" = 0 ] || { echo "needs root"; return 1; }
    for tool in slurmctld slurmd munged ip nsenter sbatch; do
        type -P "$tool" > /dev/null || { echo "$tool is missing: tests/slurm/cluster.sh install"; return 1; }
    done
    unshare --net --uts --mount true 2> /dev/null || { echo "may not make namespaces (CAP_SYS_ADMIN)"; return 1; }
    # shellcheck disable=SC2016
    unshare --net ip link add probe0 type bridge 2> /dev/null || { echo "may not make a bridge (CAP_NET_ADMIN)"; return 1; }
}

configure() { # N
    local n=$1 i
    mkdir -p "$dir"/{state,spool,log,dev,run}
    chmod 755 "$dir"
    {
        echo "127.0.0.1 localhost"
        echo "$net.1 $(hostname -s)"
        for ((i = 1; i <= n; i++)); do echo "$net.$((10 + i)) node$i"; done
    } > "$dir/hosts"
    echo "hosts: files" > "$dir/nsswitch.conf" # a node reaches no name server: a lookup would hang for 10 s
    for ((i = 0; i < gpus; i++)); do           # character devices are enough for Slurm to count and hand out
        [ -e "$dir/dev/nvidia$i" ] || mknod "$dir/dev/nvidia$i" c 1 3
    done
    echo "NodeName=node[1-$n] Name=gpu File=$dir/dev/nvidia[0-$((gpus - 1))]" > "$dir/gres.conf"
    [ "$proctrack" != cgroup ] || echo "CgroupPlugin=cgroup/v1" > "$dir/cgroup.conf"
    cat > "$SLURM_CONF" << CONF
ClusterName=test
SlurmctldHost=$(hostname -s)($net.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits for as long as credentials live: 120 s by default, 5 s at least
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/$proctrack
# no binding to CPUs: a node pretends to more than there are
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=500
SlurmdParameters=config_overrides
ReturnToService=2
# short, so that tests need not wait for minutes
KillWait=10
SlurmdTimeout=10
MessageTimeout=5
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
NodeName=DEFAULT CPUs=$cpus RealMemory=4000 State=UNKNOWN Gres=gpu:$gpus
$(for ((i = 1; i <= n; i++)); do echo "NodeName=node$i NodeHostName=node$i NodeAddr=$net.$((10 + i))"; done)
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=grace Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 State=UP
CONF
}

boot() { # NODE
    local name=$1 ns=slurm-$1 i=${1#node}
    kill_namespace "$ns"
    if ! ip netns list | grep -qw "$ns"; then
        ip netns add "$ns"
        ip link add "slurmv$i" type veth peer name eth0 netns "$ns"
        ip link set "slurmv$i" master "$bridge"
        ip -n "$ns" link set lo up
        ip -n "$ns" addr add "$net.$((10 + i))/24" dev eth0
        ip -n "$ns" link set eth0 up
    fi
    ip link set "slurmv$i" up
    mkdir -p "$dir/spool/$name"
    # nsenter: `ip netns exec` would hide /sys/fs/cgroup, which slurmd wants to see
    # shellcheck disable=SC2016
    nsenter --net="/run/netns/$ns" unshare --uts --mount bash -c '
        hostname "$0" && mount --bind "$1/hosts" /etc/hosts &&
        mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf &&
        exec slurmd -b -N "$0" -f "$1/slurm.conf"' "$name" "$dir"
}

up() { # N
    local n=${1:-3} i
    down
    configure "$n"
    # a fixed MAC: a bridge otherwise takes its ports' lowest one, and the nodes would know the controller by an old one
    ip link add "$bridge" address 02:51:52:4d:00:01 type bridge
    ip addr add "$net.1/24" dev "$bridge"
    ip link set "$bridge" up
    (umask 077 && head -c 128 /dev/urandom > "$dir/run/munge.key")
    munged --key-file="$dir/run/munge.key" --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed" --num-threads=2
    slurmctld -c -f "$SLURM_CONF"
    for ((i = 1; i <= n; i++)); do boot "node$i"; done
    wait_until_idle "$n"
}

wait_until_idle() { # N
    local waited
    for ((waited = 0; waited < 100; waited++)); do
        if [ "$(sinfo -h -N -p main -t idle -o %N 2> /dev/null | wc -l)" = "$1" ]; then return; fi
        sleep 0.2
    done
    echo "the nodes are not idle after 20 s; logs in $dir/log" >&2
    return 1
}

forget() { # ID
    kill_pidfile "$dir/run/slurmctld.pid"
    rm -rf "$dir/state" && mkdir "$dir/state"
    sed -i '/^FirstJobId=/d' "$SLURM_CONF" && echo "FirstJobId=$1" >> "$SLURM_CONF"
    slurmctld -c -f "$SLURM_CONF"
    wait_until_idle "$(grep -c '^NodeName=node' "$SLURM_CONF")"
}

quota() { # NODE PERCENT
    local group=/sys/fs/cgroup/cpu/slurm-$1 pid
    mkdir -p "$group"
    echo $(($2 > 0 ? $2 * 1000 : -1)) > "$group/cpu.cfs_quota_us" # of a period of 100 ms
    for pid in $(ip netns pids "slurm-$1"); do echo "$pid" > "$group/cgroup.procs" || true; done
}

kill_namespace() { # NAMESPACE
    local pids
    pids=$(ip netns pids "$1" 2> /dev/null) || return 0
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill -9 $pids 2> /dev/null || true
}

kill_pidfile() {
    local pid waited
    [ -s "$1" ] || return 0
    pid=$(cat "$1")
    kill "$pid" 2> /dev/null || return 0
    for ((waited = 0; waited < 50; waited++)); do
        kill -0 "$pid" 2> /dev/null || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2> /dev/null || true
}

down() {
    local ns
    kill_pidfile "$dir/run/slurmctld.pid"
    for ns in $(ip netns list | awk '/^slurm-node/ { print $1 }'); do
        kill_namespace "$ns"
        ip link del "slurmv${ns#slurm-node}" 2> /dev/null || true
        ip netns del "$ns"
        find "/sys/fs/cgroup/freezer/slurm_${ns#slurm-}" -depth -type d -exec rmdir {} \; 2> /dev/null || true
    done
    rmdir /sys/fs/cgroup/cpu/slurm-node* 2> /dev/null || true
    kill_pidfile "$dir/run/munged.pid"
    ip link del "$bridge" 2> /dev/null || true
    if grep -qs '^ClusterName=test$' "$SLURM_CONF"; then rm -rf "$dir"; fi
}

case ${1:-} in
    install) install_daemons ;;
    can) can ;;
    up) up "${2:-3}" ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    cut)
        ip link set "slurmv${2#node}" down
        kill_namespace "slurm-$2"
        ;;
    crash) kill_namespace "slurm-$2" ;;
    freeze) kill -STOP "$(cat "$dir/run/slurmd-$2.pid")" ;;
    quota) quota "$2" "$3" ;;
    slow)
        tc qdisc del dev "slurmv${2#node}" root 2> /dev/null || true
        [ "$3" = 0 ] || tc qdisc add dev "slurmv${2#node}" root tbf rate "$3" burst 256kb latency 400ms
        ;;
    boot) boot "$2" ;;
    forget) forget "$2" ;;
    down) down ;;
    *)
        sed -n '2,/^set /{/^#/p}' "$0"
        exit 2
        ;;
esac
