"""Generate text with an exported model: `python FOLDER --prompt "Once"`. Needs torch, safetensors and sentencepiece only."""

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
    parser.add_argument("--temperature", type=float, default=1.0, help="of the last iteration's distribution; 0 is greedy")
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
        "the next: below 1 the text becomes likelier and less varied, earlier than --temperature can make it"
    )
    parser.add_argument("--chain-top-p", type=float, default=1.0, help="as --top-p, within each iteration but the last")
    parser.add_argument("--chain-readout", default="coda", help="where each iteration but the last is read: coda, or core, which is "
                        "quicker and needs a model with a core readout")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of sampling")
    parser.add_argument("--no-cache", action="store_true", help="recompute the past at every token (slow; for checking)")
    parser.add_argument("--device", help="cpu, cuda ... (default: cuda where there is one)")
    arguments = parser.parse_args()

    from .generation import Sampling, TextGenerator

    try:
        sampling = Sampling(
            arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.solver, arguments.chain_temperature,
            arguments.chain_top_p, arguments.chain_readout,
        )
        generator = TextGenerator.load(FOLDER, arguments.device)
        for prompt in arguments.prompt or [""]:
            print(prompt, end="", flush=True)
            started, count = time.perf_counter(), 0
            for text in generator.stream(
                prompt, arguments.max_new_tokens, arguments.iterations, sampling, arguments.seed, use_cache=not arguments.no_cache
            ):
                print(text, end="", flush=True)
                count += 1
            rate = count / (time.perf_counter() - started)
            print(f"\n[{count} tokens, K = {arguments.iterations or generator.iterations}, {rate:.1f} tokens/s]", file=sys.stderr)
    except (ValueError, OSError) as error:
        sys.exit(f"\n{FOLDER.name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
