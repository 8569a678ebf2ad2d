#!/usr/bin/env bash
# Fills in launch/jobset.yaml and gives it to GKE.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/jobset.sh --name NAME --image IMAGE [options] -- VERB ARGUMENTS...

  launch/jobset.sh --name cifar --image us-docker.pkg.dev/my-project/guided-distill:1 --topology 4x4 -- \
    train --config configs/cifar10.py --workdir gs://my-bucket/cifar10

  --accelerator A      GKE's name of the chips (default: tpu-v5-lite-podslice)
  --topology T         of each slice (default: 4x4)
  --chips-per-host N   (default: 4)
  --slices N           (default: 1)
  --queue Q            Kueue's local queue (default: multislice-queue, XPK's)
  --max-restarts N     after failures other than pre-emptions (default: 3)
  --dry-run            print the manifest, and give it to nobody

IMAGE holds this package with its extra "tpu", and the config files.
END
}

fail() {
  echo "jobset.sh: $1" >&2
  exit 2
}

name="" image="" accelerator=tpu-v5-lite-podslice topology=4x4 chips_per_host=4 slices=1
queue=multislice-queue max_restarts=3 dry_run=""
while (($#)); do
  case $1 in
    --name | --image | --accelerator | --topology | --chips-per-host | --slices | --queue | --max-restarts)
      [[ -n ${2-} ]] || fail "$1 has no value"
      variable=${1#--}
      printf -v "${variable//-/_}" %s "$2"
      shift 2
      ;;
    --dry-run) dry_run=yes && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "$1 is not an option: put -- before what guided-distill is to do, or see --help" ;;
  esac
done
[[ -n $name ]] || fail "--name is missing"
[[ -n $image ]] || fail "--image is missing"
[[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "--topology is '$topology'; give one such as 4x4 or 2x2x4"
for number in chips_per_host slices max_restarts; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "--${number//_/-} is '${!number}'; give a whole number"
done
(($#)) || fail "nothing to run: add -- and a verb, such as -- train --config configs/cifar10.py"
chips=$((${topology//x/*}))
((chips_per_host && chips % chips_per_host == 0)) ||
  fail "--topology $topology has $chips chips, which hosts of $chips_per_host don't make up: see --chips-per-host"

manifest=$(
  NAME=$name IMAGE=$image ACCELERATOR=$accelerator TOPOLOGY=$topology QUEUE=$queue SLICES=$slices \
    MAX_RESTARTS=$max_restarts CHIPS_PER_HOST=$chips_per_host HOSTS=$((chips / chips_per_host)) \
    python3 - "$(dirname "$0")/jobset.yaml" "$@" <<'END'
import json, os, string, sys

file, *arguments = sys.argv[1:]
with open(file) as template:
    print(string.Template(template.read()).substitute(os.environ, ARGUMENTS=json.dumps(arguments)))
END
)
if [[ -n $dry_run ]]; then
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
