"""Makes tests/oracles.npz: inputs, values and gradients of the original implementations, in float64.

Clone the originals into one folder, and install lion-pytorch:

    git clone https://github.com/HobbitLong/SupContrast                 # 66a8fe5
    git clone https://github.com/HobbitLong/RepDistiller                # b84f547
    git clone https://github.com/sunshangquan/logit-standardization-KD  # f6e5aa5
    git clone https://github.com/pariyajebreili/ConKD-Lion              # 7a4566f
    python tests/make_oracles.py FOLDER

The commits are those that made the file in this repository. The tests read the file; they need none of the clones.
"""

import ast
import re
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lion_pytorch import Lion
from torch import Tensor, nn

Arrays = dict[str, Any]


def import_file(path: Path, package: str = "") -> Any:
    """Imports one file of a clone; `package` makes its relative imports work."""
    name = f"{package}.{path.stem}" if package else path.stem
    spec = util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def functions_of(path: Path, *names: str) -> list[Any]:
    """Takes single functions out of a file whose imports are not installed."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    found: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(tree, str(path), "exec"), found)
    return [found[name] for name in names]


def class_of_readme(path: Path, name: str) -> Any:
    """Takes a class out of the Python blocks of a README."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    found: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    exec(next(block for block in blocks if f"class {name}" in block), found)
    return found[name]


def randn(*shape: int) -> Tensor:
    """Returns float32 numbers, which float64 holds exactly."""
    return torch.randn(shape)


