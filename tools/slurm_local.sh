#!/usr/bin/env bash
# Run a real SLURM with two nodes on this machine, for tests that use sbatch.
#
#   slurm_local.sh start [DIR]           install missing packages, start the daemons, wait for the nodes
#   slurm_local.sh env [DIR]             print a client's environment:  eval "$(slurm_local.sh env DIR)"
#   slurm_local.sh status [DIR]          print the daemons and their process ids; fail unless all run
#   slurm_local.sh stop [DIR]            cancel all jobs and stop the daemons; keep logs and accounts
#   slurm_local.sh purge [DIR]           stop, and delete DIR
#   slurm_local.sh with DIR COMMAND...   start, run COMMAND as a client, purge; exit with its status
#
# DIR (default: .slurm in the project) holds all files: settings, keys, the accounting database, logs and
# process ids. Outside of DIR, only /etc/hosts gets a line, which stop removes. All daemons listen on
# loopback only. The script needs root and Debian packages (about 75 MB, installed by apt), but no systemd
# and no cgroups. Without root or the packages, the exit status is 69.
#
#   SLURM_LOCAL_PORT (default: 17800)   first of four consecutive TCP ports
set -euo pipefail

readonly NODES=2 CPUS=16 MEMORY_MB=512000 GPUS=8 # of each node; no limit is enforced
readonly REQUEUE_SECONDS=10                      # see cred_expire below
readonly UNAVAILABLE=69
readonly PORT=${SLURM_LOCAL_PORT:-17800}
readonly SELF=$(realpath "$0")

report() { echo "slurm_local: $*" >&2; }
fail() { report "$1"; exit "${2:-1}"; }

# ---- Daemons are identified by process id and start time, because ids are used again

stat_field() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f "$2"; } # 1: state, 20: start

pid_of() { # NAME: print the process id of a running daemon
  local pid start_time
  read -r pid start_time 2>/dev/null <"$DIR/run/$1" || return 1
  [[ -n $start_time && $(stat_field "$pid" 20) == "$start_time" ]] || return 1
  [[ $(stat_field "$pid" 1) != Z ]] && echo "$pid"
}

launch() { # NAME COMMAND...: start a daemon
  local name=$1
  shift
  setsid nohup "$@" >>"$DIR/log/$name.out" 2>&1 </dev/null 9>&- & # 9 is the lock on DIR
  echo "$! $(stat_field $! 20)" >"$DIR/run/$name"
}

await() { # SECONDS NAME COMMAND...: repeat COMMAND until it succeeds, while the daemon runs
  local until=$((SECONDS + $1)) name=$2
  shift 2
  while ((SECONDS <= until)) && pid_of "$name" >/dev/null; do
    ! "$@" >/dev/null 2>&1 || return 0
    sleep 0.05
  done
  tail -n 15 "$DIR"/log/* >&2
  fail "$name does not answer ($*); the logs above are in $DIR/log"
}

terminate() { # SECONDS NAME...: send TERM to daemons, and KILL to those that still run after SECONDS
  local until=$((SECONDS + $1)) name pid
  shift
  for name; do pid=$(pid_of "$name") && kill -TERM "$pid" || true; done
  for name; do
    while pid=$(pid_of "$name"); do
      ((SECONDS <= until)) || kill -KILL "$pid" || true
      sleep 0.05
    done
    rm -f "$DIR/run/$name"
  done
}

nodes() { seq -f 'sln%g' "$NODES"; }

step_pids() { # print the ids of this cluster's slurmstepd processes, which outlive slurmd
  local process
  for process in /proc/[0-9]*; do
    [[ $(cat "$process/comm" 2>/dev/null) == slurmstepd ]] || continue
    tr '\0' '\n' 2>/dev/null <"$process/environ" | grep -qxF "SLURM_CONF=$DIR/slurm.conf" || continue
    echo "${process#/proc/}"
  done
}

descendants() { # PROCESS...: print the ids of all their descendants
  local process child
  for process; do
    for child in $(cat "/proc/$process"/task/*/children 2>/dev/null); do
      echo "$child"
      descendants "$child"
    done
  done
}

# ---- Packages and settings

install_packages() {
  local pair missing=() policy=/usr/sbin/policy-rc.d created=
  for pair in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client slurmdbd:slurmdbd \
    mariadbd:mariadb-server-core mariadb:mariadb-client-core ss:iproute2 hostname:hostname; do
    command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || fail "there is no apt-get to install ${missing[*]}" $UNAVAILABLE
  report "installing ${missing[*]}"
  # With this policy, the packages do not start their own services.
  [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && created=1; }
  local status=0
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$DIR/log/apt.out" 2>&1 </dev/null ||
    status=$?
  [[ -z $created ]] || rm -f $policy
  ((status == 0)) || { tail -n 20 "$DIR/log/apt.out" >&2; fail "apt-get failed" $UNAVAILABLE; }
}

