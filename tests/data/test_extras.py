"""kdfast.data and kdfast.models import no optional package by themselves, work in memory without them, and name the extra otherwise."""

import subprocess
import sys
import textwrap
from pathlib import Path

WITHOUT = """
    import sys
    ABSENT = ("torchvision", "PIL", "sklearn", "scipy", "nvidia", "fcntl", "resource")
    import torch
    sys.modules.update(dict.fromkeys(ABSENT))  # None: an import fails
    import kdfast.data as data, kdfast.models as models

    split = data.Split(torch.arange(8) % 2, pixels=torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
    images = data.ImageData("x", ("a", "b"), split, split, split, (0.5,) * 3, (0.5,) * 3, 8, True, "cifar", "squash")
    for loader in ("resident", "torchvision"):
        for batch in data.make_loaders(images, batch_size=4, loader=loader, workers=0).train:
            models.create("resnet8", 2)(batch.images)
    assert models.names()[0] == "mobilenetv2_cifar"
    folder = data.Split(torch.zeros(1), paths=(__import__("torch").__file__,))
    for call in (lambda: models.create("resnet18", 2), lambda: data.load("digits"), lambda: folder.read(0), lambda: folder.measure()):
        try:
            call()
        except ImportError as error:
            print(error)
"""


def test_without_extras():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(WITHOUT)], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "kdfast.models needs torchvision: pip install 'kdfast[cli]'",
        "kdfast.data needs scikit-learn: pip install 'kdfast[cli]'",
        "kdfast.data needs pillow: pip install 'kdfast[cli]'",
        "kdfast.data needs pillow: pip install 'kdfast[cli]'",
    ]
