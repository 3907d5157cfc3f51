"""Adam with warm-up, clipping and the moving average of weights, as both trainings use them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.training.config import TrainConfig

LearningRate = Callable[[int], float]


def adam(module: nn.Module, config: TrainConfig) -> tuple[torch.optim.Adam, LearningRate]:
    """Adam and its learning rate as a function of the step."""
    options = config.optimizer

    def learning_rate(step: int) -> float:
        warm = min((step + 1) / max(options.warmup_steps, 1), 1.0)
        left = (config.steps - step) / options.decay_steps if options.decay_steps else 1.0
        return options.learning_rate * warm * min(left, 1.0)

    betas = (options.beta1, options.beta2)
    return torch.optim.Adam(module.parameters(), options.learning_rate, betas), learning_rate


def clip_and_step(
    loss: Tensor,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    learning_rate: LearningRate,
    config: TrainConfig,
    step: int,
) -> float:
    """Backpropagate, clip, step; returns the gradient norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.gradient_clip)
    optimizer.step()
    return float(norm)


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """`ema += (1 - decay) (weights - ema)`; the decay grows from 0.1 so that early weights fade."""
    decay = min(decay, (1 + step) / (10 + step))
    for average, weight in zip(ema.parameters(), module.parameters(), strict=True):
        average.lerp_(weight, 1 - decay)
