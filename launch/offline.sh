#!/usr/bin/env bash
# Gathers into FOLDER the wheel and all that it needs and this environment doesn't have, for nodes without a network.
#
#   launch/offline.sh FOLDER WHEEL [PIP_OPTION...]     where there is a network, in an environment as on the nodes: the
#                                                      same container, or the same Python, torch and kind of processor
#   FOLDER/install.sh                                  on a node, in the environment to install into (PYTHON=python3)
set -euo pipefail
folder=${1:?into which folder? launch/offline.sh FOLDER WHEEL [PIP_OPTION...]}
wheel=${2:?which wheel? launch/offline.sh FOLDER WHEEL [PIP_OPTION...]}
python=${PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -e $folder ]]; then
  echo "$folder is there already: name a new folder, or delete it" >&2
  exit 1
fi

building=$(mktemp -d "$folder.XXXXXX.tmp")
trap 'rm -rf "$building"' EXIT
chmod 755 "$building"
mkdir "$building/wheels"
PYTHON=$python bash "$here/install.sh" "${@:2}" --dry-run --quiet --report "$building/report.json"   # keeps what that keeps
"$python" - "$building" << 'PY'
import json
import pathlib
import sys

folder = pathlib.Path(sys.argv[1])
wanted = [item["metadata"] for item in json.loads((folder / "report.json").read_text())["install"]]
names = [f"{data['name']}=={data['version']}" for data in wanted if data["name"] != "compress"]
(folder / "wanted.txt").write_text("".join(f"{name}\n" for name in names))
PY
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$building/wheels" "${@:3}" -r "$building/wanted.txt"
cp "${wheel%%[*}" "$building/wheels/"
cp "$here/install.sh" "$building/install_wheel.sh"
cat > "$building/install.sh" << EOF
#!/usr/bin/env bash
set -euo pipefail
cd "\$(dirname "\${BASH_SOURCE[0]}")"
sha256sum --check --quiet SHA256SUMS
exec bash install_wheel.sh 'wheels/$(basename "$wheel")' --no-index --find-links=wheels "\$@"
EOF
chmod 755 "$building/install.sh"
rm "$building/report.json"
(cd "$building" && sha256sum wheels/* install_wheel.sh > SHA256SUMS)
mv -T "$building" "$folder"
echo "$folder: $(wc -l < "$folder/wanted.txt") packages beside compress, $(du -sh "$folder" | cut -f1). On the nodes: $folder/install.sh"
