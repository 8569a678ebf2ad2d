#!/usr/bin/env bash
# Runs guided-distill as N processes on this machine that train together over loopback.
set -uo pipefail

usage() {
  cat <<'END'
usage: launch/multiprocess.sh [options] -- VERB ARGUMENTS...

  launch/multiprocess.sh --processes 2 -- train --config configs/digits.py --workdir runs/digits

  --processes N  number of processes (default: 2)
  --port P       port of the coordinator (default: a free one)
  --grace S      seconds that the other processes get to exit after one has failed (default: 20)
  --dry-run      print the commands without running them

SIGTERM and Ctrl-C are forwarded: all processes save at the same step and exit with status 75. The same
command resumes. The exit status is that of the first process that fails. Set GUIDED_DISTILL to run a
command other than guided-distill. Needs bash 4.3.
END
}

fail() {
  echo "multiprocess.sh: $1" >&2
  exit 2
}

processes=2 port="" grace=20 dry_run=""
while (($#)); do
  case $1 in
    --processes | --port | --grace)
      [[ -n ${2-} ]] || fail "$1 has no value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --dry-run) dry_run=yes && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "$1 is not an option: put -- before the verb, or see --help" ;;
  esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes is '$processes'; give a whole number, at least 1"
[[ $grace =~ ^(0|[1-9][0-9]*)$ ]] || fail "--grace is '$grace'; give a whole number of seconds"
[[ -z $port || ($port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535) ]] ||
  fail "--port is '$port'; give a number from 1 to 65535"
(($#)) || fail "nothing to run: add -- and a verb, such as -- train --config configs/digits.py"

read -ra program <<<"${GUIDED_DISTILL:-guided-distill}"
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
[[ -n $port ]] || port=$(python3 -c "$free_port") || fail "python3 finds no free port: give --port"

export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes

if [[ -n $dry_run ]]; then
  for ((index = 0; index < processes; index++)); do
    echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$processes" \
      "JAX_PROCESS_ID=$index$(printf ' %q' "${program[@]}" "$@")"
  done
  exit 0
fi
command -v "${program[0]-}" >/dev/null ||
  fail "the program '${program[0]-}' isn't installed: install it, or set GUIDED_DISTILL to another command"

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((index = 0; index < processes; index++)); do
  JAX_PROCESS_ID=$index "${program[@]}" "$@" > >(sed -u "s/^/[$index] /") 2> >(sed -u "s/^/[$index] /" >&2) &
  pids+=($!)
done

running() {
  local alive
  alive=" $(jobs -pr | tr '\n' ' ') "
  [[ $alive == *" $1 "* ]]
}

status=0 deadline="" left=("${pids[@]}")
while ((${#left[@]})); do
  # So that bash notices a signal, or that a process has exited, within a second.
  sleep 0.2 &
  wait $! 2>/dev/null
  still=()
  for pid in "${left[@]}"; do
    if running "$pid"; then
      still+=("$pid")
      continue
    fi
    wait "$pid"
    code=$?
    if ((code && !status)); then
      status=$code deadline=$((SECONDS + grace))
    fi
  done
  left=("${still[@]+"${still[@]}"}")
  if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#left[@]})); then
    kill -KILL "${left[@]}" 2>/dev/null
    deadline=$((SECONDS + 5))
  fi
done
exit "$status"
