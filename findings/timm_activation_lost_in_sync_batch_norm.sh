#!/usr/bin/env bash
# timm's BatchNormAct2d is a torch BatchNorm2d with an activation inside. torch.nn.SyncBatchNorm.convert_sync_batchnorm makes a plain
# SyncBatchNorm of it: the layers `act` and `drop` are still listed as its children, but nobody calls them. So an EfficientNet that
# was converted the way torch's documentation shows is another network: no error, no warning, other numbers. It is trained so,
# too. timm has a function of the same name (timm.layers.convert_sync_batchnorm) that keeps the activation.
#
# Seen with torch 2.14.1, torchvision 0.29.1, timm 1.0.31. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy==2.4.6

venv/bin/python - <<'EOF_PYTHON'
import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

torch.manual_seed(0)
images = torch.randn(2, 3, 64, 64)


def difference(convert):
    network = timm.create_model("test_efficientnet", num_classes=0).eval()
    with torch.no_grad():
        before = network(images)
        return (convert(network)(images) - before).abs().max().item()


by_torch, by_timm = difference(nn.SyncBatchNorm.convert_sync_batchnorm), difference(convert_sync_batchnorm)
print("torch", torch.__version__, "timm", timm.__version__)
print(f"largest change of a feature, in eval mode: {by_torch:.3g} by torch's conversion, {by_timm:.3g} by timm's")
assert by_torch > 0.1 and by_timm == 0
EOF_PYTHON
echo "as described: torch's conversion to SyncBatchNorm drops the activations of timm's BatchNormAct2d"
