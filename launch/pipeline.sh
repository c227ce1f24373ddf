#!/usr/bin/env bash
# Submit a run's stages, each as a job that begins when the one before ended well:
#
#     launch/pipeline.sh [--dry-run] recipe=llama31_8b_to_4b run_dir=/lustre/me/run ...
#
# Nodes, ranks and time of each stage: cluster.jobs.STAGE.*; the site: env.sh. Prints a job id a stage. A stage that fails
# cancels those after it; the same command submits what is left.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dry=
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
if (($# == 0)); then sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; fi
# shellcheck source=launch/env.sh
source "$here/env.sh"

root=$(dirname "$here")
[[ -d $root/compress ]] && export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
jobs=$(python -m compress.jobs "$@")   # refuses settings before anything is submitted
run_dir=$(head -n1 <<< "$jobs")

# A requeued job must run the code that it was submitted with, whatever the checkout is by then.
code=$run_dir/code
if [[ -z $dry ]]; then
  mkdir -p "$run_dir/logs"
  if [[ ! -d $code ]]; then
    package=$(python -c 'import compress, pathlib; print(pathlib.Path(compress.__file__).parent)')
    building=$(mktemp -d "$run_dir/.code.XXXXXX")
    cp -r "$package" "$building/compress"
    [[ -d $building/compress/conf ]] || cp -r "$(dirname "$package")/conf" "$building/conf"
    find "$building" -name __pycache__ -prune -exec rm -rf {} +
    mkdir -p "$building/launch"
    cp "$here/env.sh" "$here/stage.sbatch" "$building/launch/"
    mv -T "$building" "$code" || rm -rf "$building"   # another submitter was first
  fi
  cp "$here/env.sh" "$code/launch/.env.sh.$$"   # the site as it is now: a mount that was missing, another account
  mv "$code/launch/.env.sh.$$" "$code/launch/env.sh"
fi

unset COMPRESS_CHAIN COMPRESS_LINK   # of a job that this may be called from
previous=
chain=$(date +%s)-$$   # of this submission
while IFS=$'\t' read -r stage nodes ranks time cpus memory submissions; do
  before=$previous
  for ((link = 1; link <= submissions; link++)); do
    read -r -a options <<< "$COMPRESS_SBATCH"
    given=("COMPRESS_RUN_DIR=$run_dir" "COMPRESS_RANKS=$ranks")
    waits=${before:+afterok:$before}
    if ((submissions == 1)); then
      options+=(--requeue)
    else   # each goes on from the one before, however that ended; when that was done, it ends at once
      options+=(--no-requeue)
      given+=("COMPRESS_CHAIN=$chain-$stage" "COMPRESS_LINK=$link")
      ((link == 1)) || waits=${waits:+$waits,}afterany:$previous
    fi
    options+=(--parsable "--job-name=compress-$stage" "--nodes=$nodes" --ntasks-per-node=1 "--time=$time"
              --open-mode=append "--signal=B:USR1@$((COMPRESS_GRACE + 60))" "--output=$run_dir/logs/%x-%j.log"
              "--chdir=$run_dir" --export=ALL)
    [[ $cpus == - ]] || options+=("--cpus-per-task=$cpus")
    [[ $memory == - ]] || options+=("--mem=$memory")
    [[ -z $waits ]] || options+=("--dependency=$waits" --kill-on-invalid-dep=yes)
    # Not `--export=ALL,NAME=value`: a list has each node load the user's login environment first, which may hang.
    command=(env "${given[@]}" sbatch "${options[@]}" "$code/launch/stage.sbatch" "$@" "stage=$stage")
    if [[ -n $dry ]]; then
      printf '%q ' "${command[@]}"; echo
      previous=ID_OF_${stage^^}
    else
      previous=$("${command[@]}")
      previous=${previous%%;*}   # a federation adds its cluster's name
      echo "$stage $previous"
    fi
  done
done < <(tail -n +2 <<< "$jobs")
