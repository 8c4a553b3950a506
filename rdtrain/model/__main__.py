"""Generate text with an exported model: `python FOLDER --prompt "Once"`. Needs torch, safetensors and the tokenizer's library only."""

import argparse
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

if not __package__:
    # Python started the folder as a program; its files import each other as a package, so make it one.
    import importlib.util

    sys.path.remove(str(FOLDER)) if str(FOLDER) in sys.path else None
    spec = importlib.util.spec_from_file_location("exported_model", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    sys.modules["exported_model"] = importlib.util.module_from_spec(spec)
    __package__, __spec__ = "exported_model", None


def main() -> None:
    """Parse the command line, generate, and stream the text to standard output."""
    parser = argparse.ArgumentParser(
        prog=f"python {FOLDER.name}", description="Generate text with this model by K-iteration inference.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--prompt", action="append", help="text to continue; give it several times for several texts (default: none)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="tokens to generate at most")
    parser.add_argument("--iterations", type=int, help="K, iterations of the core per token (default: as trained)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of what tokens are drawn from; 0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens that make up this probability")
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="keep the tokens at least this many times as likely as the likeliest; 0 keeps all"
    )
    parser.add_argument(
        "--solver", default="euler", help="how a denoising model goes from one iteration to the next: euler, along the expected "
        "embedding; multistep, the same to second order, for few iterations; ancestral, by a token drawn at each iteration"
    )
    parser.add_argument(
        "--chain-temperature", type=float, default=1.0, help="sharpens what each iteration of a denoising model but the last hands to "
        "the next; with a posterior readout --temperature does that as well, and better"
    )
    parser.add_argument("--chain-top-p", type=float, default=1.0, help="as --top-p, within each iteration but the last")
    parser.add_argument("--chain-top-k", type=int, default=0, help="as --top-k, within each iteration but the last: quicker for "
                        "one text at a time")
    parser.add_argument("--chain-readout", default="coda", help="where each iteration but the last is read: coda, or core, which is "
                        "quicker and needs a model with a core readout")
    parser.add_argument("--exit", default="never", help="end a token's iterations when it has settled: never; entropy or kl, of its "
                        "distribution, or that from the iteration before, is below a threshold; argmax, its likeliest token stays the same")
    parser.add_argument("--exit-threshold", type=float, help="nats, or for argmax iterations (default: 0.05 for entropy, 0.001 for kl, 3)")
    parser.add_argument("--exit-minimum", type=int, default=1, help="iterations that a token takes at least")
    parser.add_argument("--caches", type=int, default=0, help="key-value caches that the K iterations share: less memory, other text; 0 "
                        "gives each its own, 1 keeps the last iteration's alone")
    parser.add_argument("--cache-order", default="adjacent", help="which iterations share one: adjacent, or cyclic (modulo --caches)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of sampling of the first text; others count on from it")
    parser.add_argument("--interactive", action="store_true", help="converse at the terminal, with the cache kept from turn to turn")
    parser.add_argument("--jsonl", type=Path, nargs=2, metavar=("IN", "OUT"), help='continue each {"prompt": TEXT} of a file; goes on '
                        "behind the whole lines that OUT has")
    parser.add_argument("--batch", type=int, default=16, help="prompts of --jsonl at a time")
    parser.add_argument("--context", type=int, default=1024, help="positions that the cache of --interactive and --jsonl holds at most")
    parser.add_argument("--no-cache", action="store_true", help="recompute the past at every token (slow; for checking)")
    parser.add_argument("--compile", action="store_true", help="compile the parts of a step, in a third of a minute about: quicker from "
                        "then on, above all on a GPU with few texts at a time")
    parser.add_argument("--device", help="cpu, cuda ... (default: cuda where there is one)")
    arguments = parser.parse_args()

    from dataclasses import fields

    try:
        from .generation import Sampling, TextGenerator

        if bool(arguments.prompt or arguments.no_cache) + bool(arguments.jsonl) + arguments.interactive > 1:
            raise ValueError("--prompt, --jsonl and --interactive exclude each other, and --no-cache goes with --prompt: choose one")
        sampling = Sampling(**{field.name: getattr(arguments, field.name) for field in fields(Sampling)})
        if arguments.compile and arguments.no_cache:
            raise ValueError("--compile is for steps of one position, which --no-cache does not make: leave one of them out")
        generator = TextGenerator.load(FOLDER, arguments.device)
        generator.compiled = arguments.compile
        iterations = generator.iterations if arguments.iterations is None else arguments.iterations
        if arguments.interactive:
            from .console import Console

            Console(generator, iterations, sampling, arguments.seed, arguments.max_new_tokens, arguments.context).run()
            return
        if arguments.jsonl:
            from .text_batches import continue_prompts

            continue_prompts(generator, *arguments.jsonl, iterations, sampling, arguments.seed, arguments.max_new_tokens, arguments.batch,
                             arguments.context)
            return
        for seed, prompt in enumerate(arguments.prompt or [""], start=arguments.seed):
            print("\n" * (seed > arguments.seed) + prompt, end="", flush=True)
            started, count = time.perf_counter(), 0
            ids = generator.tokenizer.encode(prompt, bos=True)
            decoder = generator.decoder(
                1, len(ids) + max(arguments.max_new_tokens, 0), iterations, sampling, use_cache=not arguments.no_cache
            )
            for _, text in generator.write(decoder, ids, seed, arguments.max_new_tokens):
                print(text, end="", flush=True)
                count += 1
            rate, used = count / (time.perf_counter() - started), [one.item() for one in decoder.iterations_used[:count]]
            mean = f" ({sum(used) / len(used):.1f} used)" if used else ""
            cache = "no cache" if decoder.cache is None else f"cache {decoder.cache.bytes / 2**20:.1f} MiB"
            print(f"\n[{count} tokens, K = {iterations}{mean}, {rate:.1f} tokens/s, {cache}]", file=sys.stderr)
    except (ValueError, OSError) as error:
        sys.exit(f"\n{FOLDER.name}: {error}")
    except ImportError as error:
        own = (error.name or "").partition(".")[0] == __package__
        sys.exit(f"\n{FOLDER.name}: {error}: {'export the model again' if own else 'install that Python package'}")
    except SyntaxError as error:  # of a file of code that was cut, and whose beginning is no program
        sys.exit(f"\n{FOLDER.name}: {error}: export the model again")
    except (RuntimeError, MemoryError) as error:
        from .exceptions import first_line, out_of_memory

        if "C++ compiler" in first_line(error) or "C compiler" in first_line(error):  # of --compile, which calls one on a GPU too
            sys.exit(f"\n{FOLDER.name}: --compile needs a compiler ({first_line(error)}): install g++, or leave --compile out")
        if not out_of_memory(error):
            raise
        sys.exit(f"\n{FOLDER.name}: there is not enough memory for model and key-value cache: ask for fewer tokens or iterations, or "
                 "smaller --batch, --context or --caches")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
