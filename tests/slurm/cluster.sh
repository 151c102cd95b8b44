# shellcheck shell=bash
# A Slurm cluster of two nodes on one machine, for tests. Sourced by bash; needs root.
#
#   cluster_obstacle                            prints why there can be none here, fails when there can be one
#   cluster_enter DIRECTORY COMMAND [ARG...]    runs COMMAND in namespaces of its own and returns its status;
#                                               there CLUSTER=DIRECTORY, an empty tmpfs
#   cluster_start                               inside: starts munged, slurmctld and the slurmd of nodes n1 and n2
#   cluster_logs                                inside: prints the ends of the daemons' logs
#
# Everything lives in private namespaces (processes, mounts, network, host name, IPC), so ports and sockets cannot meet
# those of a Slurm that the machine runs already; and when COMMAND ends, or is killed, the kernel ends every process
# and drops every mount, with the files, that it left.
#
# Choices: proctrack/pgid and task/none need no cgroups. Each node has a host name, and by TmpFS a temporary directory:
# in a common one the PMIx servers of the two nodes collide. Ranks of different nodes share no memory on a real cluster;
# Open MPI, which would find that they could, is held to TCP.

export PATH="$PATH:/usr/sbin:/sbin"

cluster_obstacle() {
  local tool
  for tool in munged slurmctld slurmd sbatch srun scontrol ip unshare setpriv; do
    command -v "$tool" >/dev/null || { echo "$tool is not installed"; return 0; }
  done
  [ "$(id -u)" = 0 ] || { echo "only root can start slurmd and make namespaces"; return 0; }
  unshare --mount --pid --net --uts --ipc --fork --mount-proc true 2>/dev/null ||
    { echo "namespaces are not permitted here"; return 0; }
  return 1
}

# Killed from outside, each process of the chain takes the next along: --pdeathsig, --kill-child, the end of process 1.
cluster_enter() {
  local directory=$1 child status
  shift
  mkdir -p "$directory" || return 1
  CLUSTER=$directory setpriv --pdeathsig KILL \
    unshare --mount --pid --net --uts --ipc --fork --kill-child --mount-proc "$@" &
  child=$!
  trap 'kill -KILL $child 2>/dev/null; wait $child 2>/dev/null; rmdir "$directory"; exit 1' INT TERM HUP
  wait "$child"
  status=$?
  trap - INT TERM HUP
  rmdir "$directory"
  return "$status"
}

cluster_configure() {
  cat >"$CLUSTER/slurm.conf" <<END
ClusterName=test
SlurmctldHost=n1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$CLUSTER/munge/socket
StateSaveLocation=$CLUSTER/state
SlurmdSpoolDir=$CLUSTER/spool-%n
SlurmctldPidFile=$CLUSTER/slurmctld.pid
SlurmdPidFile=$CLUSTER/slurmd-%n.pid
SlurmctldLogFile=$CLUSTER/slurmctld.log
SlurmdLogFile=$CLUSTER/slurmd-%n.log
TmpFS=$CLUSTER/tmp-%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
NodeName=n1 Port=17001 CPUs=2 RealMemory=1000
NodeName=n2 Port=17002 CPUs=2 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
END
}

# The network of the namespace. Slurm resolves names with AI_ADDRCONFIG, which wants an address besides 127.0.0.1.
cluster_network() {
  printf '127.0.0.1 localhost\n10.77.0.1 n1\n10.77.0.2 n2\n' >"$CLUSTER/hosts"
  mount --bind "$CLUSTER/hosts" /etc/hosts && hostname n1 && ip link set lo up &&
    ip address add 10.77.0.1/32 dev lo && ip address add 10.77.0.2/32 dev lo
}

cluster_munge() {
  local directory=$CLUSTER/munge
  mkdir "$directory" && (umask 077 && head -c 1024 /dev/urandom >"$directory/key")
  munged --socket="$directory/socket" --key-file="$directory/key" --pid-file="$directory/pid" \
    --log-file="$directory/log" --seed-file="$directory/seed"
}

cluster_node() {
  mkdir "$CLUSTER/tmp-$1" "$CLUSTER/spool-$1"
  unshare --mount --uts --ipc sh -c 'hostname "$0" && exec slurmd -N "$0" -f "$SLURM_CONF"' "$1"
}

cluster_wait_idle() {
  local _
  for _ in $(seq 60); do
    [ "$(timeout 5 sinfo --noheader --partition=main --states=idle --format=%D 2>/dev/null)" = 2 ] && return 0
    sleep 0.5
  done
  return 1
}

cluster_start() {
  export SLURM_CONF="$CLUSTER/slurm.conf"
  export OMPI_MCA_btl=self,tcp OMPI_MCA_btl_tcp_if_include=lo
  mount -t tmpfs -o mode=755 antiphon-test "$CLUSTER" && mkdir "$CLUSTER/state" && cluster_network &&
    cluster_configure && cluster_munge && slurmctld -f "$SLURM_CONF" && cluster_node n1 && cluster_node n2 &&
    cluster_wait_idle
}

cluster_logs() {
  tail -n 20 -v "$CLUSTER/slurmctld.log" "$CLUSTER/slurmd-n1.log" "$CLUSTER/slurmd-n2.log" "$CLUSTER/munge/log"
}
