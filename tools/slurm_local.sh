#!/usr/bin/env bash
# A real SLURM of two nodes on this one machine, for tests that go through sbatch.
#
#   slurm_local.sh start [DIR]           install what is missing, start the daemons, wait for the nodes
#   slurm_local.sh env [DIR]             what a client needs:  eval "$(slurm_local.sh env DIR)"
#   slurm_local.sh status [DIR]          the daemons and their processes; fails unless all is well
#   slurm_local.sh stop [DIR]            cancel all jobs and end the daemons; logs and accounts stay
#   slurm_local.sh purge [DIR]           stop, and delete DIR
#   slurm_local.sh with DIR COMMAND...   start, run COMMAND as a client, purge; its exit status
#
# DIR (by default .slurm in the project) holds everything: settings, keys, the accounts' database, logs
# and process numbers. Outside of it, only /etc/hosts gets a line, until stop. All listens on loopback.
# It needs root and Debian's packages (about 75 MB, by apt), no systemd and no cgroups. Where they can not
# be had, the exit status is 69.
#
#   SLURM_LOCAL_PORT (17800)   the first of four TCP ports in a row
set -euo pipefail

readonly NODES=2 CPUS=16 MEMORY_MB=512000 GPUS=8 # claimed by each node; nothing is enforced
readonly REQUEUE_SECONDS=10                      # see cred_expire below
readonly UNAVAILABLE=69
readonly PORT=${SLURM_LOCAL_PORT:-17800}
readonly SELF=$(realpath "$0")

tell() { echo "slurm_local: $*" >&2; }
fail() { tell "$1"; exit "${2:-1}"; }

# ---- Daemons, known by process number and start time, for numbers are used again

of_stat() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f "$2"; } # 1: state, 20: start

process_of() { # NAME: its process number, if it lives
  local number born
  read -r number born 2>/dev/null <"$DIR/run/$1" || return 1
  [[ -n $born && $(of_stat "$number" 20) == "$born" && $(of_stat "$number" 1) != Z ]] && echo "$number"
}

launch() { # NAME COMMAND...
  local name=$1
  shift
  setsid nohup "$@" >>"$DIR/log/$name.out" 2>&1 </dev/null 9>&- & # 9 is the lock on DIR
  echo "$! $(of_stat $! 20)" >"$DIR/run/$name"
}

await() { # SECONDS NAME COMMAND...: until COMMAND succeeds, while the daemon lives
  local until=$((SECONDS + $1)) name=$2
  shift 2
  while ((SECONDS <= until)) && process_of "$name" >/dev/null; do
    ! "$@" >/dev/null 2>&1 || return 0
    sleep 0.05
  done
  tail -n 15 "$DIR"/log/* >&2
  fail "$name does not answer ($*); the logs above are in $DIR/log"
}

end() { # SECONDS NAME...: TERM to all, and KILL to who outlives the seconds
  local until=$((SECONDS + $1)) name number
  shift
  for name; do number=$(process_of "$name") && kill -TERM "$number" || true; done
  for name; do
    while number=$(process_of "$name"); do
      ((SECONDS <= until)) || kill -KILL "$number" || true
      sleep 0.05
    done
    rm -f "$DIR/run/$name"
  done
}

nodes() { seq -f 'sln%g' "$NODES"; }

steps() { # slurmstepd of this cluster: they outlive slurmd
  local process
  for process in /proc/[0-9]*; do
    [[ $(cat "$process/comm" 2>/dev/null) == slurmstepd ]] || continue
    tr '\0' '\n' 2>/dev/null <"$process/environ" | grep -qxF "SLURM_CONF=$DIR/slurm.conf" || continue
    echo "${process#/proc/}"
  done
}

below() { # PROCESS...: all of their descendants
  local process child
  for process; do
    for child in $(cat "/proc/$process"/task/*/children 2>/dev/null); do
      echo "$child"
      below "$child"
    done
  done
}

# ---- Packages and settings

install_packages() {
  local pair missing=() policy=/usr/sbin/policy-rc.d ours=
  for pair in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client slurmdbd:slurmdbd \
    mariadbd:mariadb-server-core mariadb:mariadb-client-core ss:iproute2 hostname:hostname; do
    command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || fail "no apt-get here to install ${missing[*]} with" $UNAVAILABLE
  tell "installing ${missing[*]}"
  # The packages' own services must not start.
  [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && ours=1; }
  local status=0
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$DIR/log/apt.out" 2>&1 </dev/null ||
    status=$?
  [[ -z $ours ]] || rm -f $policy
  ((status == 0)) || { tail -n 20 "$DIR/log/apt.out" >&2; fail "apt-get failed" $UNAVAILABLE; }
}

