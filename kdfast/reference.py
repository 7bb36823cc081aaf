"""The meaning of each operator, in plain PyTorch that works in any floating dtype: the oracle of the tests.

Every function follows its paper line by line, and autograd differentiates it. None checks its input (kdfast/ops does), and speed does
not matter here. N rows, C classes, D features, T temperature, tau contrastive temperature.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "attention_transfer_loss",
    "crd_loss",
    "kd_loss",
    "linear_kd_loss",
    "lion_step",
    "soft_cross_entropy",
    "supcon_loss",
]

# ---- logit distillation ----------------------------------------------------------------------------------------------


def kd_loss(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    eps: float = 1e-7,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    teacher_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    divergence: Literal["forward", "reverse", "js"] = "forward",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Hinton et al. (2015); Sun et al., Logit Standardization (CVPR 2024); functional.kd_loss describes the arguments.

    Example:
        >>> import torch
        >>> from kdfast import reference
        >>> reference.kd_loss(torch.zeros(2, 3), torch.zeros(2, 3))  # equal logits
        tensor(0.)
    """
    if isinstance(teacher, Tensor):
        teachers = list(teacher) if teacher.dim() == student.dim() + 1 else [teacher]
    else:
        teachers = list(teacher)
    dtype = torch.float64 if torch.float64 in {x.dtype for x in (student, *teachers)} else torch.float32
    student, teachers = student.to(dtype), [x.to(dtype) for x in teachers]
    weights = [1.0] * len(teachers) if teacher_weights is None else teacher_weights
    counts = torch.ones_like(student[..., 0], dtype=torch.bool) if labels is None else labels != ignore_index
    # zeros in an ignored row: its gradient is 0 whatever its logits
    student, *teachers = (x.where(counts[..., None], 0) for x in (student, *teachers))

    rows = torch.zeros_like(student[..., 0])
    if kd_weight:
        log_q = tempered_log_softmax(student, temperature, standardize, eps)
        for weight, logits in zip(weights, teachers):
            log_p = tempered_log_softmax(logits, temperature, standardize, eps)
            rows = rows + kd_weight * weight * temperature**2 * _DIVERGENCES[divergence](log_p, log_q)
    if ce_weight and labels is not None:
        log_probability = F.log_softmax(student, dim=-1)
        hit = log_probability.gather(-1, labels.where(counts, 0)[..., None])[..., 0]
        entropy = -(1 - label_smoothing) * hit
        if label_smoothing:
            entropy = entropy - label_smoothing * log_probability.mean(-1)
        rows = rows + ce_weight * entropy

    rows = rows.where(counts, 0)
    if reduction == "none":
        return rows
    return rows.sum() / counts.sum().clamp(min=1) if reduction == "mean" else rows.sum()


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """kd_loss, with its options, of the logits hidden @ weight.T + bias.

    Example:
        >>> import torch
        >>> from kdfast import reference
        >>> hidden, weight = torch.ones(2, 4), torch.zeros(3, 4)
        >>> reference.linear_kd_loss(hidden, weight, hidden, weight)  # equal layers
        tensor(0.)
    """
    student = F.linear(student_hidden, student_weight, student_bias)
    teacher = F.linear(teacher_hidden, teacher_weight, teacher_bias)
    return kd_loss(student, teacher, labels, **options)


def tempered_log_softmax(x: Tensor, temperature: float, standardize: bool, eps: float) -> Tensor:
    """Log softmax(z / T), z = (x - mean) / (sd + eps) with standardize (sd unbiased), z = x without. x [..., C].

    Masked classes have no part in mean and sd.
    """
    if standardize:
        counts = ~masked(x)
        n = counts.sum(-1, keepdim=True, dtype=x.dtype)
        x = x - x.amax(-1, keepdim=True).detach()  # changes no value, and keeps moments exact for constant rows
        x = x - x.where(counts, 0).sum(-1, keepdim=True) / n
        norm = torch.linalg.vector_norm(x.where(counts, 0), dim=-1, keepdim=True, dtype=torch.float64)  # squares may overflow
        sd = (norm / (n - 1).clamp(min=1).sqrt()).to(x.dtype)
        x = x / (sd.where(counts, sd.detach()) + eps)  # infinities times a gradient of 0 must not reach sd
    return F.log_softmax(x / temperature, dim=-1)


