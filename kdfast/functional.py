"""Functional forms of the losses: stateless, differentiable, one call each.

Shapes: N rows, C classes, B samples, V views, D features. Arithmetic is float32 for float32, bfloat16 and float16
inputs, and float64 for float64. Every function raises ValueError or TypeError in one sentence that names the argument.
"""

from collections.abc import Sequence

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.ops import attention_map, checks, nce
from kdfast.ops.distill_kl import linear as linear_kd
from kdfast.ops.distill_kl import op as distill_kl
from kdfast.ops.distill_kl.options import Divergence, KDOptions, Reduction
from kdfast.ops.precision import at_least_float32
from kdfast.ops.supcon import op as supcon

__all__ = [
    "attention_transfer_loss",
    "crd_loss",
    "hint_loss",
    "kd_loss",
    "linear_kd_loss",
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
    divergence: Divergence = "forward",
    reduction: Reduction = "mean",
) -> Tensor:
    """Logit distillation from one or several teachers, optionally with standardized logits, optionally with cross-entropy.

    With T = temperature, p_k = softmax(z(teacher_k) / T) and q = softmax(z(student) / T), each row has the loss

        ce_weight * CE(student, label) + kd_weight * sum_k teacher_weights[k] * T^2 * D(p_k, q)

    z is the identity, or with `standardize` (x - mean) / (sd + eps) over the row's classes, sd unbiased; masked classes have no part in
    mean and sd, and no gradient. They are those of -inf, or 2^24 times max(1, |largest|) below the row's largest logit, as -1e30 is
    among usual ones. The cross-entropy sees the logits unchanged. Gradients reach the student and those teachers that require them;
    there is no second derivative. Papers: Hinton et al., Distilling the Knowledge in a Neural Network (2015); Sun et al., Logit
    Standardization in Knowledge Distillation (CVPR 2024).

    Args:
        student: logits [..., C], floating, any strides.
        teacher: logits in student's shape; or a sequence of K such tensors, or one tensor [K, ..., C]. On student's device; the
            floating dtype may differ.
        labels: class indices, integers of any dtype [...]. Required if ce_weight is not 0; otherwise they only say which rows are ignored.
        temperature: T > 0.
        standardize: standardizes each row of logits first, so that scale and offset do not matter.
        eps: added to the standard deviation.
        kd_weight: weight of the distillation term; at 0 the teachers are not read.
        ce_weight: weight of the cross-entropy; at 0 it is not computed.
        teacher_weights: K numbers; None: ones.
        label_smoothing: of the cross-entropy, in [0, 1], as in torch.nn.functional.cross_entropy.
        ignore_index: a row with this label adds nothing to either term, whatever its logits.
        divergence: D. "forward" is KL(p || q), "reverse" is KL(q || p), "js" is the Jensen-Shannon divergence
            (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2. All three are scaled by T^2.
        reduction: "mean" over the rows that are not ignored (0 if all are), "sum", or "none".

    Returns:
        [], or [...] for reduction "none"; float32, or float64 if an input is. A class of probability 0 (a logit of -inf) adds
        nothing. A row's loss depends on that row alone; equal inputs give equal bits.

    Raises:
        ValueError: a shape, a device or an option does not fit, labels are missing, or (on the CPU) a label is out of range. On a
            GPU, where reading labels would wait for the device, such a row's loss and gradient are NaN.
        TypeError: logits are not floating, labels are no integers, or an option is no number.
        RuntimeError: the gradient is itself differentiated (create_graph=True).

    Example:
        >>> import torch
        >>> from kdfast.functional import kd_loss
        >>> student = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher, labels = torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1])
        >>> loss = kd_loss(student, teacher, labels, temperature=2.0, kd_weight=0.9, ce_weight=0.1)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", student.grad.shape)
        1.7153 torch.Size([1, 3])
    """
    teachers = distill_kl.separate_teachers(teacher, student)
    options = KDOptions(
        temperature=temperature,
        standardize=standardize,
        eps=eps,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        teacher_weights=teacher_weights,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        divergence=divergence,
        reduction=reduction,
    )
    return distill_kl.kd_loss(student, teachers, labels, options)


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    temperature: float = 4.0,
    standardize: bool = False,
    eps: float = 1e-7,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    divergence: Divergence = "forward",
    reduction: Reduction = "mean",
) -> Tensor:
    """kd_loss of two linear layers' outputs, for vocabularies whose logits [N, C] need too much memory.

    Equal to kd_loss(F.linear(student_hidden, student_weight, student_bias), F.linear(teacher_hidden, ...), labels, ...), but the
    logits exist for `chunk_rows` rows at a time. Beyond inputs and gradients it needs 1.25 * chunk_rows * C times the bytes of a
    student's and a teacher's logit (from about 64 rows on). Two cases need more: autocast copies float32 weights to its dtype, and
    a 16-bit weight that requires grad needs, with more rows than chunk_rows, 4 C D bytes for its gradient's float32 sum.

    Gradients reach those of the six tensors that require them; there is no second derivative. The forward pass computes them; with
    reduction "none", and for float16 logits, the backward pass does, from the inputs (compiled, clone those of inference mode).

    Args:
        student_hidden: [..., D_s], the input of the student's last layer; floating.
        student_weight: [C, D_s], in student_hidden's dtype unless autocast rounds both to its own, as in F.linear.
        teacher_hidden: [..., D_t], for the same rows; dtype and D_t may differ from the student's.
        teacher_weight: [C, D_t].
        labels: class indices [...], as for kd_loss.
        student_bias: [C].
        teacher_bias: [C].
        chunk_rows: rows whose logits exist at a time. None: 2^24 / C (2^27 / C on CUDA), at least 64.
        temperature: T > 0, this and the following as for kd_loss.
        standardize: standardizes each row of logits.
        eps: added to the standard deviation.
        kd_weight: weight of the distillation term; at 0 the teacher is not read.
        ce_weight: weight of the cross-entropy.
        label_smoothing: of the cross-entropy, in [0, 1].
        ignore_index: a row with this label adds nothing. Its hidden states must be finite: the weights' gradients contain 0 times them.
        divergence: "forward", "reverse" or "js".
        reduction: "mean" over the rows that are not ignored (0 if all are), "sum", or "none".

    Returns:
        [], or [...] for reduction "none"; float32, or float64 if an input is. Equal inputs give equal bits.

    Raises:
        ValueError: as for kd_loss, or chunk_rows is not a positive integer. On a GPU a label out of range makes weights' gradients NaN.
        TypeError: a tensor is not floating, or not in its hidden tensor's dtype without autocast; or labels are no integers.
        RuntimeError: create_graph=True.

    Example:
        >>> import torch
        >>> from kdfast.functional import linear_kd_loss
        >>> h, w = torch.ones(5, 4), torch.eye(3, 4).requires_grad_()
        >>> linear_kd_loss(h, w, 2 * h, torch.ones(3, 4), chunk_rows=2).backward()  # both are uniform over 3 classes
        >>> w.grad.abs().max() < 1e-6
        tensor(True)
    """
    options = KDOptions(
        operator="linear_kd_loss",
        temperature=temperature,
        standardize=standardize,
        eps=eps,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        divergence=divergence,
        reduction=reduction,
    )
    student = linear_kd.Layer(student_hidden, student_weight, student_bias)
    teacher = linear_kd.Layer(teacher_hidden, teacher_weight, teacher_bias)
    return linear_kd.linear_kd_loss(student, teacher, labels, chunk_rows, options)


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
    contrast_mode: supcon.ContrastMode = "all",
    self_positive: bool = False,
    duplicates: int = 1,
    normalize: bool = False,
    reduction: supcon.Reduction = "mean",
    group: "dist.ProcessGroup | None" = None,
    uneven: bool = False,
) -> Tensor:
    """Supervised contrastive loss of "Supervised Contrastive Learning" (Khosla et al., NeurIPS 2020), in O(N D) memory.

    Every row is an anchor, contrasted with all other rows; S_ij = f_i . f_j / temperature and P_i are the positives of i:

        L_i = logsumexp_{j != i} S_ij - mean_{j in P_i} S_ij

    An anchor without positives has the loss 0 and counts in the mean, as in the authors' code. Features need not have unit length, and
    no temperature makes the sum underflow. Bitwise reproducible on a CPU.

    With a process group, anchors of this rank are contrasted with the rows of all ranks. All ranks call the loss and its backward
    together. "mean" and "sum" return the joined batch's value, and gradients times the number of ranks: DistributedDataParallel,
    which averages, then has one process's gradients on the joined batch. "none" returns the losses of this rank's anchors.

    Args:
        features: [B, V, D], V views of B samples (further dimensions are flattened), or [B, D], which counts as `duplicates` equal
            views. float32, float64, bfloat16 or float16; any strides.
        labels: [B], of any dtype; rows of one label are each other's positives. A sample labelled -100 is no anchor (its loss is 0 and
            no part of the mean) and no positive, but remains one of the rows to contrast with. Without labels and mask, the positives
            are the other views of the same sample (SimCLR).
        mask: [B, B], bool, int or floating, without gradient, instead of labels: entry (i, j) weighs j among the positives of i.
        contrast: [M, D], rows to contrast with that are no anchors, such as a queue; differentiable. The same on all ranks.
        contrast_labels: [M], with `labels`; without them these rows are no positives.
        temperature: positive.
        base_temperature: positive; the loss is multiplied by temperature / base_temperature. None: by 1.
        contrast_mode: "all": every view is an anchor; "one": only the first view of each sample is.
        self_positive: counts the anchor among its own positives (not in the logsumexp), as ConKD-Lion's class does.
        duplicates: how many equal views [B, D] stands for; 2 costs a quarter of the work of stacking the features twice.
        normalize: divides features and contrast by their L2 norms first (1e-12 at least).
        reduction: "mean" over the anchors, "sum" over them, or "none".
        group: a torch.distributed.ProcessGroup whose ranks hold equally many samples. None: this process alone.
        uneven: allows ranks with different numbers of samples, also none. The host waits for these numbers.

    Returns:
        A scalar, or for "none" [B, V] (V = duplicates for features [B, D]; [B] with contrast_mode "one"). float64 for float64
        features, float32 otherwise.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit.
        RuntimeError: the gradient is itself differentiated (create_graph=True).

    Example:
        >>> import torch
        >>> from kdfast.functional import supcon_loss
        >>> features = torch.eye(4, requires_grad=True)
        >>> loss = supcon_loss(features, torch.tensor([0, 0, 1, 1]), temperature=1.0)  # log 3
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", features.grad.shape)
        1.0986 torch.Size([4, 4])
    """
    options = supcon.Options(
        temperature=temperature,
        base_temperature=base_temperature,
        contrast_mode=contrast_mode,
        self_positive=self_positive,
        duplicates=duplicates,
        normalize=normalize,
        reduction=reduction,
        group=group,
        uneven=uneven,
    )
    return supcon.supcon_loss(features, labels, mask, contrast, contrast_labels, options)