def differentiate(loss: Any, *inputs: Tensor) -> list[np.ndarray]:
    """Returns the value of `loss` at float64 copies of the inputs, and its gradients."""
    leaves = [x.double().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value = torch.stack(value).sum() if isinstance(value, list) else value
    value.backward()
    return [value.detach().numpy().reshape(()), *(x.grad.numpy() for x in leaves if x.grad is not None)]


def name_fields(case: str, **fields: Any) -> Arrays:
    """Returns the arrays of a case by their names in the file."""
    return {f"{case}/{name}": value for name, value in fields.items()}


def logit_distillation(clones: Path) -> Arrays:
    folder = clones / "logit-standardization-KD" / "mdistiller" / "distillers"
    _, kd_loss = functions_of(folder / "KD.py", "normalize", "kd_loss")
    made: Arrays = {}
    for N, C, T, standardize in (
        (8, 10, 2.0, True), (9, 100, 4.0, True), (3, 1000, 2.0, True), (1, 1001, 2.0, True), (64, 7, 0.5, True), (16, 10, 4.0, False),
        (2, 1000, 1.0, False),
    ):  # fmt: skip
        student, teacher = 3 * randn(N, C), 3 * randn(N, C)
        loss, grad_student, grad_teacher = differentiate(lambda s, t: kd_loss(s, t, T, standardize), student, teacher)  # noqa: B023
        case, given = f"lskd_n{N}_c{C}_T{T}_std{standardize:d}", {"temperature": T, "standardize": standardize, "loss": loss}
        made |= name_fields(case, student=student, teacher=teacher, **given, grad_student=grad_student, grad_teacher=grad_teacher)
    return made


def supervised_contrast(clones: Path) -> Arrays:
    original = import_file(clones / "SupContrast" / "losses.py").SupConLoss
    made: Arrays = {}
    for B, V, D, classes, tau, mode in (
        (8, 2, 16, 3, 0.07, "all"), (33, 1, 128, 5, 0.1, "all"), (24, 3, 32, 4, 0.5, "one"), (64, 2, 32, 10, 0.07, "all"),
        (16, 1, 10, 40, 0.07, "all"), (40, 2, 64, 1000, 0.05, "all"),
    ):  # fmt: skip
        features, labels = F.normalize(randn(B, V, D), dim=2), torch.randint(0, classes, (B,))
        loss, gradient = differentiate(lambda f: original(tau, mode)(f, labels), features)  # noqa: B023
        options = {"temperature": tau, "base_temperature": 0.07, "contrast_mode": mode}
        case = f"supcon_b{B}_v{V}_d{D}_k{classes}_tau{tau}_{mode}"
        made |= name_fields(case, features=features, labels=labels, **options, loss=loss, grad=gradient)
    features = F.normalize(randn(20, 2, 32), dim=2)
    loss, gradient = differentiate(lambda f: original(0.1)(f), features)
    made |= name_fields("simclr_b20_v2_d32", features=features, temperature=0.1, loss=loss, grad=gradient)
    return made


def conkd_contrast(clones: Path) -> Arrays:
    original = class_of_readme(clones / "ConKD-Lion" / "README.md", "SupContrastiveLoss")
    made: Arrays = {}
    for B, D, classes in ((16, 10, 10), (65, 64, 10), (128, 32, 100)):
        features, labels = randn(B, D), torch.randint(0, classes, (B,))
        loss, gradient = differentiate(lambda f: original(0.07)(f, labels), features)  # noqa: B023
        case = f"supcontrastive_seed_n{B}_d{D}_k{classes}"
        made |= name_fields(case, features=features, labels=labels, temperature=0.07, loss=loss, grad=gradient)
    return made


def attention_maps(clones: Path) -> Arrays:
    original = import_file(clones / "RepDistiller" / "distiller_zoo" / "AT.py").Attention()
    made: Arrays = {}
    for B, (c_s, size_s), (c_t, size_t) in ((4, (16, 8), (64, 8)), (1, (32, 16), (32, 8)), (2, (8, 7), (24, 14))):
        student, teacher = randn(B, c_s, size_s, size_s), randn(B, c_t, size_t, size_t)
        loss, gradient = differentiate(lambda s: original([s], [teacher.double()]), student)  # noqa: B023
        made |= name_fields(f"at_n{B}_{c_s}x{size_s}_{c_t}x{size_t}", student=student, teacher=teacher, loss=loss, grad=gradient)
    return made


def representation_distillation(clones: Path) -> Arrays:
    n_data, nce_k, D, B, temperature, momentum = 200, 32, 16, 16, 0.07, 0.5
    package = "repdistiller_crd"
    sys.modules[package] = SimpleNamespace(__path__=[str(clones / "RepDistiller" / "crd")])  # type: ignore[assignment]
    memory = import_file(clones / "RepDistiller" / "crd" / "memory.py", package)
    criterion = import_file(clones / "RepDistiller" / "crd" / "criterion.py", package)
    memory.AliasMethod.cuda = lambda self: None  # the original asks for a GPU
    options = SimpleNamespace(s_dim=D, t_dim=D, feat_dim=D, nce_k=nce_k, nce_t=temperature, nce_m=momentum, n_data=n_data)
    loss = criterion.CRDLoss(options)
    loss.embed_s = loss.embed_t = nn.Identity()
    loss.contrast.params = torch.tensor([nce_k, temperature, -1, -1, momentum], dtype=torch.float64)
    made: Arrays = {"n_data": n_data, "nce_k": nce_k, "dim": D, "temperature": temperature, "momentum": momentum}
    for name in ("memory_v1", "memory_v2"):
        made[name] = getattr(loss.contrast, name).numpy().copy()
        setattr(loss.contrast, name, getattr(loss.contrast, name).double())
    for step in range(3):
        f_s, f_t = F.normalize(randn(B, D), dim=1), F.normalize(randn(B, D), dim=1)
        idx = torch.randperm(n_data)[:B]
        contrast_idx = torch.cat([idx[:, None], torch.randint(0, n_data, (B, nce_k))], 1)
        value, grad_s, grad_t = differentiate(lambda s, t: loss(s, t, idx, contrast_idx), f_s, f_t)  # noqa: B023
        drawn = {"f_s": f_s, "f_t": f_t, "idx": idx, "contrast_idx": contrast_idx}
        made |= name_fields(f"step{step}", **drawn, loss=value, grad_s=grad_s, grad_t=grad_t)
    made |= {f"{name}_after": getattr(loss.contrast, name).numpy() for name in ("memory_v1", "memory_v2")}
    made |= {"Z_v1": loss.contrast.params[2].item(), "Z_v2": loss.contrast.params[3].item()}
    return name_fields("crd", **made)


def lion(_: Path) -> Arrays:
    lr, betas, weight_decay, steps = 3e-4, (0.95, 0.98), 0.1, 7
    params = [nn.Parameter(randn(*shape)) for shape in ((8, 3, 3, 3), (10, 51), (10,), (1,), (13, 27))]
    made: Arrays = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "weight_decay": weight_decay, "steps": steps}
    made |= {f"init{i}": p.detach().numpy().copy() for i, p in enumerate(params)}
    optimizer = Lion(params, lr=lr, betas=betas, weight_decay=weight_decay)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape) * (torch.rand(p.shape) < 0.8)  # sign(0) is 0
            made[f"step{step}/grad{i}"] = p.grad.numpy().copy()
        optimizer.step()
    made |= {f"final{i}": p.detach().numpy() for i, p in enumerate(params)}
    made |= {f"exp_avg{i}": optimizer.state[p]["exp_avg"].numpy() for i, p in enumerate(params)}
    return name_fields("lion", **made)


def main() -> None:
    clones = Path(sys.argv[1])
    torch.manual_seed(0)
    made: Arrays = {}
    for part in (logit_distillation, supervised_contrast, conkd_contrast, attention_maps, representation_distillation, lion):
        made |= part(clones)
    path = Path(__file__).with_name("oracles.npz")
    arrays: Arrays = {key: np.asarray(value) for key, value in made.items()}
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(made)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