write_settings() {
  local host node number=0
  host=$(hostname -s)
  # Job folders are named by job ids, so a new cluster must not assign the ids of an old one again.
  [[ -s $DIR/first_job ]] || echo $(($(date +%s) % 60000000 + 1)) >"$DIR/first_job"
  # SLURM sets CUDA_VISIBLE_DEVICES only for character devices; copies of /dev/null are enough.
  local device="File=$DIR/gpu/[0-$((GPUS - 1))]"
  mkdir -p "$DIR/gpu"
  for ((number = 0; number < GPUS; number++)); do
    [[ -c $DIR/gpu/$number ]] || mknod -m 666 "$DIR/gpu/$number" c 1 3 2>/dev/null || device=
  done
  echo "Name=gpu Count=$GPUS $device" >"$DIR/gres.conf"
  # slurmd loads a cgroup plugin although nothing uses it; this one needs nothing from the machine.
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
# A requeued job waits until its old credentials have expired, by default 120 seconds. A machine that
# pauses for longer than cred_expire cannot start a step.
AuthInfo=socket=$DIR/munge/socket,cred_expire=$REQUEUE_SECONDS
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.own
SlurmdPidFile=$DIR/run/slurmd-%n.own
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
FirstJobId=$(<"$DIR/first_job")
MailProg=/bin/true
# sacct, which knows the jobs that have ended, needs slurmdbd.
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$DIR/munge/socket
# Without cgroups, SLURM signals every process of a step, also data workers: stricter than most clusters.
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
# The request to end a step is answered after the step has ended, which may take KillWait. Without an
# answer, slurmctld repeats the request a minute later and so ends the same step of the requeued job.
MessageTimeout=60
MinJobAge=3600
# Jobs of partition high preempt jobs of low, which get their --signal and GraceTime.
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
  install -m 600 /dev/null "$DIR/slurmdbd.conf" # slurmdbd refuses a file that others can read
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

set_hosts() { # NAME...: resolve node names, by which the ranks find rank 0; none: remove the line
  local mark="# slurm_local $DIR" text
  text=$(grep -vF -- "$mark" /etc/hosts; (($# == 0)) || echo "127.0.0.1 $* $mark")
  # Write in place: in a container the file is a mount and cannot be replaced.
  [[ $text == "$(</etc/hosts)" ]] || { echo "$text" >/etc/hosts; } 2>/dev/null ||
    report "/etc/hosts is read-only"
}

# ---- Commands

are_up() { # NODE...
  local list="$*"
  (($(timeout 5 sinfo -h -N -p main -n "${list// /,}" -o %t | grep -cxE 'idle|mix|alloc|comp') == $#))
}

status() {
  local name pid failed=0
  [[ -s $DIR/slurm.conf ]] || return 1
  for name in munged mariadbd slurmdbd slurmctld $(nodes); do
    pid=$(pid_of "$name") || { pid=-; failed=1; }
    echo "$name $pid"
  done
  # shellcheck disable=SC2046 # names are words
  ((failed == 0)) && are_up $(nodes) 2>/dev/null
}

start() {
  local port node socket=$DIR/db/socket
  ! status >/dev/null || { report "already running in $DIR"; return; }
  ((EUID == 0)) || fail "only root can start SLURM" $UNAVAILABLE
  ((${#DIR} <= 60)) || fail "$DIR is longer than 60 bytes, and socket paths in it may exceed the limit of 107"
  stop # remains of a crash
  mkdir -p "$DIR"/{db,log,munge,run,spool,state}
  rm -f "$DIR"/log/* "$DIR/munge/socket" "$socket"
  install_packages
  for ((port = PORT; port < PORT + NODES + 2; port++)); do
    [[ -z $(ss -Hltn "sport = :$port") ]] || fail "port $port is in use; set SLURM_LOCAL_PORT"
  done
  write_settings
  # shellcheck disable=SC2046
  set_hosts $(nodes)

  [[ -s $DIR/munge/key ]] || (umask 077 && head -c 128 /dev/urandom >"$DIR/munge/key")
  # --force: munged refuses parent folders that other users cannot enter.
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
  report "$NODES nodes are up; next: eval \"\$($SELF env $DIR)\""
}

stop() {
  local turn left
  [[ -s $DIR/slurm.conf ]] || return 0
  if pid_of slurmctld >/dev/null && pid_of munged >/dev/null; then
    timeout 10 scancel --user root || true
    for ((turn = 0; turn < 100; turn++)); do
      [[ -n $(timeout 5 squeue -h) ]] || break
      # Do not wait for jobs that save after TERM, or ignore TERM: kill them after a second.
      # shellcheck disable=SC2046
      ((turn != 10)) || kill -KILL $(descendants $(step_pids)) 2>/dev/null || true
      sleep 0.1
    done
  fi
  # shellcheck disable=SC2046
  terminate 15 $(nodes)
  terminate 15 slurmctld
  terminate 15 slurmdbd
  terminate 30 mariadbd
  terminate 5 munged
  left=$(step_pids)
  # shellcheck disable=SC2046,SC2086
  [[ -z $left ]] || kill -KILL $(descendants $left) $left 2>/dev/null || true
  set_hosts
}

purge() { stop && rm -rf "$DIR"; }

readonly ACTION=${1:-}
DIR=${2:-$(dirname "$SELF")/../.slurm}
case $ACTION in
  start | with) mkdir -p "$DIR" ;;
  stop | purge) [[ -d $DIR ]] || exit 0 ;;
  env | status) [[ -d $DIR ]] || fail "there is no SLURM in $DIR" ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$SELF"; exit 2 ;;
esac
readonly DIR=$(cd "$DIR" && pwd -P)
# Remove the variables of another cluster, and those of a job in which this may run.
unset "${!SLURM_@}" "${!SBATCH_@}" "${!SRUN_@}"
export SLURM_CONF=$DIR/slurm.conf
case $ACTION in
  env) printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" && exit ;;
  status) status; exit ;;
esac
exec 9>"$DIR/lock"
flock -w 120 9 || fail "another slurm_local.sh uses $DIR"
case $ACTION in
  start)
    trap stop EXIT # leave nothing running after a failure
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