# ---- contrastive representation distillation -------------------------------------------------------------------------


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    indices: Tensor,
    student_Z: Tensor | None = None,
    teacher_Z: Tensor | None = None,
    *,
    temperature: float = 0.07,
) -> Tensor:
    """Contrastive representation distillation (Tian, Krishnan and Isola, ICLR 2020), both directions, without the gathered rows.

    The student is compared with the teacher's bank and the teacher with the student's. In each direction, for embeddings v, a bank x
    of n rows and 1 + K indices for each sample, scores are P = exp(x . v / temperature) / Z, and with m = K, P_n = 1 / n, eps = 1e-7

        L = -(1/B) sum_i [log(P_i0 / (P_i0 + m P_n + eps)) + sum_k log(m P_n / (P_ik + m P_n + eps))]

    The gathered rows [B, 1 + K, D] never exist at once: beyond the indices, memory is up to six chunks of 4 MB, on a GPU some parts of
    the gradient. Gradients are made in the forward pass, so the banks may be overwritten before backward. They reach the embeddings
    that require them, not the banks. CRDLoss keeps banks and constants, and draws the negatives.

    Args:
        student: [B, D], floating, normalized by the caller.
        teacher: [B, D]; its dtype may differ.
        student_bank: [n, D]; the teacher is compared with it.
        teacher_bank: [n, D]; the student is compared with it.
        indices: int64 [B, 1 + K], rows of the banks: for each sample first its own, then its negatives.
        student_Z: [], the constant of the student's scores; None: this batch's, n times its mean of exp(x . v / temperature).
        teacher_Z: [], of the teacher's scores.
        temperature: positive.

    Returns:
        0-dim; 0 for an empty batch. float32, or float64 if an input is. Equal inputs give equal bits.

    Raises:
        ValueError: shapes or devices do not fit, the temperature is not positive, or (on the CPU) an index is out of range. On a GPU,
            where reading indices would wait for the device, loss and gradients are NaN then.
        TypeError: embeddings or banks are not floating, indices are not int64, or a bank or a constant requires grad.
        RuntimeError: the gradient is itself differentiated (create_graph=True).

    Example:
        >>> import torch
        >>> from kdfast.functional import crd_loss
        >>> banks = torch.eye(3), torch.eye(3)
        >>> indices = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> crd_loss(torch.eye(3)[:2], torch.eye(3)[:2], *banks, indices, temperature=1.0)
        tensor(2.6418)
    """
    for name, x in zip(
        ("student", "teacher", "student_bank", "teacher_bank", "indices"), (student, teacher, student_bank, teacher_bank, indices)
    ):
        checks.is_tensor(f"crd_loss: {name}", x)
    if student.dim() != 2 or teacher.shape != student.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"crd_loss: student and teacher must both be [B, D], got {shapes}")
    for name, bank in (("student_bank", student_bank), ("teacher_bank", teacher_bank)):
        if bank.dim() != 2 or bank.shape[1] != student.shape[1]:
            raise ValueError(f"crd_loss: {name} must be [n, {student.shape[1]}] as the embeddings are, got {tuple(bank.shape)}")
    if len(student_bank) != len(teacher_bank):
        raise ValueError(f"crd_loss: teacher_bank must have student_bank's {len(student_bank)} rows, got {len(teacher_bank)}")
    if student_Z is None:
        student_Z = nce.normalizer(student, teacher_bank, indices, temperature)
    if teacher_Z is None:
        teacher_Z = nce.normalizer(teacher, student_bank, indices, temperature)
    of_student = nce.nce_loss(student, teacher_bank, indices, student_Z, temperature)
    return of_student + nce.nce_loss(teacher, student_bank, indices, teacher_Z, temperature)


