"""Records taken out of the training data, and the loss on them that methods decide by."""

import torch

from adapters.methods.base import Validate
from trainer.session import Session
from trainer.training.evaluation import mean_loss


def make_validate(session: Session) -> Validate:
    """The callable that a method gets: loss (with True also its gradient) on the first of the
    records left out. Dropout is off, so the figure belongs to the adapters alone."""
    count = session.config.method.validation_samples
    records = session.left_out[:count]

    def validate(gradients: bool) -> float:
        with torch.set_grad_enabled(gradients):
            return mean_loss(session, session.train_data, records, gradients=gradients)

    return validate