write_settings() {
  local host node number=0
  host=$(hostname -s)
  # Folders of jobs carry their numbers: a new cluster must not give out those of an old one again.
  [[ -s $DIR/first_job ]] || echo $(($(date +%s) % 60000000 + 1)) >"$DIR/first_job"
  # GPUs need character devices, or CUDA_VISIBLE_DEVICES is not set: copies of /dev/null do.
  local device="File=$DIR/gpu/[0-$((GPUS - 1))]"
  mkdir -p "$DIR/gpu"
  for ((number = 0; number < GPUS; number++)); do
    [[ -c $DIR/gpu/$number ]] || mknod -m 666 "$DIR/gpu/$number" c 1 3 2>/dev/null || device=
  done
  echo "Name=gpu Count=$GPUS $device" >"$DIR/gres.conf"
  # slurmd loads a plugin for cgroups though nothing uses it; this one asks nothing of the machine.
  echo CgroupPlugin=cgroup/v1 >"$DIR/cgroup.conf"
  cat >"$DIR/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials have expired: 120 seconds, if this did not say less. But
# no step begins on a machine that stands still for so long.
AuthInfo=socket=$DIR/munge/socket,cred_expire=$REQUEUE_SECONDS
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.own
SlurmdPidFile=$DIR/run/slurmd-%n.own
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
FirstJobId=$(<"$DIR/first_job")
MailProg=/bin/true
# sacct is where jobs that have ended are known, and needs slurmdbd.
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$DIR/munge/socket
# Without cgroups SLURM signals every process of a step, data workers too: stricter than most clusters.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait=20
# The order to end a step is answered when it has ended, after KillWait at most. Unanswered, slurmctld
# repeats it a minute later, when the same step of the requeued job runs again.
MessageTimeout=60
MinJobAge=3600
# Jobs of partition high take the place of those of low, which get their --signal and GraceTime.
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
END
  number=2
  for node in $(nodes); do
    echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + number++)) CPUs=$CPUS" \
      "RealMemory=$MEMORY_MB Gres=gpu:$GPUS"
  done >>"$DIR/slurm.conf"
  cat >>"$DIR/slurm.conf" <<END
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high PriorityTier=100 PreemptMode=OFF
END
  install -m 600 /dev/null "$DIR/slurmdbd.conf" # or slurmdbd refuses it
  cat >"$DIR/slurmdbd.conf" <<END
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
CommunicationParameters=NoInAddrAny
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.own
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
END
}

