#!/usr/bin/env bash
# A vision transformer of timm that is built for a size which its patches do not divide takes the images and leaves their last rows
# and columns out: no error, no warning. At 40 pixels and patches of 16 that is more than a third of each image.
#
# Seen with torch 2.14.1, torchvision 0.29.1, timm 1.0.31. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy==2.4.6

venv/bin/python -W error - <<'EOF_PYTHON'
import timm
import torch

torch.manual_seed(0)
network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=40).eval()
images = torch.randn(2, 3, 40, 40)
others = images.clone()
others[:, :, 32:], others[:, :, :, 32:] = 1000.0, 1000.0
with torch.no_grad():
    same = torch.equal(network(images), network(others))
print("torch", torch.__version__, "timm", timm.__version__, "- the same features whatever is right of and below pixel 32:", same)
assert same
EOF_PYTHON
echo "as described: what is right of and below the last whole patch is never seen"
