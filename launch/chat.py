"""Talk to a run's model by its chat template.

    rankcast chat runs/NAME [--system TEXT] [generation.temperature=0.7 ...]

The source may also be a checkpoint or an adapter's folder. Every message continues the
conversation; /new begins another one, /quit (or the end of the input) ends. An answer is printed
while it is made.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.arguments import Parser
from trainer.distributed.failures import guarded
from trainer.errors import BadRecord, UserError

if TYPE_CHECKING:
    from trainer.distributed.world import World
    from trainer.session import LoadedModel


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(__doc__, prog)
    parser.add_argument("source", type=Path, help="run, checkpoint or adapter folder")
    parser.add_argument("--system", help="system message; data.system unless given")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    from trainer.run.launch import configure_libraries, join
    from trainer.run.saved_model import open_saved_model, saved_model_config

    configure_libraries()
    config = saved_model_config(arguments.source, arguments.overrides)
    with join(config) as world:
        model = open_saved_model(arguments.source, config, world)
        system = arguments.system or config.data.system
        talk(model, system, lambda: next_message(world))
    return 0


def talk(model: "LoadedModel", system: str | None, read: Callable[[], str | None]) -> None:
    """Until `read`, which gives the next message on every rank, gives None. Collective."""
    from transformers import TextStreamer

    from trainer.generation.generate import generate
    from trainer.generation.prompts import of_messages

    options, world = model.config.data, model.world
    begin = [{"role": "system", "content": system}] if system else []
    said: list[dict[str, Any]] = list(begin)
    turn = 0
    while (text := read()) is not None and text != "/quit":
        if text == "/new":
            said = list(begin)
        elif text:
            said.append({"role": "user", "content": text})
            with world.all_or_none():
                try:
                    prompt = of_messages(said, options, model.tokenizer)
                except BadRecord as error:
                    raise UserError(f"rankcast chat: {error}") from error
            streamer = None
            if world.is_main:
                streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
            turn += 1
            (answer,) = generate(
                model, [prompt.ids], model.config.generation, seed=turn, streamer=streamer
            )
            said.append({"role": "assistant", "content": answer.text})


def next_message(world: "World") -> str | None:
    """What rank 0's user says next, on every rank; a user may think longer than `engine.timeout`.
    None at the end. Collective."""
    text = None
    with world.all_or_none(world.patience()):
        if world.is_main:
            text = _read()
    return world.broadcast(text)


def _read() -> str | None:
    """The next line of the input; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


if __name__ == "__main__":
    with guarded():
        code = main()
    sys.exit(code)
