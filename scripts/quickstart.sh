#!/usr/bin/env bash
# Set up, then pretrain a small MAE on scikit-learn's handwritten digits: a model, a picture and a loss that fell.
# Other keys are passed on, e.g.: bash scripts/quickstart.sh --dataset path/to/images --image_size 64 --patch_size 8
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/hf-mae pretrain --recipe quickstart --resume auto "$@"
