"""Loss modules: drop-in replacements for the papers' own classes, with their signatures, defaults and values.

State-free unless the method has state (SelfDistillationLoss has a 1x1 convolution, HintLoss a regressor, CRDLoss embeddings and banks).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast import functional
from kdfast.ops import checks, distill_kl, gather, nce, supcon
from kdfast.ops.precision import at_least_float32

# ---- logit distillation ----------------------------------------------------------------------------------------------


def _check_not_swapped(student: Tensor, teacher: Tensor | Sequence[Tensor]) -> None:
    """Raises if the teacher requires grad and the student does not: they were passed in the wrong order."""
    checks.is_tensor("student", student)
    if student.requires_grad:
        return
    teachers = teacher if isinstance(teacher, Sequence) else (teacher,)
    if any(isinstance(t, Tensor) and t.requires_grad for t in teachers):
        raise ValueError("the teacher requires grad and the student does not: student and teacher are swapped")


class KDLoss(nn.Module):
    """Cross-entropy plus distillation: ce_weight * CE(student, labels) + kd_weight * T^2 * KL(p_teacher || p_student).

    With `standardize` every row of logits is standardized first (LSKD, CVPR 2024). That divides a row by its standard
    deviation, so the student is no longer pulled towards the teacher's scale and the distillation gradient is small: keep KD's
    usual kd_weight of 0.9 and accuracy drops below plain KD. The paper uses kd_weight=9, ce_weight=0.1, temperature=2 on
    CIFAR-100 and kd_weight=9, ce_weight=1, temperature=2 on ImageNet.

    Args:
        temperature: T > 0.
        standardize: see above.
        kd_weight, ce_weight: weights of the two terms.
        label_smoothing, ignore_index, divergence, teacher_weights, reduction: as in functional.kd_loss.

    Raises:
        ValueError, TypeError: an option is out of range, or no number.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        standardize: bool = False,
        kd_weight: float = 0.9,
        ce_weight: float = 0.1,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        divergence: str = "forward",
        teacher_weights: Sequence[float] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.standardize = standardize
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.divergence = divergence
        self.teacher_weights = teacher_weights
        self.reduction = reduction
        weights = distill_kl.weights_of(teacher_weights, 0)
        options = distill_kl.Options(
            temperature, standardize, 0.0, kd_weight, ce_weight, weights, label_smoothing, ignore_index, divergence, reduction
        )
        distill_kl.check_options(distill_kl.plain(options))

    def forward(self, student: Tensor, teacher: Tensor | Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of student logits [..., C], teacher logits (one tensor, K in a sequence, or [K, ..., C]) and labels [...].

        Raises:
            ValueError, TypeError: as functional.kd_loss; also if the teacher requires grad and the student does not.
        """
        _check_not_swapped(student, teacher)
        return functional.kd_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            standardize=self.standardize,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            teacher_weights=self.teacher_weights,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            divergence=self.divergence,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"temperature={self.temperature}, standardize={self.standardize}, kd_weight={self.kd_weight}, ce_weight={self.ce_weight}"


class LogitStandardizationLoss(nn.Module):
    """ConKD-Lion's class, its order of arguments: the teacher comes FIRST.

    T^2 * KL(p_teacher || p_student), the mean over rows, both rows of logits standardized (unbiased standard deviation plus 1e-7).
    """

    def forward(self, logits_teacher_in: Tensor, logits_student_in: Tensor, temperature: float = 2) -> Tensor:
        """The loss of teacher logits [N, C] and student logits [N, C]; gradients flow to both where they are required.

        Raises:
            ValueError, TypeError: as functional.kd_loss; also if the teacher requires grad and the student does not.
        """
        _check_not_swapped(logits_student_in, logits_teacher_in)
        return functional.kd_loss(logits_student_in, logits_teacher_in, temperature=temperature, standardize=True)


# ---- supervised contrastive loss, ConKD ------------------------------------------------------------------------------


class SupContrastiveLoss(nn.Module):
    """ConKD-Lion README's class: features are normalized inside, and an anchor counts among its own positives.

    L_i = logsumexp_{j != i} S_ij - mean_{j of i's class, i included} S_ij, S = F F' / temperature for unit rows F; the mean over i.

    Args:
        temperature: positive.
        group: contrasts with the rows of all its ranks, which call it together; see functional.supcon_loss.
    """

    def __init__(self, temperature: float = 0.07, *, group: "dist.ProcessGroup | None" = None) -> None:
        super().__init__()
        supcon.checked_choices(temperature)
        self.temperature = temperature
        self.group = group

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of features [B, D] of any length (embeddings, or logits as the README has it) and labels [B].

        Raises:
            ValueError, TypeError: as functional.supcon_loss.
        """
        return functional.supcon_loss(features, labels, temperature=self.temperature, self_positive=True, normalize=True, group=self.group)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"temperature={self.temperature}"


class SupConLoss(nn.Module):
    """SupContrast's class ("Supervised Contrastive Learning", Khosla et al., NeurIPS 2020), also SimCLR's loss without labels.

    The same signature, inputs and values, and finite where the original divides by an exponential that underflowed: small
    temperatures, features that are not normalized.

    Args:
        temperature: positive.
        contrast_mode: "all": every view is an anchor; "one": only the first view of each sample is.
        base_temperature: positive; the loss is multiplied by temperature / base_temperature.
        group: contrasts with the rows of all its ranks, which call it together; see functional.supcon_loss. Takes no mask.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        supcon.checked_choices(temperature, base_temperature, contrast_mode)
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.group = group

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The loss of features [B, V, ...], normalized by the caller, and labels [B] or a mask [B, B] or neither.

        Raises:
            ValueError, TypeError: as functional.supcon_loss; also if features have fewer than three dimensions.
        """
        checks.is_tensor("SupConLoss: features", features)
        if features.ndim < 3:
            raise ValueError(f"SupConLoss: features must be [B, V, ...] with a dimension of views, got shape {tuple(features.shape)}")
        return functional.supcon_loss(
            features,
            labels,
            mask=mask,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            contrast_mode=self.contrast_mode,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}, base_temperature={self.base_temperature}"


class ConKDLoss(nn.Module):
    """ConKD-Lion's student loss: distillation of standardized logits plus alpha times a supervised contrastive term.

    The teacher comes FIRST, as in LogitStandardizationLoss.

    Args:
        alpha: weight of the contrastive term.
        temperature: of the distillation.
        contrast_temperature: of the contrastive term.
        variant: "readme": the contrastive term is SupContrastiveLoss. "notebook": it is SupConLoss of the features given
            twice, as two equal views (computed as the quarter of that problem that it is); the caller normalizes the features,
            and `teacher` and `student` are the embeddings, taken for logits.
        group: contrasts with the rows of all its ranks, which call it together; see functional.supcon_loss. The distillation term
            stays this rank's own, as averaging gradients over ranks wants it.
    """

    def __init__(
        self,
        alpha: float = 0.15,
        temperature: float = 2.0,
        contrast_temperature: float = 0.07,
        *,
        variant: str = "readme",
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        if variant not in ("readme", "notebook"):
            raise ValueError(f"ConKDLoss: variant must be 'readme' or 'notebook', got {variant!r}")
        KDLoss(temperature)
        supcon.checked_choices(contrast_temperature)
        self.alpha = alpha
        self.temperature = temperature
        self.contrast_temperature = contrast_temperature
        self.variant = variant
        self.group = group

    def forward(self, teacher: Tensor, student: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of teacher and student logits [B, C], the student's features [B, D] and labels [B].

        Raises:
            ValueError, TypeError: as functional.kd_loss and functional.supcon_loss; also if features are not [B, D], or the
                teacher requires grad and the student does not.
        """
        _check_not_swapped(student, teacher)
        if features.ndim != 2:
            raise ValueError(f"ConKDLoss: features must be [B, D], got shape {tuple(features.shape)}")
        readme = self.variant == "readme"
        distillation = functional.kd_loss(student, teacher, temperature=self.temperature, standardize=True)
        contrastive = functional.supcon_loss(
            features,
            labels,
            temperature=self.contrast_temperature,
            self_positive=readme,
            normalize=readme,
            duplicates=1 if readme else 2,
            group=self.group,
        )
        return distillation + self.alpha * contrastive

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return (
            f"alpha={self.alpha}, temperature={self.temperature}, contrast_temperature={self.contrast_temperature}, "
            f"variant={self.variant!r}"
        )


# ---- contrastive representation distillation -------------------------------------------------------------------------


class CRDLoss(nn.Module):
    """Contrastive representation distillation (Tian, Krishnan and Isola, ICLR 2020), as RepDistiller has it.

    Penultimate features of both networks are embedded (linear, then unit length). Every image has a row in two memory banks; the
    student is compared with the teacher's bank and the teacher with the student's: functional.crd_loss has the formula. Rows of the
    batch's images are updated after scoring, bank <- normalize(nce_m bank + (1 - nce_m) v); an image that is twice in a batch takes
    its last embedding, and an embedding that is not finite leaves its row as it was. Z, one constant a direction, is set by the first
    batch in training and stays.

    Negatives are drawn on the device, with replacement, from torch's generator: uniformly over the images of other classes, or without
    `labels` over all other images. The embeddings' parameters are trained with the student: hand them to the optimizer. In eval mode
    neither banks nor constants change. Banks and constants are in the state_dict, so that a checkpoint resumes with the same numbers.

    Where torch.distributed is initialized with several ranks, all of them call the module together in training, with equally large
    batches: the rows of all ranks go into the banks, and the first Z is the mean over ranks. So banks that start equal (as
    DistributedDataParallel makes them, or one seed) stay equal, and are what one process has on the joined batch.

    Args:
        s_dim, t_dim: features of student and teacher.
        n_data: images in the training set.
        labels: [n_data], the class of every image, integers; at least two classes.
        feat_dim: features of the embeddings and the banks.
        nce_k: negatives for each image.
        nce_t: temperature of the scores.
        nce_m: momentum of the banks, in [0, 1].

    Attributes:
        embed_s, embed_t: the embeddings, with RepDistiller's names: embed_s.linear.weight and so on.
        memory_v1, memory_v2: [n_data, feat_dim], the banks of student and teacher.
        Z_v1, Z_v2: [], the constants of the student's scores and of the teacher's; -1 before they are set.

    Raises:
        ValueError: a number is out of range, or labels do not fit.
    """

    memory_v1: Tensor
    memory_v2: Tensor
    Z_v1: Tensor
    Z_v2: Tensor
    by_class: Tensor | None
    class_start: Tensor
    class_size: Tensor

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        n_data: int,
        *,
        labels: Tensor | None = None,
        feat_dim: int = 128,
        nce_k: int = 16384,
        nce_t: float = 0.07,
        nce_m: float = 0.5,
    ) -> None:
        super().__init__()
        if n_data < 2:
            raise ValueError(f"CRDLoss: n_data must be at least 2, or an image has no negatives, got {n_data}")
        if nce_k < 1:
            raise ValueError(f"CRDLoss: nce_k must be positive, got {nce_k}")
        if not 0 < nce_t < math.inf:
            raise ValueError(f"CRDLoss: nce_t must be positive, got {nce_t}")
        if not 0 <= nce_m <= 1:
            raise ValueError(f"CRDLoss: nce_m must be in [0, 1], got {nce_m}")
        self.n_data, self.nce_k, self.nce_t, self.nce_m = n_data, nce_k, nce_t, nce_m
        self.embed_s = _Embedding(s_dim, feat_dim)
        self.embed_t = _Embedding(t_dim, feat_dim)
        bound = 1 / math.sqrt(feat_dim / 3)
        for name in ("memory_v1", "memory_v2"):
            self.register_buffer(name, torch.empty(n_data, feat_dim).uniform_(-bound, bound))
        for name in ("Z_v1", "Z_v2"):
            self.register_buffer(name, torch.tensor(nce.UNSETTLED))
        # images sorted by class, and for every image where its class begins there and how large it is
        tables = (None, None, None) if labels is None else self._sorted_by_class(labels)
        for name, table in zip(("by_class", "class_start", "class_size"), tables):
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CRDLoss":
        before = self.Z_v1, self.Z_v2
        super()._apply(fn, recurse)
        for name, Z in zip(("Z_v1", "Z_v2"), before):
            moved = getattr(self, name)
            if moved.dtype in (torch.float16, torch.bfloat16):  # n times a mean is beyond float16, and a constant is worth more digits
                setattr(self, name, Z.to(moved.device, torch.promote_types(Z.dtype, torch.float32)))
        return self

    def _sorted_by_class(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        checks.is_tensor("CRDLoss: labels", labels)
        if labels.shape != (self.n_data,) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"CRDLoss: labels must be [{self.n_data}] integers, got shape {tuple(labels.shape)}, {labels.dtype}")
        _, class_of, sizes = labels.to(self.memory_v1.device).unique(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise ValueError("CRDLoss: labels must name at least two classes, or an image has no negatives")
        starts = sizes.cumsum(0) - sizes
        return class_of.argsort(stable=True), starts[class_of], sizes[class_of]

    def forward(self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None) -> Tensor:
        """The loss, 0-dim, of student features [B, s_dim ...], teacher features [B, t_dim ...] and the images' numbers idx [B].

        contrast_idx, int64 [B, 1 + K], takes the place of drawn negatives: first the positive, which is idx, then negatives.

        Raises:
            ValueError: shapes do not fit, an index is out of range (on a GPU the loss is NaN), or the teacher requires grad and the
                student does not.
            TypeError: indices are not int64.
        """
        _check_not_swapped(f_s, f_t)
        for name, features, embed in (("f_s", f_s, self.embed_s), ("f_t", f_t, self.embed_t)):
            wanted = embed.linear.in_features
            if features.ndim < 2 or math.prod(features.shape[1:]) != wanted or len(features) != len(f_s):
                raise ValueError(f"CRDLoss: {name} must be [{len(f_s)}, {wanted}], got shape {tuple(features.shape)}")
        return self.of_embeddings(self.embed_s(f_s), self.embed_t(f_t), idx, contrast_idx)

    def of_embeddings(self, v_s: Tensor, v_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None) -> Tensor:
        """The loss where embed_s and embed_t have been called already, in a forward pass that has to hold all trained parameters.

        Args:
            v_s: [B, feat_dim], embeddings of the student.
            v_t: [B, feat_dim], embeddings of the teacher.
            idx: [B] int64, the images' numbers.
            contrast_idx: [B, 1 + K] int64 in place of drawn negatives, as in `forward`.

        Raises:
            ValueError, TypeError: as `forward`.
        """
        self._check_indices(idx, len(v_s))
        if contrast_idx is None:
            contrast_idx = torch.cat([idx[:, None], self._negatives(idx)], 1)
        Z_s = nce.normalizer(v_s, self.memory_v2, contrast_idx, self.nce_t, self.Z_v1)
        Z_t = nce.normalizer(v_t, self.memory_v1, contrast_idx, self.nce_t, self.Z_v2)
        new_s, new_t = v_s.detach(), v_t.detach()
        ranks = dist.group.WORLD if self.training and dist.is_available() and dist.is_initialized() else None
        if ranks is not None and ranks.size() > 1:
            constants = torch.stack([Z_s, Z_t]).expand(len(idx), 2)
            new_s, new_t, idx, constants = gather.of_all_ranks([new_s, new_t, idx, constants], ranks)
            means = constants.mean(0)  # every rank counts as often
            Z_s, Z_t = (torch.where(nce.is_settled(Z), Z, mean) for Z, mean in zip((self.Z_v1, self.Z_v2), means))
        loss = functional.crd_loss(v_s, v_t, self.memory_v1, self.memory_v2, contrast_idx, Z_s, Z_t, temperature=self.nce_t)
        if self.training:
            with torch.no_grad():
                self.Z_v1.copy_(Z_s)
                self.Z_v2.copy_(Z_t)
                _update(self.memory_v1, idx, new_s, self.nce_m)
                _update(self.memory_v2, idx, new_t, self.nce_m)
        return loss

    def _check_indices(self, idx: Tensor, B: int) -> None:
        if idx.dtype != torch.int64:
            raise TypeError(f"CRDLoss: idx must be int64, got {idx.dtype}")
        if idx.shape != (B,):
            raise ValueError(f"CRDLoss: idx must be [{B}], got shape {tuple(idx.shape)}")
        if idx.device.type == "cpu" and len(idx) and not torch.compiler.is_compiling():
            least, most = idx.aminmax()
            if least < 0 or most >= self.n_data:
                raise ValueError(f"CRDLoss: idx must be in [0, {self.n_data}), got {int(least if least < 0 else most)}")

    def _negatives(self, idx: Tensor) -> Tensor:
        """[B, nce_k] images other than idx, of other classes where there are labels."""
        # a remainder of 62 bits: no image is likelier than another by more than n_data / 2^62
        draws = torch.randint(2**62, (len(idx), self.nce_k), device=idx.device)
        if self.by_class is None:
            other = draws.remainder_(self.n_data - 1)
            return other.add_(other >= idx[:, None])
        idx = idx.clamp(0, self.n_data - 1)  # one out of range is the loss's to refuse
        start, size = self.class_start[idx, None], self.class_size[idx, None]
        other = draws.remainder_(self.n_data - size)
        return self.by_class[other.add_(size * (other >= start))]  # past the image's own class, which is one block

    def extra_repr(self) -> str:
        """What print(module) shows beside the embeddings."""
        return f"n_data={self.n_data}, nce_k={self.nce_k}, nce_t={self.nce_t}, nce_m={self.nce_m}, labels={self.by_class is not None}"


class _Embedding(nn.Module):
    """A linear layer, then unit length."""

    def __init__(self, dim: int, feat_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, feat_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim], further dimensions flattened -> [B, feat_dim], float32 at least."""
        x = self.linear(x.flatten(1).to(self.linear.weight.dtype))
        return F.normalize(at_least_float32(x), dim=1)


def _update(bank: Tensor, idx: Tensor, v: Tensor, momentum: float) -> None:
    """Moves rows idx [B] of the bank towards v [B, D]; of equal idx the last one counts, whichever order a device writes in."""
    idx = idx.clamp(0, len(bank) - 1)  # one out of range has made the loss NaN, and must not be written out of bounds
    ordered, order = idx.sort(stable=True)
    last = order[torch.searchsorted(ordered, idx, right=True) - 1]
    before = bank[idx]
    rows = F.normalize(momentum * before.to(v.dtype) + (1 - momentum) * v, dim=1).to(bank.dtype)
    # a step that overflowed, which a GradScaler skips, must not stay in the bank
    rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, before)
    bank.index_copy_(0, idx, rows[last])


# ---- attention transfer, hints, self-distillation --------------------------------------------------------------------


class AttentionTransferLoss(nn.Module):
    """Attention transfer ("Paying More Attention to Attention", ICLR 2017): see functional.attention_transfer_loss.

    Args:
        p: power of the activations, > 0. RepDistiller weighs the loss for p=2 by 1000.
    """

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        if not checks.number("AttentionTransferLoss: p", p) > 0:
            raise ValueError(f"AttentionTransferLoss: p must be positive, got {p}")
        self.p = p

    def forward(self, student_maps: Tensor | Sequence[Tensor], teacher_maps: Tensor | Sequence[Tensor]) -> Tensor:
        """The loss of feature maps [B, C, H, W], one a stage, of student and teacher; 0-dim.

        Raises:
            ValueError, TypeError: as functional.attention_transfer_loss; or the teacher requires grad and the student does not.
        """
        students = [student_maps] if isinstance(student_maps, Tensor) else student_maps
        teachers = [teacher_maps] if isinstance(teacher_maps, Tensor) else teacher_maps
        for student, teacher in zip(students, teachers):
            _check_not_swapped(student, teacher)
        return functional.attention_transfer_loss(students, teachers, p=self.p)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"p={self.p}"


class HintLoss(nn.Module):
    """FitNets' hint (ICLR 2015): the mean squared difference of a regressed student feature map and the teacher's.

    The regressor (convolution, batch norm, ReLU) is RepDistiller's and is trained with the student: hand its parameters to the
    optimizer. Half or twice the teacher's size asks for a convolution of stride 2, 3x3 or transposed 4x4; any other student
    size from the teacher's upwards for an unpadded convolution that shrinks it: 1x1 where the sizes are equal.

    Args:
        student_shape, teacher_shape: (C, H, W).
        regressor: False compares the maps as they are; shapes must be equal.

    Raises:
        ValueError: no such regressor fits the sizes, or regressor=False and the shapes differ.
    """

    def __init__(self, student_shape: tuple[int, int, int], teacher_shape: tuple[int, int, int], *, regressor: bool = True) -> None:
        super().__init__()
        if not all(isinstance(shape, Sequence) and len(shape) == 3 for shape in (student_shape, teacher_shape)):
            raise ValueError(f"HintLoss: shapes must be (C, H, W), got {student_shape} and {teacher_shape}")
        self.regressor: nn.Module
        if regressor:
            channels = teacher_shape[0]
            convolution = _resizing_convolution(tuple(student_shape), tuple(teacher_shape))
            self.regressor = nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        elif tuple(student_shape) != tuple(teacher_shape):
            raise ValueError(
                f"HintLoss: without a regressor teacher_shape must be student_shape {tuple(student_shape)}, got {tuple(teacher_shape)}"
            )
        else:
            self.regressor = nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of student and teacher features [B, C, H, W], of the shapes given; 0-dim.

        Raises:
            ValueError: shapes differ after the regressor, or the teacher requires grad and the student does not.
        """
        _check_not_swapped(student, teacher)
        return functional.hint_loss(self.regressor(student), teacher)


def _resizing_convolution(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> nn.Module:
    """A convolution from (C, H, W) to (C', H', W')."""
    (c, h, w), (channels, height, width) = student_shape, teacher_shape
    if (h, w) == (2 * height, 2 * width):
        return nn.Conv2d(c, channels, 3, stride=2, padding=1)
    if (2 * h, 2 * w) == (height, width):
        return nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1)
    if h >= height and w >= width:
        return nn.Conv2d(c, channels, (1 + h - height, 1 + w - width))
    raise ValueError(f"HintLoss: student maps must be half the teacher's size {height}x{width}, or at least as large, got {h}x{w}")


class TOFDLoss(nn.Module):
    """Task-oriented feature distillation (Zhang et al., NeurIPS 2020): the terms of J classifiers and of the maps between their features.

    With f the features [B, D] that a classifier reads and z its logits, W_j a trained linear map without bias, |.| the norm of the whole
    matrix (neither squared nor averaged: it grows with the batch, as the authors have it):

        feature      feature_weight * sum_j |W_j f_sj - f_tj|
        soft         sum_j soft_cross_entropy(z_sj, z_tj, T)
        orthogonal   orthogonal_weight * sum_j |W_j W_j' - I| + |W_j' W_j - I|

    Args:
        student_features, teacher_features: sizes D of the J features.
        feature_weight, orthogonal_weight: the authors' 0.05 and 0.03.

    Raises:
        ValueError: not equally many features.
    """

    def __init__(
        self,
        student_features: Sequence[int],
        teacher_features: Sequence[int],
        *,
        feature_weight: float = 0.05,
        orthogonal_weight: float = 0.03,
    ) -> None:
        super().__init__()
        if len(student_features) != len(teacher_features):
            raise ValueError(f"TOFDLoss: features must be equally many, got {len(student_features)} and {len(teacher_features)}")
        self.feature_weight = feature_weight
        self.orthogonal_weight = orthogonal_weight
        self.maps = nn.ModuleList(nn.Linear(own, theirs, bias=False) for own, theirs in zip(student_features, teacher_features))

    def forward(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        *,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """The three terms by name, 0-dim each; beside them the authors add the J cross-entropies with the labels.

        Raises:
            ValueError: as functional.soft_cross_entropy, not as many features or logits as maps, or a teacher's tensor requires grad and
                the student's does not.
        """
        if len(student_features) != len(self.maps):
            raise ValueError(f"TOFDLoss: student_features must be {len(self.maps)}, got {len(student_features)}")
        mapped = [W(f) for W, f in zip(self.maps, student_features)]
        return self.terms(mapped, teacher_features, student_logits, teacher_logits, temperature=temperature)

    def terms(
        self,
        mapped: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        *,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """The same, of features that `maps` have mapped already."""
        given = [len(x) for x in (mapped, teacher_features, student_logits, teacher_logits)]
        if given != [len(self.maps)] * 4:
            raise ValueError(f"TOFDLoss: there must be {len(self.maps)} features and logits of student and teacher, got {given}")
        for student, teacher in (*zip(mapped, teacher_features), *zip(student_logits, teacher_logits)):
            _check_not_swapped(student, teacher)
        gaps = [torch.linalg.vector_norm(at_least_float32(f) - at_least_float32(t)) for f, t in zip(mapped, teacher_features)]
        soft = [functional.soft_cross_entropy(s, t, temperature) for s, t in zip(student_logits, teacher_logits)]
        return {
            "feature": self.feature_weight * torch.stack(gaps).sum(),
            "soft": torch.stack(soft).sum(),
            "orthogonal": self.orthogonal_weight * self.skewness(),
        }

    def skewness(self) -> Tensor:
        """How far the maps are from orthogonal ones, without the weight: 0-dim."""
        weights = [W.weight for W in self.maps if isinstance(W, nn.Linear)]
        return torch.stack([_skewness(W) + _skewness(W.mT) for W in weights]).sum()

    def extra_repr(self) -> str:
        """What print(module) shows beside the maps."""
        return f"feature_weight={self.feature_weight}, orthogonal_weight={self.orthogonal_weight}"


def _skewness(W: Tensor) -> Tensor:
    """|W W' - I| (Frobenius), in float32 at least."""
    W = at_least_float32(W)
    with torch.autocast(W.device.type, enabled=False):
        return torch.linalg.matrix_norm(W @ W.mT - torch.eye(len(W), dtype=W.dtype, device=W.device))


class SelfDistillationLoss(nn.Module):
    """Self-distillation of an early feature map from a late one of the same network, beside cross-entropy.

    alpha * MSE(bilinear(student_intermediate -> teacher's size), conv1x1(teacher_intermediate)) + (1 - alpha) * CE

    The 1x1 convolution takes the teacher's channels to the student's. The tutorial that this follows leaves it at its random
    initialization: hand the module's parameters to the optimizer, or do not.

    Args:
        alpha: weight of the feature term, in [0, 1].
        student_channels, teacher_channels: of the two feature maps.
        detach_teacher: keeps the feature term's gradient out of the late layers (the tutorial lets it through).

    Raises:
        ValueError: alpha is outside [0, 1].
    """

    def __init__(
        self, alpha: float = 0.5, student_channels: int = 128, teacher_channels: int = 512, *, detach_teacher: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"SelfDistillationLoss: alpha must be in [0, 1], got {alpha}")
        self.alpha = alpha
        self.detach_teacher = detach_teacher
        self.projection = nn.Conv2d(teacher_channels, student_channels, kernel_size=1)

    def forward(self, student_logits: Tensor, labels: Tensor, student_intermediate: Tensor, teacher_intermediate: Tensor) -> Tensor:
        """The loss of logits [B, K], labels [B], early features [B, C_s, H, W] and late features [B, C_t, H', W']; 0-dim.

        Raises:
            ValueError: the feature maps' channels are not those given to the constructor.
        """
        features = self.feature_term(student_intermediate, teacher_intermediate)
        return self.alpha * features + (1 - self.alpha) * F.cross_entropy(at_least_float32(student_logits), labels)

    def feature_term(self, student_intermediate: Tensor, teacher_intermediate: Tensor) -> Tensor:
        """The first term without its weight, for loops that report the terms apart.

        Raises:
            ValueError: the feature maps' channels are not those given to the constructor.
        """
        for name, features, channels in (
            ("student_intermediate", student_intermediate, self.projection.out_channels),
            ("teacher_intermediate", teacher_intermediate, self.projection.in_channels),
        ):
            if features.ndim != 4 or features.shape[1] != channels:
                raise ValueError(f"SelfDistillationLoss: {name} must be [B, {channels}, H, W], got shape {tuple(features.shape)}")
        teacher = teacher_intermediate.detach() if self.detach_teacher else teacher_intermediate
        teacher = self.projection(teacher.to(self.projection.weight.dtype))
        student = student_intermediate.to(teacher.dtype)
        student = F.interpolate(student, size=teacher.shape[2:], mode="bilinear", align_corners=False)
        return functional.hint_loss(student, teacher)

    def extra_repr(self) -> str:
        """What print(module) shows beside the convolution."""
        return f"alpha={self.alpha}, detach_teacher={self.detach_teacher}"