def masked(x: Tensor) -> Tensor:
    """Tells which logits [..., C] are so low that they stand for no class.

    They are -inf, or 2^24 times max(1, |largest|) below the row's largest: float32 could not tell the other classes apart beside them.
    """
    top = x.detach().amax(-1, keepdim=True)
    return x.detach() - top <= -(2.0**24) * top.abs().clamp(min=1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_c p_c log(p_c / q_c) over the last dimension; a class of probability 0 under p counts as 0."""
    p = log_p.exp()
    log_ratio = log_p.where(p != 0, 0) - log_q.where(p != 0, 0)
    return (p * log_ratio).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with the equal mixture m = (p + q) / 2; at most log 2."""
    mixture = (log_p.exp() + log_q.exp()) / 2
    log_m = mixture.where(mixture != 0, 1).log()
    return (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m)) / 2


_DIVERGENCES = {
    "forward": kl_divergence,
    "reverse": lambda log_p, log_q: kl_divergence(log_q, log_p),
    "js": jensen_shannon,
}


# ---- supervised contrastive loss -------------------------------------------------------------------------------------


def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    contrast_mode: Literal["all", "one"] = "all",
    self_positive: bool = False,
    duplicates: int = 1,
    normalize: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020): features [B, V, D], or [B, D] as `duplicates` equal views.

    S = F F' / tau;  L_i = logsumexp_{j != i} S_ij - sum_j P_ij S_ij / sum_j P_ij;  P_ij = 1 for rows of one label, or the mask.
    functional.supcon_loss describes the arguments.

    Example:
        >>> import torch
        >>> from kdfast import reference
        >>> reference.supcon_loss(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=1.0)  # log 3
        tensor(1.0986)
    """
    views = features[:, None].expand(-1, duplicates, -1) if features.ndim == 2 else features.flatten(2)
    B, V = views.shape[:2]
    rows = views.transpose(0, 1).flatten(0, 1)  # view by view: row v B + b
    columns = rows if contrast is None else torch.cat([rows, contrast])
    if normalize:
        rows, columns = F.normalize(rows, dim=1), F.normalize(columns, dim=1)
    anchors = rows if contrast_mode == "all" else rows[:B]
    N, M = len(anchors), len(columns)

    if mask is None:
        names = torch.arange(B, device=features.device) if labels is None else labels.reshape(B)
        mask = names[:, None] == names
    positive = torch.zeros(N, M, dtype=features.dtype, device=features.device)
    positive[:, : len(rows)] = mask.repeat(N // max(B, 1), V)
    if contrast_labels is not None:
        positive[:, len(rows) :] = (names[:, None] == contrast_labels).repeat(N // max(B, 1), 1)
    itself = torch.eye(N, M, dtype=torch.bool, device=features.device)
    if not self_positive:
        positive = positive.masked_fill(itself, 0)

    if M < 2:  # nothing to contrast with
        loss = 0 * anchors.sum(1)
    else:
        S = anchors @ columns.T / temperature
        log_probability = S - S.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
        weight = positive.sum(1)
        weight = torch.where(weight < 1e-6, 1, weight)  # an anchor without positives: its loss is 0
        loss = -(positive * log_probability).sum(1) / weight
    if base_temperature is not None:
        loss = loss * (temperature / base_temperature)
    counts = torch.ones_like(loss, dtype=torch.bool) if labels is None else (names.double() != -100).repeat(N // max(B, 1))
    loss = loss.where(counts, 0)
    if contrast_mode == "all":
        loss = loss.view(V, B).T
    if reduction == "none":
        return loss
    return loss.sum() / (counts.sum().clamp(min=1) if reduction == "mean" else 1)


# ---- contrastive representation distillation -------------------------------------------------------------------------


def crd_loss(anchors: Tensor, bank: Tensor, indices: Tensor, *, temperature: float = 0.07, Z: Tensor | None = None) -> Tensor:
    """One direction of CRD (Tian et al., ICLR 2020), as its code has it: anchors [B, D], a bank [n, D], indices [B, 1 + K].

    The first column of indices is the positive. Z None: the batch's mean score times n.

    Example:
        >>> import torch
        >>> from kdfast import reference
        >>> reference.crd_loss(torch.eye(3)[:1], torch.eye(3), torch.tensor([[0, 1, 2]]), temperature=1.0)
        tensor(1.3209)
    """
    B, n, m = len(anchors), len(bank), indices.shape[1] - 1
    scores = (torch.einsum("bkd,bd->bk", bank[indices], anchors) / temperature).exp()
    scores = scores / (scores.mean().detach() * n if Z is None else Z)
    P_n, eps = 1 / n, 1e-7
    positive, negative = scores[:, 0], scores[:, 1:]
    log_D1 = (positive / (positive + m * P_n + eps)).log()
    log_D0 = (m * P_n / (negative + m * P_n + eps)).log()
    return -(log_D1.sum() + log_D0.sum()) / max(B, 1)


# ---- attention transfer, hints, self-distillation --------------------------------------------------------------------


def attention_transfer_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], p: float = 2) -> Tensor:
    """Sum over stages of the mean squared difference of attention maps; features [B, C, H, W], the larger pooled to the smaller.

    Example:
        >>> import torch
        >>> from kdfast import reference
        >>> reference.attention_transfer_loss([torch.tensor([[[[1.0, 0.0]]]])], [torch.ones(1, 8, 1, 2)])
        tensor(0.2929)
    """
    loss = torch.zeros((), dtype=student_maps[0].dtype, device=student_maps[0].device)
    for student, teacher in zip(student_maps, teacher_maps):
        size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
        student_map = attention_map(F.adaptive_avg_pool2d(student, size), p)
        teacher_map = attention_map(F.adaptive_avg_pool2d(teacher, size), p)
        loss = loss + mean((student_map - teacher_map).pow(2))
    return loss


def attention_map(features: Tensor, p: float = 2) -> Tensor:
    """Mean over channels of |F|^p, flattened to [B, H W] and divided by its L2 norm (Zagoruyko & Komodakis, 2017)."""
    features = features if p >= 1 else features.where(features != 0, features.detach())  # the slope at 0 is infinite: no gradient
    return F.normalize(features.abs().pow(p).mean(dim=1).flatten(1))


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over rows of -sum_c softmax(teacher / T) log softmax(student / T), without a factor of T^2 (TOFD).

    Example:
        >>> import torch
        >>> from kdfast import reference
        >>> reference.soft_cross_entropy(torch.zeros(2, 4), torch.zeros(2, 4), 1.0)  # log 4
        tensor(1.3863)
    """
    return mean(-((teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)).sum(-1))


def mean(x: Tensor) -> Tensor:
    """The mean of all elements, 0 of none."""
    return x.mean() if x.numel() else x.sum()


# ---- Lion ------------------------------------------------------------------------------------------------------------


def lion_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    init_lr: float | None = None,
    cautious: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of Lion (Chen et al., 2023) on one tensor: parameter and momentum after it.

    init_lr divides the weight decay (lion-pytorch's decoupled_weight_decay); cautious: arXiv:2411.16085.

    Example:
        >>> import torch
        >>> from kdfast import reference
        >>> p, m = reference.lion_step(torch.ones(2), torch.tensor([3.0, -1.0]), torch.zeros(2), lr=0.5)
        >>> p  # every element moves by lr, against its gradient's sign
        tensor([0.5000, 1.5000])
    """
    beta1, beta2 = betas
    g = -g if maximize else g
    decay = weight_decay if init_lr is None else weight_decay / init_lr
    x = beta1 * m + (1 - beta1) * g
    u = torch.where(x.isnan(), x, x.sign())
    if cautious:
        agrees = (u * g > 0).to(u.dtype)
        u = u * agrees / agrees.mean().clamp(min=1e-5)
    return p * (1 - lr * decay) - lr * u, beta2 * m + (1 - beta2) * g
