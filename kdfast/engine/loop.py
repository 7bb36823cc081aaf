"""The loop that fits one stage: epochs of steps, a validation after each epoch, and a checkpoint to resume from.

No step waits for the device: loss terms and accuracies are summed on the device and read once an epoch (non-finite terms every
`CHECK_EVERY` steps). A checkpoint holds everything that decides the following steps, so a resumed epoch gives the same bits on a CPU.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdfast.data import Batch
from kdfast.engine import random_state
from kdfast.engine.distributed import World
from kdfast.engine.interrupt import StopRequest
from kdfast.engine.metrics import AccuracyMeter, NonFiniteLoss, TermMeter
from kdfast.engine.ranges import Checked, NotNegative
from kdfast.engine.schedule import Schedule, make_optimizer
from kdfast.engine.stage import Mean, Outputs, Stage, as_means

CHECK_EVERY = 50  # steps between reads of the device: non-finite losses, stop requests of other processes


@dataclass(frozen=True)
class Options(Checked):
    """How fast the loop runs. The computed values stay the same up to rounding.

    Attributes:
        precision: autocast dtype of forward passes and losses.
        compile: torch.compile the forward pass of each stage.
        checkpoint_minutes: longest time between two checkpoints within an epoch.

    Example:
        >>> from kdfast.engine import Options
        >>> Options(precision="bf16")
        Options(precision='bf16', compile=False, checkpoint_minutes=15.0)
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    checkpoint_minutes: NotNegative = 15.0


