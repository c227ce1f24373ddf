#!/usr/bin/env bash
# Installs the wheel where torch is already (a container, a cluster's environment), and leaves that torch as it is.
#
#   launch/install.sh WHEEL [PIP_OPTION...]     without a network, after offline.sh: --no-index --find-links=FOLDER
#
# PYTHON: whose environment, python3. What is built against its torch, and PIP_CONSTRAINT's versions, stay as well: where
# they can't, pip says which two things don't go together, and nothing is installed.
set -euo pipefail
: "${1:?which wheel? launch/install.sh WHEEL [PIP_OPTION...]}"
python=${PYTHON:-python3}

kept=$(mktemp)
trap 'rm -f "$kept"' EXIT
"$python" - > "$kept" << 'PY'
import importlib.metadata as installed

for name in (
    "torch", "torchvision", "triton", "pytorch-triton", "transformer-engine", "flash-attn", "flash-attn-3", "apex",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-modelopt",
):
    try:
        print(f"{name}=={installed.version(name)}")
    except installed.PackageNotFoundError:
        pass
try:
    numpy = installed.version("numpy")
except installed.PackageNotFoundError:
    numpy = ""
if numpy.startswith("1."):  # what a container's packages are built against; later pyarrow fails at import, unasked by pip
    print(f"numpy=={numpy}\npyarrow<26")
PY
if ! grep -q '^torch==' "$kept"; then
  echo "there is no torch in $("$python" -c 'import sys; print(sys.prefix)'): install the build that fits this machine" \
    "first, or set PYTHON= to the interpreter that has it" >&2
  exit 1
fi

"$python" -m pip install --constraint "$kept" "$@"
"$python" - "$kept" << 'PY'
import importlib.metadata as installed
import sys

for line in open(sys.argv[1]):
    name, exact, version = line.strip().partition("==")
    if not exact:
        continue
    found = installed.version(name)
    if found != version:
        sys.exit(f"{name} was {version} and is {found} now: pip didn't keep to its constraint; use a newer pip")
    print(f"kept {name} {version}")
PY
