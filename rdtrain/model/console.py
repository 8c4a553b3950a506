"""A conversation with a model at the terminal: `python FOLDER --interactive`.

What is typed stands behind what stands already, and the model goes on from there. The cache lives on from turn to turn; a change of
settings needs a new one, and so one pass over the text so far.
"""

import sys
from contextlib import suppress
from dataclasses import fields, replace

from .exceptions import out_of_memory
from .generation import TextGenerator
from .sampling import Sampling

HELP = """\
Type text, and the model continues it; Ctrl-C stops it. Commands:
  :k 8                iterations a token from now on
  :temperature 0.8    and so every setting of sampling (:settings shows them all)
  :tokens 50          tokens that the model writes at most
  :seed 3             of noise and sampling
  :undo               forget the last turn
  :reset              forget everything
  :text               show the text so far
  :quit               leave (or Ctrl-D)
"""


class Console:
    """The text so far, the settings, and a decoder that follows them."""

    def __init__(self, generator: TextGenerator, iterations: int, sampling: Sampling, seed: int, max_new_tokens: int, context: int):
        """context: positions that the cache holds, from 1 on. ValueError for fewer."""
        if context < 1:
            raise ValueError(f"--context must be at least 1, and it is {context}")
        self.generator, self.iterations, self.sampling = generator, iterations, sampling
        self.seed, self.max_new_tokens, self.context = seed, max_new_tokens, context
        self.ids = [generator.tokenizer.bos_id]
        self._turns: list[int] = []  # how long the text was before each
        self._decoder = None

    def run(self) -> None:
        """Read lines from standard input until it ends; what goes wrong is said in one sentence, and the next line read."""
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 become what the tokenizer refuses in a sentence
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  # lines can be edited
            print(HELP)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
                if line.strip() in (":quit", ":q"):
                    return
                self.command(line.strip()) if line.lstrip().startswith(":") else self.turn(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
            except ValueError as error:
                print(error, file=sys.stderr, flush=True)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._decoder = None
                print("there is not enough memory for the key-value cache: choose a smaller :k or fewer :caches", file=sys.stderr,
                      flush=True)

    def turn(self, text: str) -> None:
        """Put text behind what stands, and stream what the model writes after it. ValueError leaves everything as it was."""
        new = self.generator.tokenizer.encode(text)
        before = len(self.ids)
        if self._decoder is None:
            self._decoder = self.generator.decoder(1, self.context, self.iterations, self.sampling)
        # The last token is read anew: what is held of it may know another token behind it, of a turn undone or the end of the text.
        start = min(self._decoder.length, before - 1)
        self._decoder.truncate(start)
        handed = (self.ids + new)[start:]
        pieces = self.generator.write(self._decoder, handed, self.seed, self.max_new_tokens)
        first = next(pieces, None)  # whatever is refused is refused here
        self._turns.append(before)
        self.ids += new
        try:
            while first is not None:
                self.ids.append(first[0])
                print(first[1], end="", flush=True)
                first = next(pieces, None)
        finally:
            print(flush=True)
        if len(self.ids) - before - len(new) < self.max_new_tokens:
            print("[the model ended the text here]", file=sys.stderr, flush=True)

    def command(self, line: str) -> None:
        """One line that starts with a colon. ValueError when there is no such command, or for a value that cannot be."""
        name, _, value = line[1:].partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        kinds = {field.name: field.type for field in fields(Sampling)}
        if name == "reset":
            self._cut(1)
            self._turns.clear()
        elif name == "undo":
            if not self._turns:
                raise ValueError("there is no turn to undo: type some text first")
            self._cut(self._turns.pop())
        elif name == "text":
            print(self.generator.tokenizer.decode(self.ids))
        elif name == "settings":
            size = "empty" if self._decoder is None else f"{self._decoder.length} of {self.context} positions"
            size += "" if self._decoder is None else f", {self._decoder.cache.bytes / 2**20:.1f} MiB"
            settings = {"k": self.iterations, "seed": self.seed, "tokens": self.max_new_tokens, **vars(self.sampling)}
            print(", ".join(f"{name} {value}" for name, value in settings.items()) + f"; cache: {size}")
        elif name in ("seed", "tokens", "k"):
            number = _number(int, name, value)
            if name != "seed" and number < 1:
                raise ValueError(f":{name} must be at least 1, and it is {number}")
            attribute = {"seed": "seed", "tokens": "max_new_tokens", "k": "iterations"}[name]
            setattr(self, attribute, number)
            self._decoder = None if name == "k" else self._decoder
        elif name in kinds:
            kind = str if kinds[name] is str else int if kinds[name] is int else float
            # A new exit has a threshold of its own, until one is set.
            changed = {name: value if kind is str else _number(kind, name, value)} | ({"exit_threshold": None} if name == "exit" else {})
            sampling = replace(self.sampling, **changed)
            self.generator.decoder(1, 1, self.iterations, sampling)  # refuses what the model cannot do
            self.sampling, self._decoder = sampling, None
        else:
            print(HELP, end="")
            if name not in ("help", "h"):
                raise ValueError(f"there is no command :{name}: choose one of these")

    def _cut(self, length: int) -> None:
        self.ids = self.ids[:length]
        if self._decoder is not None:
            self._decoder.truncate(min(self._decoder.length, length))


def _number(kind: type, name: str, value: str) -> float:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f":{name} needs {'a whole number' if kind is int else 'a number'}, and was given {value or 'nothing'}") from None
