"""Trainings of published code that presets of several recipes share."""

from typing import Any

Values = dict[str, Any]  # option name -> value

_SGD: Values = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "schedule": "steps", "gamma": 0.1, "val_fraction": 0.0}
_CIFAR100: Values = _SGD | {"dataset": "cifar100", "augment": "cifar"}

# RepDistiller (Tian et al. 2020): the CIFAR-100 tables of later papers follow it
REPDISTILLER: Values = (
    _CIFAR100 | {"normalization": "repdistiller-cifar100"} | {"batch_size": 64, "epochs": 240, "lr": 0.05, "milestones": (150, 180, 210)}
)

IMAGENET: Values = (
    _SGD
    | {"dataset": "folder", "augment": "imagenet", "teacher_model": "resnet34", "student": "resnet18"}
    | {"batch_size": 512, "epochs": 100, "lr": 0.2, "weight_decay": 1e-4, "milestones": (30, 60, 90)}
)

# Distilling Knowledge via Intermediate Classifiers (Asadian, Salehi-Abari 2021), whose README and code differ
_DIH_PAIR: Values = {"teacher_model": "resnet110", "student": "resnet8"}
_DIH: Values = _CIFAR100 | _DIH_PAIR | {"augment": "cifar-reflect", "nesterov": True}
DIH_README: Values = _DIH | {"lr": 0.1, "batch_size": 64, "epochs": 200, "milestones": (60, 120, 180)}
DIH_CODE: Values = _DIH | {"lr": 0.05, "batch_size": 128, "epochs": 240, "milestones": (150, 180, 210), "gamma": 0.2}

# the CRD of that comparison, whose code started as RepDistiller's
DIH_CRD: Values = REPDISTILLER | _DIH_PAIR | {"lr": 0.1, "batch_size": 128, "epochs": 200, "milestones": (60, 120, 180), "gamma": 0.2}

# Mirzadeh et al. 2020
TAKD: Values = (
    _CIFAR100
    | {"teacher_model": "resnet110", "assistants": ("resnet20",), "student": "resnet8"}
    | {"lr": 0.1, "weight_decay": 1e-4, "batch_size": 128, "epochs": 160, "milestones": (80, 120)}
)

# Zhang et al. 2020
TOFD: Values = (
    _CIFAR100
    | {"augment": "cifar-cutout", "teacher_model": "resnet34_cifar", "student": "resnet18_cifar"}
    | {"lr": 0.1, "batch_size": 128, "epochs": 250, "milestones": (80, 160, 240)}
)