class _Forward(nn.Module):
    """stage.forward as a module that owns the trained parameters, as DDP and torch.compile expect."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.trained = nn.ModuleList(stage.train)
        self._forward = stage.forward

    def forward(self, batch: Batch) -> Outputs:
        return self._forward(batch)


class StageLoop:
    """Fits one stage.

    Args:
        stage: what to fit.
        world: this process among all.
        options: precision, compilation, how often to save.
        stop: asked between steps.
        on_step: called with the number of images of every step.
    """

    def __init__(self, stage: Stage, world: World, options: Options, stop: StopRequest, on_step: Callable[[int], None] = lambda n: None):
        self.stage, self._world, self._options, self._stop, self._on_step = stage, world, options, stop, on_step
        training = stage.training
        for module in (*stage.frozen, *stage.memory, *stage.train):
            module.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        stage.set_modes(training=True)
        forward: nn.Module = _Forward(stage)
        if world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            # All processes get the main process's buffers at the start and at the end of every epoch. In between each has its own
            # BatchNorm statistics, which training does not read.
            forward = DistributedDataParallel(forward, device_ids=ids, find_unused_parameters=stage.partial, broadcast_buffers=False)
            world.broadcast(buffer for module in (forward, *stage.memory) for buffer in module.buffers())
        self._ddp = forward if isinstance(forward, DistributedDataParallel) else None
        self._eager: Callable[[Batch], Outputs] = forward
        self._forward: Callable[[Batch], Outputs] = torch.compile(forward) if options.compile else forward
        self._optimizer = (stage.optimizer or make_optimizer)(list(stage.parameters()), training)
        self._schedule = Schedule(self._optimizer, stage)
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16")
        self.trained = nn.ModuleList(stage.train)
        self._ema: AveragedModel | None = None
        if training.ema is not None:
            self._ema = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(training.ema), use_buffers=True)
        self._stateful: dict[str, Any] = {
            "weights": self.trained,
            "memory": nn.ModuleList(stage.memory),
            "optimizer": self._optimizer,
            "schedule": self._schedule,
            "scaler": self._scaler,
            "loader": stage.data.train,
        } | ({} if self._ema is None else {"ema": self._ema})
        self.epoch = 0  # the current epoch, from 0
        self.best_metric: float | None = None
        self.best_epoch = -1
        self._start_meters()
        stage.data.train.set_epoch(0)

    def _start_meters(self) -> None:
        self._meter, self._accuracy = TermMeter(self._world.device), AccuracyMeter(self._world.device)
        self._epoch_seconds = 0.0

    # ---- epochs ----

    def epochs(self, save: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Runs the remaining epochs; yields the metrics of each, with "best": True if it is the best so far.

        `save` is called within long epochs and before a stop request ends the loop; the caller saves between epochs.
        """
        training = self.stage.training
        if not self._done():
            start = time.perf_counter()
            with torch.no_grad(), self._autocast():
                self.stage.prepare()
            self._epoch_seconds += time.perf_counter() - start
        while not self._done():
            lr = self._optimizer.param_groups[0]["lr"]
            if not self._train_epoch(save):
                return
            images, seconds = self._meter.rows * self._world.size, self._epoch_seconds
            line: dict[str, Any] = {"stage": self.stage.name, "epoch": self.epoch + 1, "epochs": training.epochs, "lr": float(lr)}
            line |= self._meter.averages("train", self._world) | self._accuracy.accuracy("train", self._world)
            self._world.broadcast(buffer for module in (self.trained, self._ema) if module is not None for buffer in module.buffers())
            with self.averaged_weights():
                line |= self.validate()
            metric = self._metric(line)
            if self._better(metric):
                self.best_metric, self.best_epoch = metric, self.epoch
            self._schedule.step(metric)
            self._start_meters()
            self.epoch += 1
            if self.epoch < training.epochs:
                self.stage.data.train.set_epoch(self.epoch)
            yield line | {
                "best": self.best_epoch == self.epoch - 1,
                "seconds": round(seconds, 4),
                "images_per_s": round(images / max(seconds, 1e-9), 1),
            }

    def _better(self, metric: float) -> bool:
        if self.best_metric is None or math.isnan(metric):
            return not math.isnan(metric)
        return metric > self.best_metric if self.stage.higher_is_better else metric < self.best_metric

    def _done(self) -> bool:
        patience = self.stage.training.early_stop
        stalled = patience is not None and self.best_epoch >= 0 and self.epoch - 1 - self.best_epoch >= patience
        return stalled or self.epoch >= self.stage.training.epochs

    def _metric(self, line: dict[str, Any]) -> float:
        if self.stage.best not in line:
            known = ", ".join(name for name in line if "/" in name)
            raise ValueError(f"stage {self.stage.name}: best is {self.stage.best!r}, but the metrics are {known or 'none'}")
        return line[self.stage.best]

    def _train_epoch(self, save: Callable[[], None]) -> bool:
        """Trains the rest of the current epoch. Returns False if a stop request ended it early, after saving."""
        self.stage.set_modes(training=True)
        loader = self.stage.data.train
        start, saved = time.perf_counter(), time.monotonic()
        before = self._epoch_seconds  # of this epoch, before an interruption
        batch = None
        for batch in loader:
            self._meter.add(self._step(batch), len(batch.labels), step := loader.state_dict()["batch"])
            self._on_step(len(batch.labels) * self._world.size)
            look = step % CHECK_EVERY == 0
            if look:
                self._check(batch)
            # several processes must agree on stopping, which takes a collective operation: only when the device is read anyway
            stop = bool(self._stop) if self._world.size == 1 else look and self._world.any(bool(self._stop))
            due = self._world.main and time.monotonic() - saved > 60 * self._options.checkpoint_minutes
            due = due if self._world.size == 1 else look and self._world.any(due)
            if (stop or due) and step < len(loader):
                self._check(batch)
                self._epoch_seconds = before + time.perf_counter() - start
                save()
                saved = time.monotonic()
                if stop:
                    return False
        self._check(batch)  # waits for the device, so the seconds below are the whole work
        self._epoch_seconds = before + time.perf_counter() - start
        return True

    def _check(self, batch: Batch | None) -> None:
        """Raises NonFiniteLoss if a loss term was not finite, or ValueError if that comes from a network that is not trained."""
        try:
            self._meter.check(self.stage.name, self.epoch)
        except NonFiniteLoss as error:
            with self._autocast():
                outputs = {} if batch is None else self.stage.forward(self._parts(batch)[0])
            given = {name: value for name, value in outputs.items() if value.is_floating_point() and not value.requires_grad}
            if bad := [name for name, value in given.items() if not value.isfinite().all()]:
                what = f"the outputs of a frozen network ({', '.join(bad)}) are not finite"
                raise ValueError(f"{error}: {what}, whatever the learning rate: its weights or its normalization are wrong") from None
            raise

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Returns loss terms and accuracies on the validation split, with the current weights."""
        self.stage.set_modes(training=False)
        # all processes take part in the sums, so one without validation images needs the terms' names from training
        terms, accuracy = TermMeter(self._world.device, self._meter.names), AccuracyMeter(self._world.device, self._accuracy.counts)
        for batch in self.stage.data.val:
            with self._autocast():
                outputs = _concatenate([self.stage.forward(part) for part in self._parts(batch)])
                terms.add(self.stage.loss(outputs, batch), len(batch.labels), 0)
            accuracy.add(outputs, batch.labels)
        return terms.averages("val", self._world) | accuracy.accuracy("val", self._world)

    # ---- one step ----

    def _autocast(self) -> AbstractContextManager:
        dtype = torch.float16 if self._options.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._world.device.type, dtype, enabled=self._options.precision != "fp32")

    def _step(self, batch: Batch) -> dict[str, Mean]:
        parts = self._parts(batch)
        if len(parts) == 1:
            terms = self._terms(batch)
            self._scaler.scale(_total(terms)).backward()
        elif self.stage.couples_rows:
            terms = self._backward_in_two_passes(batch, parts)
        else:
            terms = self._accumulate(batch, parts)
        if self.stage.training.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.stage.parameters(), self.stage.training.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update_parameters(self.trained)
        return terms

    def _parts(self, batch: Batch) -> list[Batch]:
        """Splits the batch into forward passes of at most micro_batch images."""
        sizes = self.stage.training.split_batch(len(batch.labels), self._world.size)
        return [batch] if len(sizes) == 1 else [Batch(*part) for part in zip(*(tensor.split(sizes) for tensor in batch))]

    def _terms(self, batch: Batch) -> dict[str, Mean]:
        with self._autocast():
            return self._loss(self._forward(batch), batch)

    def _loss(self, outputs: Outputs, batch: Batch) -> dict[str, Mean]:
        self._accuracy.add(outputs, batch.labels)
        return as_means(self.stage.loss(outputs, batch), len(batch.labels))

    def _unsynchronized(self, last: bool) -> AbstractContextManager:
        return self._ddp.no_sync() if self._ddp is not None and not last else nullcontext()

    def _accumulate(self, batch: Batch, parts: list[Batch]) -> dict[str, Mean]:
        """Accumulates the gradients of the parts, each weighted by its share of the rows: exact for means over independent rows."""
        summed: dict[str, Mean] = {}
        for k, part in enumerate(parts):
            share = len(part.labels) / len(batch.labels)
            with self._unsynchronized(k == len(parts) - 1):
                terms = {name: term * share for name, term in self._terms(part).items()}
                self._scaler.scale(_total(terms)).backward()
            for name, term in terms.items():
                before = summed.get(name, Mean(torch.zeros_like(term.value), 0))
                summed[name] = Mean(before.value + term.value.detach(), before.rows + term.rows)
        return summed

    def _backward_in_two_passes(self, batch: Batch, parts: list[Batch]) -> dict[str, Mean]:
        """Computes the loss of the whole batch with the memory of one part (gradient caching, Gao et al. 2021, arXiv:2101.06983).

        The first pass computes all outputs without a graph; then come the loss and its gradient with respect to the outputs; the second
        pass repeats every part with a graph and backpropagates its rows of that gradient. Exact, except that BatchNorm sees the parts.
        The second pass is not compiled: compiled code draws other dropout masks, and both passes must draw the same.
        """
        buffers = [buffer.clone() for buffer in self.trained.buffers()]
        states, outputs, needs = [], [], set()
        for k, part in enumerate(parts):
            states.append(random_state.state_dict())
            with self._autocast(), torch.set_grad_enabled(k == 0):  # the first part shows which outputs carry a gradient
                output = self.stage.forward(part)
            if k == 0:
                needs = {name for name, value in output.items() if value.requires_grad}
            outputs.append({name: value.detach() for name, value in output.items()})
        for buffer, before in zip(self.trained.buffers(), buffers):
            buffer.copy_(before)  # BatchNorm's statistics are updated once, in the second pass; the loss's own updates stay
        whole = {name: value.requires_grad_(name in needs) for name, value in _concatenate(outputs).items()}
        with self._autocast():
            terms = self._loss(whole, batch)
        self._scaler.scale(_total(terms)).backward()
        after, row = random_state.state_dict(), 0
        for k, (part, state) in enumerate(zip(parts, states)):
            random_state.load_state_dict(state)  # the same dropout masks as in the first pass
            rows = slice(row, row + len(part.labels))
            with self._unsynchronized(k == len(parts) - 1):
                with self._autocast():
                    output = self._eager(part)
                pairs = [(output[name], gradient[rows]) for name in sorted(needs) if (gradient := whole[name].grad) is not None]
                torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
            row = rows.stop
        random_state.load_state_dict(after)
        return terms

    # ---- weights and state ----

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the trained modules hold the moving average, if there is one."""
        exchanged = [] if self._ema is None else list(zip(_tensors(self.trained), _tensors(self._ema.module)))
        _exchange(exchanged)
        try:
            yield
        finally:
            _exchange(exchanged)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that decides the following steps; collective over processes."""
        own = {"random": random_state.state_dict(), "meter": self._meter.state_dict(), "accuracy": self._accuracy.counts}
        return {
            "stage": self.stage.name,
            "epoch": self.epoch,
            "best": [self.best_metric, self.best_epoch],
            "seconds": self._epoch_seconds,
            "own": self._world.gather(own),
        } | {name: part.state_dict() for name, part in self._stateful.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.epoch = state["epoch"]
        self.best_metric, self.best_epoch = state["best"]
        self._epoch_seconds = state["seconds"]
        for name, part in self._stateful.items():
            part.load_state_dict(state[name])
        if len(state["own"]) == self._world.size:  # with another number of processes each sees other images from here on
            own = state["own"][self._world.rank]
            self._meter.load_state_dict(own["meter"])
            self._accuracy.counts = {name: counts.to(self._world.device) for name, counts in own["accuracy"].items()}
            random_state.load_state_dict(own["random"])


def _total(terms: dict[str, Mean]) -> Tensor:
    return torch.stack([term.value.float() for term in terms.values()]).sum()


def _concatenate(outputs: Sequence[Outputs]) -> Outputs:
    """Joins the outputs of the parts of a batch."""
    return outputs[0] if len(outputs) == 1 else {name: torch.cat([part[name] for part in outputs]) for name in outputs[0]}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for x, y in pairs:
        x.data, y.data = y.data, x.data
