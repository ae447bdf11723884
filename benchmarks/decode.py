"""Cached greedy decoding of a model of GPT-2's size: `jf.generate` against Hugging Face's `generate` on the same CPU.

    python benchmarks/decode.py [--rounds 5] [--tokens 64] [--prompt 32] [--batches 1 8] [--one-core] [--out FILE.md]

Both have the same random weights in float32 and the same prompts, continue them by exactly as many tokens, and must
agree on them. Everything that a user's call does is inside the time: preparing the prompt, prefill, the loop. Compile
time, the difference between the first call and the next, is reported apart.
"""

import argparse
import tempfile
import time

import numpy as np
import torch
import transformers
from compare import HEADER, alternate, arguments, report, row

import jaxformers as jf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("tokens", 64), ("prompt", 32), ("layers", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = arguments(parser)
    torch.manual_seed(0)
    # wider than GPT-2's initialisation: scores far enough apart that both choose the same tokens
    config = transformers.GPT2Config(n_layer=args.layers, initializer_range=0.06, eos_token_id=None, bos_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        model = jf.load(directory)
    table, notes = [HEADER], []
    for batch in args.batches:
        prompts = np.random.default_rng(batch).integers(0, config.vocab_size, (batch, args.prompt))
        torch_prompts = torch.tensor(prompts)

        def ours(prompts: np.ndarray = prompts) -> np.ndarray:
            return np.asarray(jf.generate(model, prompts, max_new_tokens=args.tokens, eos_token_id=()))

        def their(prompts: torch.Tensor = torch_prompts) -> np.ndarray:
            mask = torch.ones_like(prompts)
            new = dict(max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, pad_token_id=0)
            with torch.inference_mode():
                return theirs.generate(prompts, attention_mask=mask, **new)[:, args.prompt :].numpy()

        start = time.perf_counter()
        a = ours()
        first = time.perf_counter() - start
        b = their()
        assert np.array_equal(a, b), f"{(a != b).sum()} of {a.size} tokens differ"
        times = alternate(ours, their, args.rounds)
        notes.append(f"batch {batch}: {first - min(times[0]):.1f} s")
        table.append(row(f"batch {batch}, ms per token", *times, per=1e3 / args.tokens))
    report(
        args.out,
        f"Greedy decoding at GPT-2's size, {args.layers} layers, {args.prompt} + {args.tokens} tokens, float32",
        table,
        f"Compile time, once and not in the table: {', '.join(notes)}. Both produced the same tokens.",
    )


if __name__ == "__main__":
    main()
