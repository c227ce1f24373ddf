#!/usr/bin/env bash
# Submit a run for every combination of values, each a chain of jobs of its own in RUN_DIR/KEY-VALUE_...:
#
#     launch/sweep.sh [--dry-run] recipe=NAME run_dir=/lustre/me/sweep prune.hidden_size=432,576 distill.learning_rate=1e-4,2e-4
#
# All combinations are checked before the first is submitted.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dry=()
if [[ ${1:-} == --dry-run ]]; then dry=(--dry-run); shift; fi
if (($# == 0)); then sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; fi
# shellcheck source=launch/env.sh
source "$here/env.sh"
root=$(dirname "$here")
[[ -d $root/compress ]] && export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
runs=$(python -m compress.jobs --sweep "$@")
while IFS=$'\t' read -r -a settings; do
  echo "# ${settings[-1]}"
  "$here/pipeline.sh" "${dry[@]}" "${settings[@]}" < /dev/null
done <<< "$runs"