set_hosts() { # NAME...: the ranks look for rank 0 by the name of its node
  local mark="# slurm_local $DIR" text
  text=$(grep -vF -- "$mark" /etc/hosts; (($# == 0)) || echo "127.0.0.1 $* $mark")
  # In place: in a container the file is a mount of its own.
  [[ $text == "$(</etc/hosts)" ]] || { echo "$text" >/etc/hosts; } 2>/dev/null || tell "/etc/hosts is read-only"
}

# ---- Commands

are_up() { # NODE...
  local list="$*"
  (($(timeout 5 sinfo -h -N -p main -n "${list// /,}" -o %t | grep -cxE 'idle|mix|alloc|comp') == $#))
}

status() {
  local name number all_well=0
  [[ -s $DIR/slurm.conf ]] || return 1
  for name in munged mariadbd slurmdbd slurmctld $(nodes); do
    number=$(process_of "$name") || { number=-; all_well=1; }
    echo "$name $number"
  done
  # shellcheck disable=SC2046 # names are words
  ((all_well == 0)) && are_up $(nodes) 2>/dev/null
}

start() {
  local port node socket=$DIR/db/socket
  ! status >/dev/null || { tell "it runs in $DIR"; return; }
  ((EUID == 0)) || fail "it must be started by root" $UNAVAILABLE
  ((${#DIR} <= 60)) || fail "the paths of sockets end at 107 bytes: give a folder of at most 60, not $DIR"
  stop # what a crash has left
  mkdir -p "$DIR"/{db,log,munge,run,spool,state}
  rm -f "$DIR"/log/* "$DIR/munge/socket" "$socket"
  install_packages
  for ((port = PORT; port < PORT + NODES + 2; port++)); do
    [[ -z $(ss -Hltn "sport = :$port") ]] || fail "port $port is taken; set SLURM_LOCAL_PORT"
  done
  write_settings
  # shellcheck disable=SC2046
  set_hosts $(nodes)

  [[ -s $DIR/munge/key ]] || (umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key")
  # --force: the folders above may be closed to others.
  launch munged munged --foreground --force --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" \
    --pid-file="$DIR/run/munged.own" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed"
  await 10 munged test -S "$DIR/munge/socket"

  local database=(--no-defaults --user=root --datadir="$DIR/db/data" --innodb-log-file-size=8M
    --innodb-flush-method=nosync --innodb-flush-log-at-trx-commit=0 --sync-frm=0)
  [[ -e $DIR/db/made ]] || {
    rm -rf "$DIR/db/data"
    mariadb-install-db "${database[@]}" --auth-root-authentication-method=normal --skip-test-db \
      --skip-name-resolve >"$DIR/log/database.out" 2>&1
    touch "$DIR/db/made"
  }
  launch mariadbd mariadbd "${database[@]}" --socket="$socket" --skip-networking \
    --pid-file="$DIR/run/mariadbd.own"
  await 30 mariadbd mariadb --no-defaults --socket="$socket" -u root -e 'CREATE DATABASE IF NOT EXISTS slurm'
  MYSQL_UNIX_PORT=$socket launch slurmdbd slurmdbd -D
  await 30 slurmdbd timeout 5 sacctmgr -n list cluster
  [[ -n $(sacctmgr -n list cluster local format=cluster) ]] || sacctmgr -i add cluster local >/dev/null

  launch slurmctld slurmctld -D
  await 30 slurmctld eval 'timeout 5 scontrol ping | grep "is UP"'
  for node in $(nodes); do launch "$node" slurmd -D -N "$node"; done
  for node in $(nodes); do await 30 "$node" are_up "$node"; done
  tell "$NODES nodes are up; now: eval \"\$($SELF env $DIR)\""
}

stop() {
  local turn left
  [[ -s $DIR/slurm.conf ]] || return 0
  if process_of slurmctld >/dev/null && process_of munged >/dev/null; then
    timeout 10 scancel --user root || true
    for ((turn = 0; turn < 100; turn++)); do
      [[ -n $(timeout 5 squeue -h) ]] || break
      # A job that saves after TERM, or ignores it, is not waited for.
      # shellcheck disable=SC2046
      ((turn != 10)) || kill -KILL $(below $(steps)) 2>/dev/null || true
      sleep 0.1
    done
  fi
  # shellcheck disable=SC2046
  end 15 $(nodes)
  end 15 slurmctld
  end 15 slurmdbd
  end 30 mariadbd
  end 5 munged
  left=$(steps)
  # shellcheck disable=SC2046,SC2086
  [[ -z $left ]] || kill -KILL $(below $left) $left 2>/dev/null || true
  set_hosts
}

purge() { stop && rm -rf "$DIR"; }

readonly VERB=${1:-}
DIR=${2:-$(dirname "$SELF")/../.slurm}
case $VERB in
  start | with) mkdir -p "$DIR" ;;
  stop | purge) [[ -d $DIR ]] || exit 0 ;;
  env | status) [[ -d $DIR ]] || fail "there is nothing in $DIR" ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$SELF"; exit 2 ;;
esac
readonly DIR=$(cd "$DIR" && pwd -P)
# What the caller set for another cluster, or what a job told the caller.
unset "${!SLURM_@}" "${!SBATCH_@}" "${!SRUN_@}"
export SLURM_CONF=$DIR/slurm.conf
case $VERB in
  env) printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" && exit ;;
  status) status; exit ;;
esac
exec 9>"$DIR/lock"
flock -w 120 9 || fail "another slurm_local.sh works in $DIR"
case $VERB in
  start)
    trap stop EXIT # one that fails leaves nothing running
    start
    trap - EXIT
    ;;
  stop) (cd / && stop) ;;
  purge) (cd / && purge) ;;
  with)
    trap purge EXIT
    start
    shift 2
    "$@" 9>&-
    ;;
esac
