#!/usr/bin/env bash
# Fills in launch/jobset.yaml and applies it on GKE.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/jobset.sh --name NAME --image IMAGE [options] -- VERB ARGUMENTS...

  launch/jobset.sh --name cifar --image us-docker.pkg.dev/my-project/images/guided-distill:1 --topology 4x4 -- \
    train --config configs/cifar10.py --workdir gs://my-bucket/cifar10

  --accelerator A      GKE's name for the chip type (default: tpu-v5-lite-podslice)
  --topology T         topology of each slice (default: 4x4)
  --chips-per-host N   number of chips on each host (default: 4)
  --slices N           number of slices (default: 1)
  --queue Q            Kueue's local queue (default: multislice-queue, as XPK names it)
  --max-restarts N     restarts after failures other than preemption (default: 3)
  --env NAME=VALUE     an environment variable for the program; repeatable
  --dry-run            print the manifest without applying it

IMAGE must contain this package with its extra "tpu": launch/README.md explains how to build it.
END
}

fail() {
  echo "jobset.sh: $1" >&2
  exit 2
}

name="" image="" accelerator=tpu-v5-lite-podslice topology=4x4 chips_per_host=4 slices=1
queue=multislice-queue max_restarts=3 environment=() dry_run=""
while (($#)); do
  case $1 in
    --name | --image | --accelerator | --topology | --chips-per-host | --slices | --queue | --max-restarts)
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
    --dry-run) dry_run=yes && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "$1 is not an option: put -- before the verb, or see --help" ;;
  esac
done
[[ -n $name ]] || fail "--name is missing"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "--name is '$name'; give lowercase letters, digits and hyphens, first a letter and last no hyphen"
[[ -n $image ]] || fail "--image is missing"
for text in image accelerator queue; do
  [[ ${!text} =~ ^[-A-Za-z0-9._/:@]+$ ]] ||
    fail "--$text is '${!text}'; give a name of letters, digits and -._/:@"
done
[[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] ||
  fail "--topology is '$topology'; give one such as 4x4 or 2x2x4"
for number in chips_per_host slices; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] ||
    fail "--${number//_/-} is '${!number}'; give a whole number, at least 1"
done
[[ $max_restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--max-restarts is '$max_restarts'; give a whole number"
(($#)) || fail "nothing to run: add -- and a verb, such as -- train --config configs/cifar10.py"
chips=$((${topology//x/*}))
((chips % chips_per_host == 0)) ||
  fail "--topology $topology has $chips chips, not a multiple of $chips_per_host: set --chips-per-host"

manifest=$(
  NAME=$name IMAGE=$image ACCELERATOR=$accelerator TOPOLOGY=$topology QUEUE=$queue SLICES=$slices \
    MAX_RESTARTS=$max_restarts CHIPS_PER_HOST=$chips_per_host HOSTS=$((chips / chips_per_host)) \
    python3 - "$(dirname "$0")/jobset.yaml" ${environment[@]+"${environment[@]}"} -- "$@" <<'END'
import json, os, string, sys

file, *words = sys.argv[1:]
end = words.index("--")

# Kubernetes would expand $(NAME), and reads two dollar signs as one.
words = [word.replace("$", "$$") for word in words]
pairs = [word.split("=", 1) for word in words[:end]]
environment = json.dumps([{"name": name, "value": value} for name, value in pairs])
arguments = json.dumps(words[end + 1 :])
with open(file) as template:
    filled = string.Template(template.read()).substitute(
        os.environ, ENVIRONMENT=environment, ARGUMENTS=arguments
    )
print(filled)
END
)
if [[ -n $dry_run ]]; then
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
