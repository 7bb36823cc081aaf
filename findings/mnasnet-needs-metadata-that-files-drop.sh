#!/usr/bin/env bash
# torchvision 0.29.1: MNASNet loads its own state_dict, and refuses the same tensors once they have been in a safetensors file or a plain dict.
#
# state_dict() returns an OrderedDict with an attribute `_metadata`, which holds a version for each module. MNASNet reads its version there and
# raises ValueError without it. The attribute is no item: dict(...), a comprehension that strips a prefix, and every file format but a pickle
# of that very object drop it. Other networks of torchvision load either way. The remedy is to give the attribute back:
# weights = OrderedDict(weights); weights._metadata = {"": {"version": 2}}
#
# Seen with torchvision 0.29.1, torch 2.14.1 and safetensors 0.8.0:
#     state_dict(): loads
#     dict(state_dict()): ValueError: version should be set to 1 or 2 instead of None
#     through safetensors: ValueError: version should be set to 1 or 2 instead of None
#     resnet18, dict(state_dict()): loads
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 safetensors==0.8.0
cat >"$folder/finding.py" <<'PYTHON'
from safetensors.torch import load, save
from torchvision.models import mnasnet0_5, resnet18


def try_loading(model, weights):
    try:
        model.load_state_dict(weights)
    except ValueError as error:
        return f"ValueError: {error}"
    return "loads"


model, other = mnasnet0_5(num_classes=2), resnet18(num_classes=2)
weights = model.state_dict()
seen = {
    "state_dict()": try_loading(model, weights),
    "dict(state_dict())": try_loading(model, dict(weights)),
    "through safetensors": try_loading(model, load(save(weights))),
    "resnet18, dict(state_dict())": try_loading(other, dict(other.state_dict())),
}
for how, outcome in seen.items():
    print(f"{how}: {outcome}")
refused = "ValueError: version should be set to 1 or 2 instead of None"
assert list(seen.values()) == ["loads", refused, refused, "loads"], "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py
