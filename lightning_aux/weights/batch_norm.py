"""Running statistics of BatchNorm, measured again for weights that were not trained with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_aux.engine.distributed import anywhere, processes
from lightning_aux.engine.replay import Unobserved

__all__ = ["as_in_training", "measured_norms", "recompute_batch_norm"]


def measured_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of ``module`` that have running statistics, by path."""
    return {
        name: each
        for name, each in module.named_modules()
        if isinstance(each, _BatchNorm) and each.track_running_stats
    }


def as_in_training(
    trainer: Any, module: Any, forward: Callable[[Any, Any], Any] | None
) -> Callable[[Any], None]:
    """A function that runs ``module`` on a batch of the training data as training did.

    Precision, hooks of the transfer of batches, and the user's own ``training_step``, of which
    nothing is logged and metrics are put back. In manual optimisation that would step the
    optimizers; the module is called on the batch, or its first entry, there.

    Args:
        trainer: with a strategy that knows the module.
        module: to be run.
        forward: ``(module, batch) -> output`` in place of ``training_step``, see `Taps`.
    """
    strategy, precision = trainer.strategy, trainer.precision_plugin
    unobserved = Unobserved(module, whole_steps=True)
    batch_idx = 0

    def call(batch: Any) -> Any:
        if forward is not None:
            return forward(module, batch)
        if not module.automatic_optimization:
            return module(batch[0] if isinstance(batch, list | tuple) else batch)
        step = module.training_step
        counted = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        return step(batch, batch_idx) if counted else step(batch)

    def run(batch: Any) -> None:
        nonlocal batch_idx
        batch = module._on_before_batch_transfer(precision.convert_input(batch), dataloader_idx=0)
        batch = strategy.batch_to_device(batch, dataloader_idx=0)
        with unobserved.undone(lambda: None, strategy.root_device), precision.train_step_context():
            call(batch)
        batch_idx += 1

    return run


class _Moments:
    """Count, sum and sum of squares of what a BatchNorm is given, by channel, in float64."""

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None
        self.count = 0
        self.sums = norm.running_mean.new_zeros((2, norm.num_features), dtype=torch.float64)

    def add(self, norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        values = arguments[0].detach().transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        self.sums[0] += values.sum(1)
        self.sums[1] += values.square().sum(1)

    def write(self, norm: _BatchNorm) -> None:
        if processes() > 1:
            count = self.sums.new_tensor([self.count])
            dist.all_reduce(count)
            dist.all_reduce(self.sums)
            self.count = int(count)
        if self.count == 0:  # not on the way of these batches
            return
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, square = self.sums / self.count
        # Of the population, as torch estimates it for a batch: n − 1 in the denominator.
        variance = (square - mean.square()).clamp(min=0) * self.count / max(1, self.count - 1)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def recompute_batch_norm(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None = None,
    progress: bool = True,
    total: int | None = None,
    norms: Iterable[nn.Module] | None = None,
) -> int:
    """Measure the mean and variance of every BatchNorm's input over ``batches``, exactly.

    All samples count alike, whatever the sizes of batches: the moments are pooled in float64, the
    variance between batches included (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm",
    arXiv:2105.07576, section 3.1; torch's ``update_bn`` takes the mean of the batches' variances).
    While measuring, BatchNorm normalises by the batch and everything else is in evaluation mode.

    Args:
        module: whose running statistics are overwritten. Training modes, momentum, gradients and
            random numbers are left as they are.
        batches: a dataloader of training data, on the module's device. With several processes each
            brings its part, and all end with the statistics of the whole.
        forward: runs the module on a batch. Default: ``module(batch)``, or of the first entry of a
            tuple or list.
        progress: show a progress bar where there is a terminal and rich is installed.
        total: how many batches to use. Default: all.
        norms: the BatchNorm layers to measure; others keep their statistics and normalise by
            them. Default: all, also those that are in evaluation mode now.

    Returns:
        How many BatchNorm layers were measured.

    Raises:
        ValueError: there are no batches.
        RuntimeError: another process could not run the module; the error is in its output.
    """
    chosen = None if norms is None else set(norms)
    layers = [each for each in measured_norms(module).values() if chosen is None or each in chosen]
    if not layers:
        return 0
    run = forward or (lambda batch: module(batch[0] if isinstance(batch, list | tuple) else batch))
    modes = [(each, each.training) for each in module.modules()]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in layers]
    moments = [_Moments(norm) for norm in layers]
    hooks = []
    seen = 0
    failure: Exception | None = None
    try:
        for each, _ in modes:
            each.training = False
        for norm, moment in zip(layers, moments, strict=True):
            norm.training, norm.momentum = True, 0.0
            norm.num_batches_tracked = None
            hooks.append(norm.register_forward_pre_hook(moment.add))
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        # Into what is compiled already no hook would get.
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), torch.random.fork_rng(devices=devices), eager:
            for batch in _shown(batches, progress, total):
                run(batch)
                seen += 1
                if seen == total:
                    break
    except Exception as error:
        failure = error
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum, tracked in kept:
            norm.momentum, norm.num_batches_tracked = momentum, tracked
        for each, training in modes:
            each.training = training
    _agree(failure, moments[0].sums.device)
    if seen == 0:
        raise ValueError("no batches to measure the statistics of")
    for norm, moment in zip(layers, moments, strict=True):
        moment.write(norm)
    return len(layers)


def _agree(failure: Exception | None, device: torch.device) -> None:
    """Raise ``failure``, and on the other processes that there is one: they wait for this one."""
    if anywhere(failure is not None, device):
        raise failure or RuntimeError("another process could not run the module; see its output")


def _shown(batches: Iterable[Any], progress: bool, total: int | None) -> Iterable[Any]:
    if not progress:
        return batches
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return batches
    console = Console(stderr=True)
    if not console.is_terminal:
        return batches
    return track(batches, "BatchNorm statistics", total=total, console=console)
