"""Validation loss on held-out training records, by which methods decide."""

import torch

from adapters.methods.base import Validate
from trainer.session import Session
from trainer.training.evaluation import mean_loss


def make_validate(session: Session) -> Validate:
    """The method's `validate(gradients)`: loss, with True also its gradient, on the first
    `validation_samples` held-out records. Dropout is off: the loss depends on the adapters only."""
    count = session.config.method.validation_samples
    records = session.train_data.first_records(session.left_out, count)

    def validate(gradients: bool) -> float:
        with torch.set_grad_enabled(gradients):
            return mean_loss(session, session.train_data, records, gradients=gradients)

    return validate