# ---- attention transfer, hints, self-distillation --------------------------------------------------------------------


def attention_transfer_loss(student_maps: Tensor | Sequence[Tensor], teacher_maps: Tensor | Sequence[Tensor], *, p: float = 2) -> Tensor:
    """Mean squared difference of attention maps ("Paying More Attention to Attention", ICLR 2017), summed over stages.

    A map is the mean over channels of |F|^p, divided by its L2 norm over the pixels. If the sizes of a stage differ, the larger
    feature map is adaptive-average-pooled to the smaller size first. Gradients reach all maps that require them.

    Args:
        student_maps: [B, C, H, W], floating, or a sequence of such tensors, one a stage.
        teacher_maps: as many; C, H and W may differ from the student's.
        p: power, > 0. Below 1, where slopes are infinite at 0, the gradient of an activation of 0 is 0.

    Returns:
        0-dim, float32 (float64 for float64 features); 0 for an empty batch.

    Raises:
        ValueError: stages, batches or devices do not match, a map is not 4-D, or p is not positive.
        TypeError: a map is no tensor, or not floating.

    Example:
        >>> import torch
        >>> from kdfast.functional import attention_transfer_loss
        >>> student = torch.tensor([[[[1.0, 0.0]]]])  # attends to the left of two pixels, the teacher to both
        >>> print(f"{attention_transfer_loss(student, torch.ones(1, 8, 1, 2)).item():.4f}")
        0.2929
    """
    return attention_map.attention_transfer_loss(student_maps, teacher_maps, p=p)


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two equally shaped feature tensors ("FitNets", ICLR 2015), in float32 or float64.

    Args:
        student: floating, any shape.
        teacher: floating, the same shape; its dtype may differ.

    Returns:
        0-dim; 0 for empty tensors.

    Raises:
        ValueError: shapes differ.
        TypeError: an argument is no tensor.

    Example:
        >>> import torch
        >>> from kdfast.functional import hint_loss
        >>> hint_loss(torch.zeros(2, 3), torch.full((2, 3), 2.0))
        tensor(4.)
    """
    checks.is_tensor("hint_loss: student", student)
    checks.is_tensor("hint_loss: teacher", teacher)
    if student.shape != teacher.shape:
        raise ValueError(f"hint_loss: teacher must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}")
    checks.is_floating("hint_loss: student", student)
    checks.is_on("hint_loss: teacher", teacher, "student's", student.device)
    return reference.mean(F.mse_loss(at_least_float32(student), at_least_float32(checks.savable(teacher)), reduction="none"))


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the softened student against the softened teacher, mean over rows, without a factor of T^2 (TOFD).

    Args:
        student: logits [..., C], floating.
        teacher: logits [..., C]; gradients reach it as well, unless detached.
        temperature: T > 0; both are divided by it.

    Returns:
        The mean of -sum_c softmax(teacher / T) log softmax(student / T), []; 0 for no rows; float32 (float64 for float64).

    Raises:
        ValueError: shapes differ, or temperature is not positive.
        TypeError: an argument is no tensor.

    Example:
        >>> import torch
        >>> from kdfast.functional import soft_cross_entropy
        >>> soft_cross_entropy(torch.zeros(2, 4), torch.randn(2, 4))  # a uniform student: log 4
        tensor(1.3863)
    """
    checks.is_tensor("soft_cross_entropy: student", student)
    checks.is_tensor("soft_cross_entropy: teacher", teacher)
    temperature = checks.number("soft_cross_entropy: temperature", temperature)
    if student.shape != teacher.shape or student.ndim == 0:
        raise ValueError(f"soft_cross_entropy: teacher must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}")
    for name, logits in (("student", student), ("teacher", teacher)):
        checks.is_floating(f"soft_cross_entropy: {name}", logits)
    checks.is_on("soft_cross_entropy: teacher", teacher, "student's", student.device)
    checks.positive_number("soft_cross_entropy: temperature", temperature)
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    return reference.soft_cross_entropy(student, teacher, temperature)
