#!/usr/bin/env bash
# GNU tar writes access and change times into the headers of an incremental archive, where other formats have the prefix of a
# long name. Python's tarfile takes these times for a prefix: each name comes with an octal number before it, and nothing is
# said. GNU tar itself reads the names as they were. webdataset reads by tarfile, so its keys are wrong too: a sample's key
# then changes with the times of its file, and a list of keys meets none of them.
#
# Seen with GNU tar 1.34, Python 3.11.7, webdataset 1.0.2. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check webdataset==1.0.2

mkdir shard
for key in 000001 000002; do
  printf 3 >"shard/$key.cls"
  printf 'a caption' >"shard/$key.txt"
done
tar --format=gnu --listed-incremental=state -cf shard.tar shard
tar --version | head -1
venv/bin/python --version
echo "GNU tar: $(tar -tf shard.tar | grep 000001.cls)"

venv/bin/python - <<'EOF'
import re
import tarfile

import webdataset

with tarfile.open("shard.tar") as tar:
    names = [member.name for member in tar if member.isfile()]
print("tarfile:", names[0])
assert all(re.fullmatch(r"[0-7]{11}/shard/00000[12]\.(cls|txt)", name) for name in names), names
keys = [sample["__key__"] for sample in webdataset.WebDataset("shard.tar", shardshuffle=False, empty_check=False)]
print("webdataset:", keys)
assert len(keys) == 2 and all(re.fullmatch(r"[0-7]{11}/shard/00000[12]", key) for key in keys), keys
EOF
echo "as described: tarfile and webdataset put a time before each name"
