"""Contrastive representation distillation."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast import functional
from kdfast.losses.checks import check_not_swapped
from kdfast.ops import checks, gather, nce
from kdfast.ops.precision import at_least_float32

__all__ = ["CRDLoss"]


class CRDLoss(nn.Module):
    """Contrastive representation distillation (Tian, Krishnan and Isola, ICLR 2020), with RepDistiller's values.

    Both networks' penultimate features are embedded (linear, then unit length). Every image has a row in two memory banks; the
    student is compared with the teacher's bank and the teacher with the student's, see functional.crd_loss. After scoring, the rows of
    the batch's images become normalize(nce_m bank + (1 - nce_m) v). An image that is twice in a batch takes its last embedding; an
    embedding that is not finite changes nothing. Z, one constant a direction, is set by the first batch in training and then fixed.

    Negatives are drawn on the device, with replacement, from torch's generator: uniformly over the images of other classes, or without
    `labels` over all other images. The embeddings are trained with the student: give their parameters to the optimizer. In eval mode
    neither banks nor constants change. Banks and constants are in the state_dict, so that a checkpoint resumes with the same numbers.

    If torch.distributed is initialized with several ranks, all of them call the module together in training, with equally large
    batches: the rows of all ranks go into the banks, and the first Z is the mean over ranks. Banks that start equal (by one seed or
    DistributedDataParallel) stay equal, and are those of one process on the joined batch.

    Args:
        s_dim, t_dim: features of student and teacher.
        n_data: images in the training set.
        labels: [n_data], the class of every image, integers (-100 is a class like others); at least two classes.
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

    Example:
        >>> import torch
        >>> from kdfast.losses import CRDLoss
        >>> criterion = CRDLoss(s_dim=64, t_dim=256, n_data=1000, nce_k=100)
        >>> student = torch.rand(8, 64, requires_grad=True)
        >>> loss = criterion(student, torch.rand(8, 256), torch.arange(8))
        >>> loss.backward()
        >>> print(loss.shape, criterion.memory_v1.shape)
        torch.Size([]) torch.Size([1000, 128])
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
        checks.are_counts(s_dim=s_dim, t_dim=t_dim, feat_dim=feat_dim)
        checks.are_counts(None, n_data=n_data, nce_k=nce_k)
        if n_data < 2:
            raise ValueError(f"CRDLoss: n_data must be at least 2, or an image has no negatives, got {n_data}")
        if nce_k < 1:
            raise ValueError(f"CRDLoss: nce_k must be positive, got {nce_k}")
        checks.positive_number("CRDLoss: nce_t", nce_t)
        checks.number_within("CRDLoss: nce_m", nce_m, 0, 1)
        self.n_data, self.nce_k, self.nce_t, self.nce_m = n_data, nce_k, nce_t, nce_m
        self.embed_s = _Embedding(s_dim, feat_dim)
        self.embed_t = _Embedding(t_dim, feat_dim)
        bound = 1 / math.sqrt(feat_dim / 3)
        for name in ("memory_v1", "memory_v2"):
            self.register_buffer(name, torch.empty(n_data, feat_dim).uniform_(-bound, bound))
        for name in ("Z_v1", "Z_v2"):
            self.register_buffer(name, torch.tensor(nce.UNSETTLED, dtype=at_least_float32(self.memory_v1).dtype))
        # images sorted by class, and for every image the start and the size of its class there
        tables = (None, None, None) if labels is None else self._sort_by_class(labels)
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

    def _sort_by_class(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        checks.is_tensor("CRDLoss: labels", labels)
        if labels.shape != (self.n_data,) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"CRDLoss: labels must be [{self.n_data}] integers, got shape {tuple(labels.shape)}, {labels.dtype}")
        _, class_of, sizes = labels.to(self.memory_v1.device).unique(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise ValueError("CRDLoss: labels must name at least two classes, or an image has no negatives")
        starts = sizes.cumsum(0) - sizes
        return class_of.argsort(stable=True), starts[class_of], sizes[class_of]

    def forward(self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None) -> Tensor:
        """Returns the loss, 0-dim, of student features [B, s_dim ...], teacher features [B, t_dim ...] and the images' numbers idx [B].

        contrast_idx, int64 [B, 1 + K], replaces drawn negatives: first the positive, which is idx, then negatives.

        Raises:
            ValueError: shapes do not fit, an index is out of range (on a GPU the loss is NaN), or the teacher requires grad and the
                student does not.
            TypeError: indices are not int64.
        """
        check_not_swapped(f_s, f_t)
        for name, features, embed in (("f_s", f_s, self.embed_s), ("f_t", f_t, self.embed_t)):
            wanted = embed.linear.in_features
            if features.ndim < 2 or math.prod(features.shape[1:]) != wanted or len(features) != len(f_s):
                raise ValueError(f"CRDLoss: {name} must be [{len(f_s)}, {wanted}], got shape {tuple(features.shape)}")
        return self.of_embeddings(self.embed_s(f_s), self.embed_t(f_t), idx, contrast_idx)

    def of_embeddings(self, v_s: Tensor, v_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None) -> Tensor:
        """Returns the loss of embeddings, for training loops that call embed_s and embed_t in their own forward pass.

        Args:
            v_s: [B, feat_dim], embeddings of the student.
            v_t: [B, feat_dim], embeddings of the teacher.
            idx: [B] int64, the images' numbers.
            contrast_idx: [B, 1 + K] int64, as in `forward`.

        Raises:
            ValueError, TypeError: as `forward`.
        """
        self._check_indices(idx, len(v_s))
        if contrast_idx is None:
            contrast_idx = torch.cat([idx[:, None], self._draw_negatives(idx)], 1)
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
                for constant, Z in ((self.Z_v1, Z_s), (self.Z_v2, Z_t)):  # a batch that is empty or overflowed settles none
                    constant.copy_(torch.where(nce.is_settled(Z), Z, constant))
                _update(self.memory_v1, idx, new_s, self.nce_m)
                _update(self.memory_v2, idx, new_t, self.nce_m)
        return loss

    def _check_indices(self, idx: Tensor, B: int) -> None:
        checks.is_tensor("CRDLoss: idx", idx)
        if idx.dtype != torch.int64:
            raise TypeError(f"CRDLoss: idx must be int64, got {idx.dtype}")
        if idx.shape != (B,):
            raise ValueError(f"CRDLoss: idx must be [{B}], got shape {tuple(idx.shape)}")
        if not torch.compiler.is_compiling():
            checks.is_in_range("CRDLoss: idx", idx, self.n_data)

    def _draw_negatives(self, idx: Tensor) -> Tensor:
        """Draws [B, nce_k] images other than idx, of other classes if there are labels."""
        # a remainder of 62 bits: no image is likelier than another by more than n_data / 2^62
        draws = torch.randint(2**62, (len(idx), self.nce_k), device=idx.device)
        if self.by_class is None:
            other = draws.remainder_(self.n_data - 1)
            return other.add_(other >= idx[:, None])
        idx = idx.clamp(0, self.n_data - 1)  # the loss refuses an index out of range
        start, size = self.class_start[idx, None], self.class_size[idx, None]
        other = draws.remainder_(self.n_data - size)
        return self.by_class[other.add_(size * (other >= start))]  # skips the image's own class, which is one block

    def extra_repr(self) -> str:
        """Describes the options for print(module)."""
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
    """Moves rows idx [B] of the bank towards v [B, D]; the last of equal idx counts, in whatever order a device writes."""
    idx = idx.clamp(0, len(bank) - 1)  # an index out of range has made the loss NaN, and must not be written out of bounds
    ordered, order = idx.sort(stable=True)
    last = order[torch.searchsorted(ordered, idx, right=True) - 1]
    before = bank[idx]
    rows = F.normalize(momentum * before.to(v.dtype) + (1 - momentum) * v, dim=1).to(bank.dtype)
    # an overflow, for which a GradScaler skips the step, must not stay in the bank
    rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, before)
    bank.index_copy_(0, idx, rows[last])
