"""The trackers that `log.trackers` may name: those of accelerate's tracking layer."""

TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet": "comet_ml",
    "swanlab": "swanlab",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
}
"""Package by name; it is also accelerate's name of the tracker."""
