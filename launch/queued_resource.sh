#!/usr/bin/env bash
# Runs guided-distill on every host of a TPU pod slice, a queued resource on Google Cloud.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/queued_resource.sh ACTION --name NAME --project P --zone Z [options] [-- VERB ARGUMENTS...]

  launch/queued_resource.sh start --name cifar --project my-project --zone us-west4-a \
    --accelerator-type v5litepod-16 --spot -- \
    train --config configs/cifar10.py --workdir gs://my-bucket/cifar10

actions:
  start   request the slice, wait for it, install this checkout's HEAD on every host, and run the verb.
          It reuses an existing slice and replaces a preempted one, so the same command resumes.
          It refuses to start beside a run that is still alive
  watch   follow the log of host 0
  stop    send SIGTERM to all hosts: they save at the same step and exit
  delete  release the slice

options:
  --accelerator-type T  such as v5litepod-16, v4-32, v5p-32 or v6e-16 (required by start)
  --runtime-version V   the hosts' image (default: the one for T)
  --spot                a cheaper slice that can be preempted
  --env NAME=VALUE      an environment variable for the program; repeatable
  --wait S              seconds between checks of the queue (default: 30)
  --dry-run             print the commands without running them
END
}

fail() {
  echo "queued_resource.sh: $1" >&2
  exit 2
}

action=${1-}
case $action in
  start | watch | stop | delete) shift ;;
  -h | --help) usage && exit 0 ;;
  *) fail "the action is '$action'; give start, watch, stop or delete, or see --help" ;;
esac

name="" project="" zone="" accelerator_type="" runtime_version="" spot="" wait=30 dry_run=""
environment=(env)
while (($#)); do
  case $1 in
    --name | --project | --zone | --accelerator-type | --runtime-version | --wait)
      [[ -n ${2-} ]] || fail "$1 has no value"
      variable=${1#--}
      printf -v "${variable//-/_}" %s "$2"
      shift 2
      ;;
    --env)
      [[ ${2-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env is '${2-}'; give NAME=VALUE"
      environment+=("$2")
      shift 2
      ;;
    --spot) spot=--spot && shift ;;
    --dry-run) dry_run=yes && shift ;;
    --) shift && break ;;
    *) fail "$1 is not an option: put -- before the verb, or see --help" ;;
  esac
done
for needed in name project zone; do
  [[ -n ${!needed} ]] || fail "--$needed is missing"
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "--name is '$name'; give lowercase letters, digits and hyphens, first a letter and last no hyphen"
[[ $wait =~ ^[1-9][0-9]*$ ]] || fail "--wait is '$wait'; give a whole number of seconds, at least 1"

run() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

where=(--project "$project" --zone "$zone")
queue=(gcloud compute tpus queued-resources)
describe=("${queue[@]}" describe "$name" "${where[@]}" --format 'value(state.state)')

on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker "$1" --command "$2"
}

# Empty if there is no such slice; any other error from gcloud ends the script.
state() {
  # A dry run assumes that the slice doesn't exist yet.
  [[ -z $dry_run ]] || return 0
  local errors
  { errors=$("${describe[@]}" 2>&1 >&3); } 3>&1 && return
  [[ $errors == *NOT_FOUND* ]] && return
  echo "$errors" >&2
  return 1
}

delete() {
  run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
}

request_slice() {
  if [[ -z $runtime_version ]]; then
    case $accelerator_type in
      v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime_version=v2-alpha-tpuv5 ;;
      v6e-*) runtime_version=v2-alpha-tpuv6e ;;
      v4-*) runtime_version=tpu-ubuntu2204-base ;;
      *) fail "--accelerator-type is '$accelerator_type', which has no default image: add --runtime-version" ;;
    esac
  fi
  run "${queue[@]}" create "$name" --node-id "$name" "${where[@]}" \
    --accelerator-type "$accelerator_type" --runtime-version "$runtime_version" ${spot:+"$spot"}
}

wait_for_slice() {
  if [[ -n $dry_run ]]; then
    echo "# wait until the state is ACTIVE, checking every $wait s:"
    run "${describe[@]}"
    return
  fi
  local now
  while now=$(state) || exit; [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING) fail "$name is $now: run the same command to request it again" ;;
      # The slice existed and is gone.
      "") [[ -z $seen ]] || request_slice ;;
    esac
    seen=$now
    echo "$name is ${now:-not created yet}" >&2
    sleep "$wait"
  done
}

refuse_second_run() {
  local found look='if { kill -0 $(cat guided-distill.pid); } 2>/dev/null; then echo a run is alive; fi'
  if [[ -n $dry_run ]]; then
    echo "# stop here if a host reports a run:"
    on_hosts all "$look"
    return
  fi
  found=$(on_hosts all "$look")
  [[ $found != *"a run is alive"* ]] || fail "$name still has a run: use the action watch or stop"
}

# The files that are installed on the hosts.
parts=(guided_distill configs pyproject.toml README.md LICENSE)

install() {
  local checkout archive=guided-distill.tar.gz
  checkout=$(cd "$(dirname "$0")/.." && pwd)
  # Other users could replace a file with a fixed name in the shared temporary folder.
  if [[ -n $dry_run ]]; then
    folder=FOLDER
    echo "# with a new temporary FOLDER:"
  else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
  fi
  run git -C "$checkout" archive --format tar.gz --prefix guided-distill/ --output "$folder/$archive" \
    HEAD "${parts[@]}"
  run gcloud compute tpus tpu-vm scp "$folder/$archive" "$name:$archive" "${where[@]}" --worker all
  # Remove the files of an earlier HEAD first. The images' own Python is too old for the package.
  on_hosts all "(cd guided-distill 2>/dev/null && rm -rf ${parts[*]}); \
tar xzf $archive && python3 -m pip install --user --quiet uv && \
python3 -m uv venv --quiet --clear --python 3.12 environment && \
python3 -m uv pip install --quiet --python environment/bin/python './guided-distill[tpu,report,text]'"
}

case $action in
  start)
    [[ -n $accelerator_type ]] || fail "--accelerator-type is missing"
    (($#)) || fail "nothing to run: add -- and a verb, such as -- train --config configs/cifar10.py"
    seen=$(state)
    case $seen in
      FAILED | SUSPENDED) delete ;;
      "") request_slice ;;
    esac
    wait_for_slice
    refuse_second_run
    install
    # JAX detects the other hosts.
    program=("${environment[@]}" ../environment/bin/guided-distill "$@")
    on_hosts all "cd guided-distill && (setsid nohup$(printf ' %q' "${program[@]}") \
>>../guided-distill.log 2>&1 </dev/null & echo \$! >../guided-distill.pid)"
    ;;
  watch) on_hosts 0 "tail -n 50 -f guided-distill.log" ;;
  stop) on_hosts all 'kill -TERM $(cat guided-distill.pid) && tail --pid $(cat guided-distill.pid) -f /dev/null' ;;
  delete) delete ;;
esac
