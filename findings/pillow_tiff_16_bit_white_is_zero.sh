#!/usr/bin/env bash
# A gray TIFF says whether 0 is black or white. Pillow heeds it at 8 bits; at 16 bits it hands out the numbers as they lie there,
# so that a white-is-zero picture (scanners and microscopes write them) comes inverted, in the same mode as a right one.
#
# Seen with Pillow 13.0.0, tifffile 2026.3.3. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6

venv/bin/python - <<'EOF_PYTHON'
import numpy
import PIL
import tifffile
from PIL import Image

ramp = numpy.linspace(0, 65535, 64).astype(numpy.uint16).reshape(8, 8)
first = {}
for bits, numbers in ((8, (ramp >> 8).astype(numpy.uint8)), (16, ramp)):
    for kind in ("minisblack", "miniswhite"):
        tifffile.imwrite("image.tif", numbers, photometric=kind)
        with Image.open("image.tif") as image:
            first[bits, kind] = int(numpy.asarray(image)[0, 0])
            print("Pillow", PIL.__version__, bits, "bits,", kind, image.mode, "first pixel:", first[bits, kind])
assert (first[8, "minisblack"], first[8, "miniswhite"]) == (0, 255)
assert (first[16, "minisblack"], first[16, "miniswhite"]) == (0, 0)
EOF_PYTHON
echo "as described: white-is-zero is heeded at 8 bits and not at 16"
